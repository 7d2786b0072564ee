"""Models that are parked, woken and limited compute what they did before, and memory goes and comes back."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "architecture"))

from test_gguf_families import CASES, build, gguf_tensors, metadata
from test_residency import (
    LAYERS,
    Odd,
    Stack,
    equal,
    folder,
    interrupted,
    logits,
    quantised,
    stats,
    streamed,
    units_of,
)

import builders
import loadstone
from gguf_builders import Gguf
from loadstone.errors import FileChanged, StreamedModel
from loadstone.execute.placeholder import StreamedParameter
from loadstone.hardware.memory import resident

__all__ = ["folder"]  # a fixture

pytestmark = pytest.mark.usefixtures("quiet")


def away(model: nn.Module) -> set[str]:
    found = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in found if isinstance(parameter, StreamedParameter)}


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def kept_bytes(model: nn.Module) -> int:
    """What is in memory: parameters that are kept, and slots."""
    kept = {id(one): one for one in model.parameters() if not isinstance(one, StreamedParameter)}
    return sum(one.nbytes for one in kept.values()) + stats(model).slot_bytes


def parked_and_woken(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Park and wake a model, by asking and by using it."""
    loaded = loadstone.of(model)
    expected, before, num_hooks = builders.outputs(model, inputs), away(model), hooks(model)
    for asks in (True, False):
        readers = () if loaded.residency is None else loaded.residency._filler.readers()
        reading = {thread for reader in readers for thread in reader.threads}
        assert loaded.park() > 0
        assert loaded.is_parked
        assert loaded.park() == 0
        assert len(away(model)) > len(before)
        assert not any(thread.is_alive() for thread in reading)
        if asks:
            loaded.wake()
            loaded.wake()
            assert not loaded.is_parked
            assert away(model) == before
        assert equal(builders.outputs(model, inputs), expected)
        assert not loaded.is_parked
        assert away(model) == before
        assert hooks(model) == num_hooks or before


ZOO = [
    ("causal", "llama", "auto"),
    ("causal", "llama", "float32"),
    ("causal", "gpt2", "float32"),  # tied
    ("causal", "gemma3_text", "auto"),  # tied
    ("causal", "qwen3_moe", "auto"),
    ("causal", "mamba", "float32"),
    ("seq2seq", "t5", "float32"),
    ("seq2seq", "bart", "auto"),
    ("speech", "whisper", "float32"),
    ("encoder", "albert", "auto"),
]


@pytest.mark.parametrize(("kind", "model_type", "dtype"), ZOO)
def test_a_resident_model_is_the_same_after_parking(tmp_path: Path, kind: str, model_type: str, dtype: str) -> None:
    made = builders.tiny_model(model_type, kind, torch.bfloat16)
    builders.write_checkpoint(made, tmp_path)
    model: Any = loadstone.load(tmp_path, dtype=dtype, architecture=type(made).__name__)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    facts = {name: (type(p), p.requires_grad, dict(vars(p))) for name, p in model.named_parameters()}
    assert hooks(model) == 0
    parked_and_woken(model, builders.sample_inputs(model, kind))
    assert away(model) == set()
    assert hooks(model) == 0
    assert {name: (type(p), p.requires_grad, dict(vars(p))) for name, p in model.named_parameters()} == facts
    found = model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert equal(
        builders.outputs(copy.deepcopy(model), builders.sample_inputs(model, kind)),
        builders.outputs(model, builders.sample_inputs(model, kind)),
    )


@pytest.mark.parametrize("name", ["llama, tied", "mixtral", "falcon 40b", "t5"])
def test_a_gguf_is_the_same_after_parking(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    path = Gguf(metadata(case), quantised(gguf_tensors(build(case), case))).write(tmp_path / "m.gguf")
    model = loadstone.load(path)
    tokens = torch.arange(3, 40)[None]
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if case.seq2seq else {})
    parked_and_woken(model, inputs)


