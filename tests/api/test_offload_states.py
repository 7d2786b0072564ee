"""Modules that `offload` arranged leave their device or RAM, whole or in part, and come back as they were."""

from __future__ import annotations

import gc
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from test_offload import FP8, IDS, Tower, equal, gpu, room, run, stats, tower
from torch import nn

import builders
import loadstone
from loadstone.errors import LoadstoneError, PlanNotSupported, StreamedModel
from loadstone.execute.values import States
from loadstone.hardware.fake import FakeLink
from loadstone.stream.from_memory import FromMemory, Home

__all__ = ["gpu"]  # a fixture

ZOO = [("causal", "llama"), ("causal", "gpt2"), ("causal", "mamba"), ("seq2seq", "t5"), ("encoder", "albert")]
TIERS = ["ram -> device", "disk -> device", "disk -> cpu"]

pytestmark = pytest.mark.usefixtures("quiet")


def away(model: nn.Module) -> set[str]:
    return {name for name, one in model.named_parameters() if "Streamed" in type(one).__name__}


def threads() -> int:
    names = ("loadstone-send", "loadstone-copy", "loadstone-read", "loadstone-expand")
    return sum(thread.name.startswith(names) for thread in threading.enumerate())


def given(tier: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What `offload` is told for a way between two places."""
    home, _, device = tier.replace("ram", "cpu").partition(" -> ")
    if device == "device":
        request.getfixturevalue("gpu")
    return {"device": "cuda" if device == "device" else "cpu", "home": home}


@pytest.mark.parametrize("share", [0.3, 5.0])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("kind", "model_type"), ZOO)
def test_a_module_that_was_parked_comes_back_the_same(
    request: pytest.FixtureRequest, kind: str, model_type: str, tier: str, share: float
) -> None:
    model: Any = builders.tiny_model(model_type, kind, torch.float32)
    inputs = builders.sample_inputs(model, kind)
    expected, state = builders.outputs(model, inputs), {n: t.clone() for n, t in model.state_dict().items()}
    options = given(tier, request)
    loadstone.offload(model, max_memory=room(model, share, **options), **options)
    loaded, before = loadstone.of(model), away(model)
    assert bool(before) == (share < 1)
    for asks in (True, False, True):
        assert loaded.park() > 0
        assert loaded.is_parked
        assert away(model) > before
        assert threads() == 0
        if asks:
            loaded.wake()
        assert equal(builders.outputs(model, inputs), expected)
        assert not loaded.is_parked
        assert away(model) == before
    loaded.park()
    loaded.restore()
    assert away(model) == set()
    assert equal(builders.outputs(model, inputs), expected)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("to", ["disk", "ram"])
def test_what_is_at_home_on_the_disk_can_wait_in_either_place(gpu: list[FakeLink], to: str) -> None:
    model = tower()
    expected = run(model)
    loadstone.offload(model, device="cuda", home="disk", max_memory=700_000)
    assert loadstone.of(model).park(to) > 0
    assert torch.equal(run(model), expected)
    assert gpu[-1].num_locked_bytes == 0 or away(model)


def test_a_copy_in_ram_goes_when_the_module_is_back(gpu: list[FakeLink]) -> None:
    model = loadstone.offload(tower(), device="cuda", max_memory=700_000)
    loaded, locked = loadstone.of(model), gpu[-1].num_locked_bytes
    loaded.park()
    assert gpu[-1].num_locked_bytes > locked
    loaded.wake()
    assert gpu[-1].num_locked_bytes == locked


@pytest.mark.parametrize("tier", TIERS)
def test_a_limit_falls_and_rises(request: pytest.FixtureRequest, tier: str) -> None:
    model, options = tower(), given(tier, request)
    expected = run(model)
    loadstone.offload(model, max_memory="1GB", **options)
    loaded = loadstone.of(model)
    counts = []
    for size in ("1GB", 750_000, 650_000, 700_000, None):
        loaded.limit(size)
        counts.append(len(away(model)))
        for _ in range(2):
            assert torch.equal(run(model), expected)
    assert counts[0] == counts[4] == 0
    assert counts[2] > counts[1] > 0
    assert counts[2] > counts[3] > 0
    assert not model.blocks[0]._forward_hooks
    assert model.head.weight is model.table.weight


@pytest.mark.usefixtures("gpu")
def test_what_is_changed_on_the_device_stays_changed() -> None:
    model = loadstone.offload(tower(), device="cuda", max_memory="1GB")
    loaded = loadstone.of(model)
    for round_ in range(2):
        with torch.no_grad():
            model.blocks[round_][0].weight.mul_(2)
        expected = run(model)
        loaded.park()
        assert torch.equal(run(model), expected)
    with torch.no_grad():
        model.blocks[2][0].weight.mul_(2)
    expected = run(model)
    loaded.limit(700_000)
    assert torch.equal(run(model), expected)
    loaded.restore()
    assert torch.equal(run(model), expected)


def test_what_a_file_cannot_give_back_is_refused_by_name(llama_folder: Path, caches: Path) -> None:
    states = States(ready=("disk", None), staged=("disk", None), computing=("cpu", None))
    model = loadstone.load(llama_folder, states=states)
    with torch.inference_mode():
        expected = model(IDS).logits
    loaded = loadstone.of(model)
    loaded.park()
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, expected)
    assert not (caches / "loadstone" / "offload").exists()  # all of it is in its own files
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    with torch.inference_mode():
        expected = model(IDS).logits
    with pytest.raises(StreamedModel, match=r"model\.norm\.weight: expected it as it was loaded"):
        loaded.park()
    loaded.park(keep_changed=True)
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, expected)


def test_what_was_changed_before_it_was_arranged_is_not_lost(llama_folder: Path) -> None:
    states = States(ready=("disk", None), staged=("disk", None), computing=("cpu", None))
    model = loadstone.load(llama_folder)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    with torch.inference_mode():
        expected = model(IDS).logits
    loadstone.offload(model, states=states)
    with pytest.raises(StreamedModel, match=r"model\.norm\.weight: expected it as it was loaded"):
        loadstone.of(model).park()
    loadstone.of(model).park(keep_changed=True)
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, expected)


@pytest.mark.usefixtures("gpu")
def test_a_parameter_that_would_lose_something_is_refused() -> None:
    model = loadstone.offload(tower(), device="cuda", max_memory="1GB")
    loaded = loadstone.of(model)
    loaded.park()
    loaded.wake()
    model.head.weight = nn.Parameter(model.head.weight.double().float())  # no longer tied
    with pytest.raises(StreamedModel, match=r"table\.weight: expected it as it was loaded"):
        loaded.park()
    model.table.weight = model.head.weight
    model(IDS).sum().backward()
    with pytest.raises(StreamedModel, match="or with a gradient"):
        loaded.park()
    model.zero_grad(set_to_none=True)
    loaded.park()
    assert loaded.is_parked


class Quantised(nn.Parameter):
    """A parameter of another library's class."""


class Adapted(nn.Module):
    """A block with something beside it, as adapters are put in."""

    def __init__(self, base: nn.Module, width: int) -> None:
        super().__init__()
        self.base_layer = base
        self.beside = nn.Linear(width, width)
        self.nothing = nn.Parameter(torch.zeros(0))
        self.turned = nn.Parameter(torch.randn(width, 2).T)
        self.other = Quantised(torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.base_layer(x) + self.beside(x) + self.turned.sum(0) + self.other
        return found


@pytest.mark.parametrize("home", ["cpu", "disk"])
@pytest.mark.usefixtures("gpu")
def test_what_was_added_since_goes_and_comes_too(home: str) -> None:
    model = loadstone.offload(tower(), device="cuda", max_memory="1GB", home=home)
    model.blocks[2] = Adapted(model.blocks[2], 128)
    expected, loaded = run(model), loadstone.of(model)
    for _ in range(2):
        loaded.park()
        assert "blocks.2.beside.weight" in away(model)
        assert not {"blocks.2.nothing", "blocks.2.turned", "blocks.2.other"} & away(model)
        assert torch.equal(run(model), expected)
        assert isinstance(model.blocks[2].other, Quantised)


def test_what_is_in_ram_already_cannot_leave_for_it() -> None:
    loaded = loadstone.of(loadstone.offload(tower(), max_memory=650_000))
    for ask in (loaded.park, lambda: loaded.park("ram"), lambda: loaded.limit("1GB")):
        with pytest.raises(PlanNotSupported, match="to do both in RAM; call restore"):
            ask()


@pytest.mark.usefixtures("gpu")
def test_a_disk_that_is_not_their_home_is_refused() -> None:
    loaded = loadstone.of(loadstone.offload(tower(), device="cuda", max_memory="1GB"))
    with pytest.raises(ValueError, match="expected a module whose home is the disk"):
        loaded.park("disk")
    with pytest.raises(ValueError, match='expected to="disk" or to="ram", found'):
        loaded.park("tape")


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_fifty_rounds_leave_nothing_behind(gpu: list[FakeLink], home: str) -> None:
    model = loadstone.offload(tower(), device="cuda", max_memory=800_000, home=home)
    loaded, expected = loadstone.of(model), run(model)
    loaded.park()
    assert torch.equal(run(model), expected)
    gc.collect()  # what others left open
    locked, descriptors = gpu[-1].num_locked_bytes, len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(50):
        loaded.park()
        loaded.wake()
    assert torch.equal(run(model), expected)
    assert gpu[-1].num_locked_bytes == locked
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert stats(model).passes > 0


def test_a_parked_module_ends_with_its_last_name(gpu: list[FakeLink]) -> None:
    gc.collect()
    before = sum(isinstance(one, Tower) for one in gc.get_objects())
    model = loadstone.offload(tower(), device="cuda", max_memory="1GB")
    loadstone.of(model).park()
    del model
    gc.collect()
    assert sum(isinstance(one, Tower) for one in gc.get_objects()) == before
    assert gpu[-1].num_locked_bytes == 0


def test_what_stands_elsewhere_than_it_was_loaded_stays(llama_folder: Path, caches: Path) -> None:
    model: Any = loadstone.load(llama_folder)
    layer = model.model.layers[0].mlp
    layer.up_proj = nn.Sequential(layer.up_proj)
    with torch.inference_mode():
        expected = model(IDS).logits
    loadstone.offload(model, home="disk", max_memory="1GB")
    assert loadstone.of(model).park() > 0
    assert "model.layers.0.mlp.up_proj.0.weight" not in away(model)
    assert "model.layers.0.mlp.down_proj.weight" in away(model)
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, expected)
    assert not (caches / "loadstone" / "offload").exists()


def test_what_was_cast_when_it_was_arranged_is_read_and_cast_again(llama_folder: Path, caches: Path) -> None:
    states = States(ready=("disk", None), staged=("disk", None), computing=("cpu", "bfloat16"))
    model = loadstone.load(llama_folder, states=states)
    with torch.inference_mode():
        expected = model(IDS).logits
    loadstone.of(model).park()
    assert "model.norm.weight" in away(model)
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, expected)
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert not (caches / "loadstone" / "offload").exists()


