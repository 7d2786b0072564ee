"""Modules that are built and loaded compute where they do not fit, with the same numbers, and are given back."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "architecture"))
sys.path.insert(0, str(Path(__file__).parents[1] / "execute"))

from test_gguf_families import CASES, build, gguf_tensors, metadata
from test_residency import quantised

import builders
import loadstone
from gguf_builders import Gguf
from loadstone.api import offload_choice
from loadstone.errors import DestinationError, DoesNotFit, StreamedModel
from loadstone.execute.values import States, StreamStats
from loadstone.hardware.fake import FakeLink
from loadstone.hardware.probe import probe
from loadstone.hardware.spec import Device
from loadstone.stream import transfer

SPREAD = [
    ("causal", "llama"),
    ("causal", "mixtral"),
    ("causal", "qwen2"),
    ("causal", "gpt2"),
    ("causal", "mamba"),
    ("seq2seq", "t5"),
    ("encoder", "bert"),
    ("encoder", "albert"),
    ("speech", "whisper"),
    ("contrastive", "clip"),
]
SHARES = (0.0, 0.3, 0.7)
FP8 = "float8_e4m3fn"


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeLink]]:
    """A device `cuda:0` whose memory is the host's and that is reached by a link that works late."""
    links: list[FakeLink] = []

    def link(device: torch.device) -> FakeLink:
        links.append(FakeLink(delay_s=0.0002))
        return links[-1]

    here = probe()
    device = Device(id="cuda:0", kind="cuda", name="fake", total_bytes=8 << 30, free_bytes=8 << 30)
    machine = replace(here, devices=(device, here.host))
    monkeypatch.setattr(offload_choice, "probe", lambda *_: machine)
    monkeypatch.setitem(transfer.STAND_INS, "cuda:0", "cpu")
    monkeypatch.setitem(transfer.LINKS, "cpu", link)
    yield links
    gc.collect()
    for made in links:
        assert made.num_locked_bytes == 0


def stats(model: nn.Module) -> StreamStats:
    found = loadstone.of(model).stats()
    assert found is not None
    return found


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) > 0 and all(map(torch.equal, ours, theirs))


def room(model: nn.Module, share: float, **given: Any) -> int:
    """The least that will do, and a share of what is left."""
    with pytest.raises(DoesNotFit) as found:
        loadstone.offload(model, max_memory=1, **given)
    least = 1 + found.value.shortfall_bytes
    return least + int(share * (sum(one.nbytes for one in (*model.parameters(), *model.buffers())) - least))


def batched(inputs: dict[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
    return {name: tensor.repeat(size, *[1] * (tensor.dim() - 1)) for name, tensor in inputs.items()}


@pytest.mark.parametrize("tier", ["ram -> device", "disk -> device", "ram -> cpu", "disk -> cpu"])
@pytest.mark.parametrize(("number", "kind", "model_type"), [(i, *one) for i, one in enumerate(SPREAD)])
def test_the_numbers_are_those_of_the_resident_model(
    request: pytest.FixtureRequest, number: int, kind: str, model_type: str, tier: str
) -> None:
    home, _, device = tier.replace("ram", "cpu").partition(" -> ")
    if device == "device":
        request.getfixturevalue("gpu")
    model: Any = builders.tiny_model(model_type, kind, torch.bfloat16 if number % 2 else torch.float32)
    inputs = batched(builders.sample_inputs(model, kind), 1 + number % 4)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    options |= {"decoder_start_token_id": 0} if kind == "seq2seq" else {}
    generates = getattr(model, "can_generate", lambda: False)() and kind in ("causal", "seq2seq")
    expected = builders.outputs(model, inputs)
    tokens = model.generate(inputs["input_ids"], **options) if generates else None
    before = {fqn: tensor.clone() for fqn, tensor in model.state_dict().items()}
    given = {"device": "cuda" if device == "device" else "cpu", "home": home}
    assert loadstone.offload(model, max_memory=room(model, SHARES[number % 3], **given), **given) is model
    for _ in range(3):
        assert equal(builders.outputs(model, inputs), expected)
    if tokens is not None:
        assert torch.equal(model.generate(inputs["input_ids"], **options), tokens)
    assert any("Streamed" in type(parameter).__name__ for parameter in model.parameters())
    assert stats(model).passes >= 3
    loadstone.of(model).restore()
    assert not any("Streamed" in type(parameter).__name__ for parameter in model.parameters())
    assert equal(builders.outputs(model, inputs), expected)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[fqn], tensor) for fqn, tensor in before.items())