@pytest.mark.parametrize("dtype", ["float32", "auto"])
@pytest.mark.parametrize(("kind", "model_type"), [("causal", "llama"), ("causal", "gpt2"), ("seq2seq", "t5")])
def test_a_streamed_model_is_the_same_after_parking(tmp_path: Path, kind: str, model_type: str, dtype: str) -> None:
    made = builders.tiny_model(model_type, kind, torch.bfloat16)
    builders.write_checkpoint(made, tmp_path)
    more: Any = {"dtype": dtype, "architecture": type(made).__name__}
    whole = loadstone.load(tmp_path, **more)
    model = streamed(tmp_path, units_of(whole, 0.5), **more)
    inputs = builders.sample_inputs(whole, kind)
    assert equal(builders.outputs(model, inputs), builders.outputs(whole, inputs))
    parked_and_woken(model, inputs)
    loadstone.of(model).close()


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.state_dict()["model.layers.1.mlp.up_proj.weight"],
        lambda model: model.model.layers[1].mlp.up_proj.weight + 0,
        lambda model: model.get_input_embeddings()(torch.arange(5)),
        lambda model: model.model(torch.arange(5)[None])[0],
        lambda model: model.generate(torch.arange(5)[None], max_new_tokens=3, do_sample=False, pad_token_id=0),
        lambda model: model.lm_head(torch.ones(1, 64, dtype=torch.bfloat16)),
    ],
)
def test_whatever_uses_a_parked_model_wakes_it(folder: Path, use: Any) -> None:
    whole, model = loadstone.load(folder), loadstone.load(folder)
    loadstone.of(model).park()
    with torch.inference_mode():
        assert torch.equal(use(model), use(whole))
    assert not loadstone.of(model).is_parked
    assert (away(model), hooks(model)) == (set(), 0)


def test_what_is_changed_in_a_parked_model_stays_changed(folder: Path) -> None:
    model = loadstone.load(folder)
    loadstone.of(model).park()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert torch.equal(model.lm_head.weight, 2 * loadstone.load(folder).lm_head.weight)
    with pytest.raises(StreamedModel, match=r"^lm_head\.weight: expected it as it was loaded, found it changed"):
        loadstone.of(model).park()


def test_gradients_flow_through_a_model_that_was_woken(folder: Path) -> None:
    model = loadstone.load(folder)
    loadstone.of(model).park()
    model(torch.arange(5)[None]).logits.float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(StreamedModel, match="or with a gradient"):
        loadstone.of(model).park()


def in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = 5


def replaced(model: Any) -> None:
    model.model.layers[2].mlp.up_proj.weight = nn.Parameter(model.model.layers[2].mlp.up_proj.weight * 2)


def by_data(model: Any) -> None:
    model.model.layers[2].mlp.up_proj.weight.data = model.model.layers[2].mlp.up_proj.weight * 2


def cast(model: Any) -> None:
    model.model.layers[2].mlp.up_proj.to(torch.float32).to(torch.bfloat16)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("change", [in_place, replaced, by_data, cast])
def test_what_was_changed_is_never_lost(folder: Path, change: Any, stream: bool) -> None:
    model = streamed(folder, LAYERS[3:]) if stream else loadstone.load(folder)
    loaded = loadstone.of(model)
    before = away(model)
    with torch.no_grad():
        change(model)
    expected = logits(model)
    name = "model.layers.2.mlp.up_proj.weight"
    refused = r"^model\.layers\.2\.mlp\.up_proj\.weight: expected it as it was loaded, .*park\(keep_changed=True\)\.$"
    for _ in range(2):
        with pytest.raises(StreamedModel, match=refused):
            loaded.park()
    assert torch.equal(logits(model), expected)
    loaded.park(keep_changed=True)
    assert name not in away(model)
    assert "model.layers.1.mlp.up_proj.weight" in away(model)
    assert torch.equal(logits(model), expected)
    assert away(model) == before