@pytest.mark.parametrize("home", ["cpu", "disk"])
@pytest.mark.usefixtures("gpu")
def test_memory_is_given_back_when_the_device_has_too_little(home: str) -> None:
    model = loadstone.offload(tower(), device="cuda", max_memory="1GB", home=home)
    loaded, expected = loadstone.of(model), run(model)
    loaded.limit(None)
    assert loaded.residency is not None
    loaded.residency.ask(150_000)
    assert away(model)
    assert torch.equal(run(model), expected)
    loaded.residency.ask(-10_000_000)
    assert away(model) == set()
    assert torch.equal(run(model), expected)


NEAR = [
    States(ready=("cpu", None), staged=("cuda:0", FP8), computing=("cuda:0", "bfloat16"), staged_bytes=36_000),
    States(ready=("cpu", None), staged=("cuda:0", FP8), computing=("cuda:0", "bfloat16")),
    States(ready=("disk", None), staged=("cuda:0", FP8), computing=("cuda:0", "bfloat16"), staged_bytes=36_000),
]


@pytest.mark.parametrize("states", NEAR, ids=str)
@pytest.mark.usefixtures("gpu")
def test_what_is_kept_near_leaves_the_device_too(states: States) -> None:
    model = tower()
    model.shift = model.shift.bfloat16()
    loadstone.offload(model, states=states)
    expected, loaded = run(model), loadstone.of(model)
    for _ in range(2):
        assert near(model)
        loaded.park()
        assert not near(model)
        assert torch.equal(run(model), expected)
    loaded.park()
    loaded.restore()
    assert torch.equal(run(model.bfloat16()), expected)