class Tower(nn.Module):
    """Nobody's class: blocks in a list, a tied head, a buffer."""

    def __init__(self, depth: int = 6, width: int = 128) -> None:
        super().__init__()
        self.table = nn.Embedding(100, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)) for _ in range(depth))
        self.recurrent = nn.GRU(width, width)
        self.head = nn.Linear(width, 100, bias=False)
        self.head.weight = self.table.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("shift", torch.randn(width))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids) * self.scale + self.shift
        for block in self.blocks:
            x = x + block(x).relu()
        found: torch.Tensor = self.head(self.recurrent(x)[0])
        return found


def tower() -> Tower:
    torch.manual_seed(0)
    return Tower().eval()


IDS = torch.arange(12).view(3, 4)


def run(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(ids)
    return found


@pytest.mark.parametrize("home", ["cpu", "disk"])
@pytest.mark.usefixtures("gpu")
def test_any_module_is_divided_into_its_blocks(home: str) -> None:
    model = tower()
    expected = run(model)
    loadstone.offload(model, device="cuda", max_memory=700_000, home=home)
    away = {name for name, one in model.named_parameters() if "Streamed" in type(one).__name__}
    assert any(name.startswith("blocks.") for name in away)
    assert not any(name.startswith("recurrent") or name == "scale" for name in away)
    for _ in range(3):
        assert torch.equal(run(model), expected)
    assert model.head.weight is model.table.weight
    report = loadstone.of(model).report
    assert "units" in next(phase.detail for phase in report.phases if phase.stage == "offload")
    assert "Tower from memory" in str(report)
    loadstone.of(model).restore()
    assert model.head.weight is model.table.weight
    assert not model.blocks[0]._forward_hooks
    with pytest.raises(ValueError, match="was not loaded by loadstone"):
        loadstone.of(model)


@pytest.mark.usefixtures("gpu")
def test_parameters_remain_the_master_copy_and_are_found_again() -> None:
    model = tower()
    parameters = dict(model.named_parameters())
    expected = run(model)
    loadstone.offload(model, device="cuda", max_memory=650_000)
    run(model)
    loadstone.of(model).restore()
    assert {name: id(one) for name, one in model.named_parameters()} == {
        name: id(one) for name, one in parameters.items()
    }
    assert torch.equal(run(model), expected)
    model(IDS).sum().backward()  # it can be trained again
    assert parameters["blocks.0.0.weight"].grad is not None


def test_what_fits_stays_as_a_whole() -> None:
    model = tower()
    expected = run(model)
    loadstone.offload(model, max_memory="1GB")
    assert loadstone.of(model).stats() is None
    assert torch.equal(run(model), expected)


@pytest.mark.usefixtures("gpu")
def test_gradients_are_refused() -> None:
    model = loadstone.offload(tower(), device="cuda", max_memory=650_000)
    with pytest.raises(StreamedModel, match="expected a forward without gradients"):
        model(IDS)
    loadstone.of(model).restore()


def test_what_means_nothing_is_refused() -> None:
    model = tower()
    with pytest.raises(DoesNotFit, match=r"offload: expected room on cpu for one block at a time"):
        loadstone.offload(model, max_memory=100)
    with pytest.raises(ValueError, match='home="tape": expected "cpu" or "disk"'):
        loadstone.offload(model, home="tape")
    with pytest.raises(ValueError, match="states= says everything"):
        loadstone.offload(model, home="disk", states=States())
    with pytest.raises(ValueError, match='states: ready on "tape"; expected "disk" or "cpu"'):
        loadstone.offload(model, states=States(ready=("tape", None)))
    with pytest.raises(ValueError, match='states: staged on "disk"; expected the home "cpu"'):
        loadstone.offload(model, states=States(staged=("disk", None)))
    with pytest.raises(ValueError, match='states: "int8" is no floating-point dtype'):
        loadstone.offload(model, states=States(ready=("cpu", "int8")))
    with pytest.raises(ValueError, match="found parameters on meta; load it first"):
        loadstone.offload(tower().to("meta"))
    loaded = loadstone.of(loadstone.offload(model, max_memory="1GB"))
    loaded.restore()
    with pytest.raises(ValueError, match=r"restore\(\) undoes loadstone\.offload\(\)"):
        loaded.restore()
    loadstone.offload(model, max_memory=650_000)
    with pytest.raises(StreamedModel, match="found one that is streamed already"):
        loadstone.offload(model, max_memory=650_000)


def test_what_was_loaded_and_not_changed_is_read_from_its_own_files(llama_folder: Path, caches: Path) -> None:
    states = States(ready=("disk", None), staged=("disk", None), computing=("cpu", None))
    model = loadstone.load(llama_folder)
    with torch.inference_mode():
        expected = model(IDS).logits
    loadstone.offload(model, states=states)
    assert stats(model).pass_bytes > 0
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, expected)
    assert not (caches / "loadstone" / "offload").exists()
    assert [phase.stage for phase in loadstone.of(model).report.phases][-1] == "offload"
    loadstone.of(model).restore()
    assert loadstone.of(model).residency is None
    # Not even a change that no version counter sees goes unnoticed.
    model.model.layers[0].mlp.up_proj.weight.data += 1
    with torch.inference_mode():
        expected = model(IDS).logits
    loadstone.offload(model, states=states)
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, expected)
    assert (caches / "loadstone" / "offload").exists()