class Low(nn.Module):
    """A layer with something added, as adapters do it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.full((4, base.in_features), 0.5, dtype=torch.bfloat16))
        self.up = nn.Parameter(torch.full((base.out_features, 4), 0.5, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T  # type: ignore[no-any-return]


def test_what_was_added_stays_and_what_moved_is_found(folder: Path) -> None:
    model = loadstone.load(folder)
    model.model.layers[2].mlp.up_proj = Low(model.model.layers[2].mlp.up_proj)
    expected = logits(model)
    loadstone.of(model).park()
    assert "model.layers.2.mlp.up_proj.base.weight" in away(model)
    assert type(model.model.layers[2].mlp.up_proj.down) is nn.Parameter
    assert torch.equal(logits(model), expected)


def test_what_cannot_be_read_again_stays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(Odd().state_dict(), tmp_path / "odd.safetensors")
    model = loadstone.load(tmp_path / "odd.safetensors", into=Odd)
    x = torch.randn(3, 16)
    with torch.inference_mode():
        expected = model(x)
        loadstone.of(model).park()
        assert {name.split(".")[0] for name in away(model)} == {"twice", "direct", "tail"}
        assert equal(list(model(x)), list(expected))


def test_a_file_that_changes_while_the_model_is_parked_is_named(tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        path = tmp_path / f"{dtype}.safetensors"
        save_file({name: tensor.bfloat16() for name, tensor in Stack().state_dict().items()}, path)
        model = loadstone.load(path, into=Stack, dtype=dtype)
        tokens, found = torch.arange(9), path.stat()
        with torch.inference_mode():
            expected = model(tokens)
            loadstone.of(model).park()
            os.utime(path, ns=(0, 0))
            for use in (loadstone.of(model).wake, lambda model=model, tokens=tokens: model(tokens)):
                with pytest.raises(FileChanged, match=rf"{path.name}: expected .* was replaced or written to"):
                    use()
            assert loadstone.of(model).is_parked
            os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
            assert torch.equal(model(tokens), expected)


def test_where_no_file_can_give_anything_back_parking_is_refused(folder: Path) -> None:
    with torch.inference_mode():
        model = loadstone.load(folder)
    with pytest.raises(StreamedModel, match=r"^park: expected weights that their files can give back, found none; "):
        loadstone.of(model).park()
    assert (away(model), hooks(model)) == (set(), 0)


def test_a_closed_model_can_neither_be_parked_nor_woken(folder: Path) -> None:
    closed = "its model was closed and its files with it; load the model again"
    model = streamed(folder, LAYERS[:3])
    loadstone.of(model).park()
    loadstone.of(model).close()
    for use in (loadstone.of(model).wake, lambda: logits(model), loadstone.of(model).park):
        with pytest.raises(StreamedModel, match=closed):
            use()


def test_after_an_interrupt_the_model_can_be_parked(folder: Path) -> None:
    model = streamed(folder, LAYERS[:3])
    expected = logits(model)
    interrupted(model, 1)
    loadstone.of(model).park()
    assert torch.equal(logits(model), expected)


def test_a_model_that_was_parked_ends_with_its_module(folder: Path) -> None:
    import weakref

    model = loadstone.load(folder)
    loadstone.of(model).park()
    reference = weakref.ref(loadstone.of(model).residency)
    del model
    gc.collect()
    assert reference() is None


def test_two_hundred_rounds_leave_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "stack.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in Stack().state_dict().items()}, path)
    for dtype in ("float32", "bfloat16"):
        model = loadstone.load(path, dtype=dtype, into=Stack)
        tokens = torch.arange(8)
        with torch.inference_mode():
            expected = model(tokens)
            for number in range(220):
                if number == 20:
                    gc.collect()
                    before, files, maps = resident().anonymous_bytes, num_files(), num_maps()
                loadstone.of(model).park()
                if number % 2:
                    loadstone.of(model).wake()
                assert torch.equal(model(tokens), expected)
        gc.collect()
        assert resident().anonymous_bytes - before < 2_000_000
        assert num_files() <= files
        assert num_maps() <= maps + 8


def num_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def num_maps() -> int:
    return Path("/proc/self/maps").read_text().count("\n")


_CHILD = """
import json, sys, torch, loadstone
from loadstone.hardware.memory import resident

class Holder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(1024, 2048, bias=False) for _ in range(12))
    def forward(self, x):
        return sum(layer(x).sum() for layer in self.layers)

model = loadstone.load(sys.argv[1], dtype=sys.argv[2], into=Holder)
x = torch.ones(1, 1024, dtype=getattr(torch, sys.argv[2]))
with torch.inference_mode():
    before = model(x)
    seen = [resident()]
    loadstone.of(model).park()
    seen.append(resident())
    same = torch.equal(model(x), before)
    seen.append(resident())