def units_in_memory(model: nn.Module) -> dict[str, Home]:
    """The units that are at home in memory, with their homes."""
    residency = loadstone.of(model).residency
    assert residency is not None
    fillers = residency._filler._fillers.values()  # type: ignore[attr-defined]
    found = {id(filler): filler for filler in fillers if isinstance(filler, FromMemory)}
    return {unit: home for filler in found.values() for unit, home in filler._homes.items()}


def near(model: nn.Module) -> list[str]:
    """The units whose master copy is on the device."""
    return [unit for unit, home in units_in_memory(model).items() if home.is_near]


PARKED_ON_DISK = [
    States(parked=("disk", None), ready=("cpu", FP8), staged=("cuda:0", "bfloat16"), computing=("cuda:0", "bfloat16")),
    States(parked=("disk", None), ready=("cpu", FP8), staged=("cpu", FP8), computing=("cuda:0", "bfloat16")),
    States(parked=("disk", FP8), ready=("cpu", None), staged=("cpu", None), computing=("cuda:0", "bfloat16")),
    States(parked=("disk", None), ready=("cpu", None), staged=("cpu", None), computing=("cuda:0", None)),
]


@pytest.mark.parametrize("from_files", [True, False])
@pytest.mark.parametrize("states", PARKED_ON_DISK, ids=str)
def test_a_module_at_home_in_ram_can_be_parked_on_the_disk(
    gpu: list[FakeLink], llama_folder: Path, caches: Path, states: States, from_files: bool
) -> None:
    model: Any = loadstone.load(llama_folder, states=states) if from_files else tower()
    if not from_files:
        model.shift = model.shift.to(torch.bfloat16 if states.computing[1] else torch.float32)
        loadstone.offload(model, states=states)
    expected, loaded = tensor(run(model)), loadstone.of(model)
    for place in (None, "disk", "ram", "disk"):
        before = gpu[-1].num_locked_bytes
        assert loaded.park() if place is None else loaded.park(place)
        if place != "ram":
            assert not units_in_memory(model)
            assert gpu[-1].num_locked_bytes == 0
        loaded.wake()
        assert torch.equal(tensor(run(model)), expected)
        assert gpu[-1].num_locked_bytes == before
    assert (caches / "loadstone" / "offload").exists() != from_files
    loaded.park()
    loaded.restore()
    assert away(model) == set()