def test_what_is_put_in_order_on_its_way_keeps_to_the_memory_too(tmp_path: Path) -> None:
    case = replace(
        CASES["llama, tied"],
        sizes={**CASES["llama, tied"].sizes, "hidden_size": 256, "intermediate_size": 512},
        meta={"embedding_length": 256, "feed_forward_length": 512, "rope.dimension_count": 64},
    )
    path = Gguf(metadata(case), quantised(gguf_tensors(build(case), case))).write(tmp_path / "m.gguf")
    model = loadstone.load(path)
    with torch.inference_mode():
        expected = model(IDS).logits
    limit = room(model, 0.0, home="disk")
    loadstone.offload(model, home="disk", max_memory=limit)
    stays = [one for one in model.parameters() if "Streamed" not in type(one).__name__]
    assert sum(one.nbytes for one in (*stays, *model.buffers())) + stats(model).slot_bytes <= limit
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, expected)


def test_states_can_be_asked_for_at_the_load(llama_folder: Path, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = States(ready=("disk", None), staged=("disk", FP8), computing=("cpu", None))
    expected = loadstone.offload(loadstone.load(llama_folder), states=states)
    monkeypatch.setattr("loadstone.stream.unchanged.are_in_files", lambda *_: pytest.fail("compared"))
    model = loadstone.load(llama_folder, states=states)
    assert all(one.lender is not None for one in model.model.layers.parameters())
    assert stats(model).pass_bytes == stats(expected).pass_bytes
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
    assert not (caches / "loadstone" / "offload").exists()
    stages = [phase.stage for phase in loadstone.of(model).report.phases]
    assert stages[0] == "headers"
    assert stages[-1] == "offload"
    with pytest.raises(ValueError, match="states= says where everything is"):
        loadstone.load(llama_folder, states=states, device="cpu")
    with pytest.raises(ValueError, match="states= says where everything is"):
        loadstone.load(llama_folder, states=states, max_memory="1GB")


def test_a_file_of_our_own_has_no_name_and_goes_with_the_model(caches: Path) -> None:
    gc.collect()  # what others left open
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    model = tower()
    expected = run(model)
    loadstone.offload(model, home="disk", max_memory=650_000)
    assert torch.equal(run(model), expected)
    assert list((caches / "loadstone" / "offload").iterdir()) == []
    del model
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_a_cache_folder_that_cannot_be_written_to_is_named(caches: Path) -> None:
    (caches / "loadstone").write_text("a file")
    model = tower()
    expected = run(model)
    with pytest.raises(DestinationError, match="expected to write parameters there"):
        loadstone.offload(model, home="disk", max_memory=650_000)
    assert torch.equal(run(model), expected)


def rounded(model: Tower, dtype: torch.dtype) -> Tower:
    """The same with the matrices of its blocks rounded."""
    with torch.no_grad():
        for block in model.blocks:
            block[0].weight.copy_(block[0].weight.to(dtype).to(block[0].weight.dtype))
    return model


@pytest.mark.parametrize(
    "states",
    [
        States(ready=("disk", None), staged=("disk", FP8), computing=("cuda:0", "bfloat16")),
        States(ready=("cpu", FP8), staged=("cpu", FP8), computing=("cuda:0", "bfloat16")),
        States(ready=("cpu", None), staged=("cuda:0", FP8), computing=("cuda:0", "bfloat16"), staged_bytes=36_000),
        States(ready=("disk", None), staged=("cuda:0", FP8), computing=("cuda:0", "bfloat16"), staged_bytes=36_000),
        States(ready=("disk", FP8), staged=("cpu", None), computing=("cuda:0", "bfloat16"), staged_bytes=36_000),
        States(ready=("disk", FP8), staged=("disk", None), computing=("cpu", "bfloat16")),
        States(ready=("cpu", FP8), staged=("cpu", None), computing=("cpu", "bfloat16")),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("gpu")
def test_states_round_to_what_was_asked_for_and_nothing_else(states: States, dtype: torch.dtype) -> None:
    expected = run(rounded(tower().to(dtype), torch.float8_e4m3fn).bfloat16())
    model = tower().to(dtype)
    model.shift = model.shift.bfloat16()
    loadstone.offload(model, states=states)
    for _ in range(3):
        assert torch.equal(run(model), expected)
    # Two bytes an element are computed with, and one travels, if it does not come from a file of wider ones.
    if states.ready == ("cpu", FP8):
        biases = 6 * 3 * 128 * dtype.itemsize
        assert stats(model).pass_bytes == 6 * 128 * 128 + biases
    loadstone.of(model).restore()


@pytest.mark.usefixtures("gpu")
def test_a_dtype_for_the_home_rounds_blocks_and_halves_what_travels() -> None:
    model = tower().bfloat16()
    loadstone.offload(model, device="cuda", dtype=torch.float8_e4m3fn)
    assert torch.equal(run(model), run(rounded(tower().bfloat16(), torch.float8_e4m3fn)))
    loadstone.of(model).restore()


@pytest.mark.usefixtures("gpu")
def test_blocks_stay_near_up_to_the_limit() -> None:
    for limit, kept in ((0, 0), (2 * 67_072, 2), (None, 6)):
        model = tower()
        states = States(ready=("disk", None), staged=("cpu", None), computing=("cuda:0", None), staged_bytes=limit)
        expected = run(model)
        loadstone.offload(model, states=states)
        assert torch.equal(run(model), expected)
        detail = next(phase.detail for phase in loadstone.of(model).report.phases if phase.stage == "placement")
        assert (f"{kept} of them kept near" in detail) == bool(kept)
        loadstone.of(model).restore()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.usefixtures("gpu")
def test_blocks_or_the_model_can_be_compiled(whole: bool) -> None:
    torch._dynamo.reset()
    model: Any = tower()
    model.recurrent = nn.Identity()
    model.recurrent.forward = lambda x: (x, None)
    expected = run(model)
    loadstone.offload(model, device="cuda", max_memory=260_000)
    if whole:
        compiled = torch.compile(model, backend="eager")
    else:
        compiled = model
        for block in model.blocks:
            block.forward = torch.compile(block.forward, backend="eager")
    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(compiled(IDS), expected)
    loadstone.of(model).restore()


@pytest.mark.gpu
@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_a_real_device_computes_what_it_computes_resident(home: str) -> None:
    model = tower()
    expected = run(tower().cuda(), IDS.cuda()).cpu()
    loadstone.offload(model, device="cuda", max_memory=650_000, home=home)
    for _ in range(5):
        assert torch.equal(run(model, IDS.cuda()).cpu(), expected)
    loadstone.of(model).restore()
    assert next(model.parameters()).device.type == "cpu"


@pytest.mark.parametrize("home", ["cpu", "disk"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_plan_that_streams_to_a_device_is_carried_out(
    llama_folder: Path, gpu: list[FakeLink], monkeypatch: pytest.MonkeyPatch, home: str, dtype: str
) -> None:
    from loadstone.api import assemble, planned

    with torch.inference_mode():
        expected = loadstone.load(llama_folder, dtype=dtype, device="cpu")(IDS).logits
    monkeypatch.setattr(planned, "probe", offload_choice.probe)
    monkeypatch.setattr(assemble, "devices_here", lambda: offload_choice.probe().devices)
    places = {"": "cuda:0", "model.layers.1": home, "model.layers.0.mlp": home, "model.embed_tokens": home}
    model = loadstone.load(llama_folder, dtype=dtype, device_map=places)
    loaded = loadstone.of(model)
    assert loaded.plan is not None
    assert {one.compute for one in loaded.plan.placements} == {"cuda:0"}
    assert {one.home for one in loaded.plan.placements} == {"cuda:0", home}
    for _ in range(3):
        with torch.inference_mode():
            assert torch.equal(model(IDS).logits, expected)
    # What is cast is cast over there: bfloat16 travels.
    moved = [one for one in model.named_parameters() if "Streamed" in type(one[1]).__name__ and "embed" not in one[0]]
    assert stats(model).pass_bytes == sum(2 * parameter.numel() for _, parameter in moved)
    loaded.close()
    assert all(link.num_locked_bytes == 0 for link in gpu)


@pytest.mark.usefixtures("gpu")
def test_the_examples_of_the_readme_run_as_they_stand() -> None:
    from test_readme import example

    unet = tower()
    expected = run(unet)
    exec(example('home="disk")'), {"loadstone": loadstone, "unet": unet})
    assert torch.equal(run(unet), expected)
    text_encoder = tower()
    for model in (unet, text_encoder):
        model.shift = model.shift.bfloat16()
    exec(example("ready=("), {"loadstone": loadstone, "unet": unet, "text_encoder": text_encoder})
    for model in (unet, text_encoder):
        assert torch.equal(run(model), run(rounded(tower(), torch.float8_e4m3fn).bfloat16()))
        loadstone.of(model).park()
        loadstone.of(model).restore()