print(json.dumps({"same": same, "seen": [(one.anonymous_bytes, one.file_bytes) for one in seen]}))
"""


@pytest.mark.parametrize(("dtype", "kind"), [("float32", 0), ("bfloat16", 1)])
def test_the_memory_of_a_parked_model_is_really_given_back(tmp_path: Path, dtype: str, kind: int) -> None:
    path = tmp_path / "m.safetensors"
    save_file({f"layers.{n}.weight": torch.randn(2048, 1024).bfloat16() for n in range(12)}, path)
    weight_bytes = 12 * 2048 * 1024 * (2, 4)[dtype == "float32"]
    done = subprocess.run([sys.executable, "-c", _CHILD, str(path), dtype], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    awake, parked, again = (seen[kind] for seen in found["seen"])
    assert found["same"]
    assert awake - parked >= 0.9 * weight_bytes
    assert again - parked >= 0.9 * weight_bytes
    assert again - awake <= 0.1 * weight_bytes


@pytest.mark.parametrize("stream", [False, True])
def test_a_limit_holds_whether_it_falls_or_rises(folder: Path, stream: bool) -> None:
    whole = loadstone.load(folder)
    expected = logits(whole)
    total = sum(parameter.nbytes for parameter in whole.parameters())
    model = streamed(folder, LAYERS[::2]) if stream else loadstone.load(folder)
    loaded = loadstone.of(model)
    for share in (0.9, 0.5, 0.7, 0.4, 1.0, 0.6):
        loaded.limit(int(share * total))
        assert kept_bytes(model) <= share * total
        for _ in range(2):
            assert torch.equal(logits(model), expected)
        assert kept_bytes(model) <= share * total
    loaded.park()
    loaded.limit(int(0.5 * total))
    assert loaded.is_parked
    assert torch.equal(logits(model), expected)
    assert 0 < kept_bytes(model) <= 0.5 * total
    assert away(model)
    loaded.limit(None)
    assert (away(model), hooks(model), stats(model).num_slots) == (set(), 0, 0)
    assert torch.equal(logits(model), expected)


def test_blocks_that_go_are_spread_over_the_model(folder: Path) -> None:
    model = loadstone.load(folder)
    block = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    total = sum(parameter.nbytes for parameter in model.parameters())
    table = model.model.embed_tokens.weight.nbytes
    loadstone.of(model).limit(total - table - block + 16384)  # slots begin and end at pages
    gone = sorted({int(name.split(".")[2]) for name in away(model) if name.startswith("model.layers")})
    assert len(gone) == 3
    assert all((after - before) % 6 == 2 for before, after in zip(gone, [*gone[1:], gone[0]], strict=True))
    assert "model.embed_tokens.weight" in away(model)


def test_a_limit_that_is_none_is_refused(folder: Path) -> None:
    model = loadstone.load(folder)
    with pytest.raises(ValueError, match=r"^limit: expected at least .* for the slots .*, found 1\.00 kB\.$"):
        loadstone.of(model).limit(1000)
    with pytest.raises(ValueError, match=r"^limit: expected a size such as 5GB"):
        loadstone.of(model).limit("little")
    assert (away(model), hooks(model)) == (set(), 0)


@pytest.fixture
def decoding() -> Iterator[Any]:
    """Runs a function over and over in two threads until the test is over, and keeps what it gives."""
    over = threading.Event()
    started: list[threading.Thread] = []
    found: list[Any] = []

    def start(work: Any) -> list[Any]:
        def run() -> None:
            while not over.is_set():
                try:
                    found.append(work())
                except Exception as error:
                    found.append(error)
                    return

        for _ in range(2):
            started.append(threading.Thread(target=run))
            started[-1].start()
        return found

    yield start
    over.set()
    for thread in started:
        thread.join(60)


@pytest.mark.parametrize("stream", [False, True])
def test_states_may_change_while_others_decode(folder: Path, decoding: Any, stream: bool) -> None:
    whole = loadstone.load(folder)
    total = sum(parameter.nbytes for parameter in whole.parameters())
    model = streamed(folder, LAYERS[::2]) if stream else loadstone.load(folder)

    def generate(model: Any = model) -> torch.Tensor:
        tokens: torch.Tensor = model.generate(
            torch.arange(4)[None], max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0
        )
        return tokens

    expected = generate(whole)
    found = decoding(generate)
    loaded = loadstone.of(model)
    changes = [
        lambda: loaded.limit(int(0.5 * total)),
        loaded.park,
        lambda: loaded.limit(int(0.8 * total)),
        loaded.wake,
        lambda: loaded.limit(None),
        loaded.park,
    ]
    for number in range(24):
        changes[number % len(changes)]()
        time.sleep(0.02)
    before = len(found)
    while len(found) < before + 4 and not any(isinstance(one, Exception) for one in found):
        time.sleep(0.01)
    wrong = [one for one in found if isinstance(one, Exception) or not torch.equal(one, expected)]
    assert wrong == []