@pytest.mark.parametrize("from_files", [True, False])
def test_so_can_one_that_computes_in_ram(llama_folder: Path, caches: Path, from_files: bool) -> None:
    states = States(parked=("disk", None), ready=("cpu", FP8), staged=("cpu", FP8), computing=("cpu", "bfloat16"))
    model: Any = loadstone.load(llama_folder, states=states) if from_files else tower()
    if not from_files:
        model.shift = model.shift.bfloat16()
        loadstone.offload(model, states=states)
    expected, loaded = tensor(run(model)), loadstone.of(model)
    assert units_in_memory(model)
    for _ in range(2):
        assert loaded.park() > 0
        assert not units_in_memory(model)
        assert torch.equal(tensor(run(model)), expected)
    with pytest.raises(ValueError, match="found one that is in RAM already"):
        loaded.park("ram")
    assert (caches / "loadstone" / "offload").exists() != from_files


def tensor(found: Any) -> torch.Tensor:
    """What `run` gave, of a model that gives logits or of one that gives a tensor."""
    logits: torch.Tensor = getattr(found, "logits", found)
    return logits


def test_a_file_that_changed_while_a_module_at_home_in_ram_was_parked_is_named(
    gpu: list[FakeLink], llama_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "own"))
    model: Any = loadstone.load(folder, states=PARKED_ON_DISK[3])
    loaded = loadstone.of(model)
    expected = tensor(run(model))
    loaded.park()
    path = next(folder.glob("*.safetensors"))
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(LoadstoneError, match=path.name):
        run(model)
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert torch.equal(tensor(run(model)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_memory_of_a_real_device_is_given_back(home: str) -> None:
    model = tower()
    before = torch.cuda.memory_allocated()
    expected = run(model.cuda(), IDS.cuda())
    loadstone.offload(model.cpu(), device="cuda", max_memory=800_000, home=home)
    loaded = loadstone.of(model)
    for _ in range(3):
        assert torch.equal(run(model, IDS.cuda()), expected)
        loaded.park()
        assert torch.cuda.memory_allocated() - before < 100_000
    states = States(ready=(home, None), staged=("cuda:0", FP8), computing=("cuda:0", None))
    loaded.restore()
    loadstone.offload(model, states=states)
    expected = run(model, IDS.cuda())
    loadstone.of(model).park()
    assert torch.cuda.memory_allocated() - before < 100_000
    assert torch.equal(run(model, IDS.cuda()), expected)
