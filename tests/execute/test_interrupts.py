"""Ctrl-C at any line of a pass leaves a streamed model usable, from this thread and from others."""

from __future__ import annotations

import linecache
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loadstone
from loadstone import compressor
from loadstone.api.begun import Request
from loadstone.api.load import carry_out
from loadstone.execute import grouping, kept, meter, prefetch, residency, sliced, slots, states, turn
from loadstone.execute.values import Streaming
from loadstone.stream import compressed, from_files, fronts, read, refill, rows
from loadstone.stream import slices as head_slices

EXECUTE = (residency, slots, states, kept, turn, meter, prefetch, grouping, sliced)
FILES = {module.__file__ for module in (*EXECUTE, compressed, from_files, fronts, refill, read, rows, head_slices)}
X = torch.arange(8)[None]


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 80)
        self.layers = nn.ModuleList(nn.Linear(80, 80) for _ in range(4))
        self.head = nn.Linear(80, 100, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return torch.as_tensor(self.head(x))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("stack") / "stack.safetensors"
    torch.manual_seed(0)
    save_file(Stack().to(torch.bfloat16).state_dict(), path)
    return path


def streamed(path: Path, slot_bytes: int = 0, read_bytes: int | None = None, slice_bytes: int = 0) -> Any:
    units = ("embed", *(f"layers.{number}" for number in range(4)), *(("head",) if slice_bytes else ()))
    slices = {"head": slice_bytes} if slice_bytes else {}
    streaming = Streaming(units=units, slot_bytes=slot_bytes, read_bytes=read_bytes, slices=slices)
    return carry_out(Request(source=path, into=Stack, streaming=streaming))


def run(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return torch.as_tensor(model(X))


def interrupted_at(model: nn.Module, line: int) -> bool:
    """Run a pass with a KeyboardInterrupt before the given line of our code; whether there were as many lines."""
    count = 0

    def watch_lines(frame: types.FrameType, event: str, _: Any) -> Any:
        nonlocal count
        # Python comes back to a `with` at its end, where only a trace function can get in between.
        if event == "line" and not linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith(
            "with"
        ):
            count += 1
            if count == line:
                raise KeyboardInterrupt
        return watch_lines

    def watch_calls(frame: types.FrameType, event: str, _: Any) -> Any:
        return watch_lines if frame.f_code.co_filename in FILES else None

    before = sys.gettrace()
    sys.settrace(watch_calls)
    try:
        run(model)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def in_a_thread(model: nn.Module) -> torch.Tensor | None:
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(run(model)), daemon=True)
    thread.start()
    thread.join(20)
    return found[0] if found else None


@pytest.mark.usefixtures("small_grains")
@pytest.mark.parametrize(
    ("slot_bytes", "read_bytes", "slice_bytes"), [(0, None, 0), (4096, None, 0), (4096, 64, 0), (0, None, 3 * 4096)]
)
def test_an_interrupt_at_any_line_leaves_the_model_usable(
    path: Path, monkeypatch: pytest.MonkeyPatch, slot_bytes: int, read_bytes: int | None, slice_bytes: int
) -> None:
    monkeypatch.setattr(turn, "_PATIENCE_S", 0.002)
    model = streamed(path, slot_bytes, read_bytes, slice_bytes)
    stats = loadstone.of(model).stats()
    assert stats is not None
    assert (bool(stats.front_bytes), bool(stats.compressed_bytes)) == (bool(slot_bytes), bool(read_bytes))
    assert stats.window_bytes == 2 * slice_bytes
    expected = run(model)
    line = 1
    while interrupted_at(model, line):
        found = (run, in_a_thread)[line % 2](model)  # from this thread, or from another
        assert found is not None, line
        assert torch.equal(found, expected), line
        line += 1
    assert line > 200
    assert torch.equal(run(model), expected)


class Interrupted(dict[str, Any]):
    """A dict into which nothing can be put once."""

    left = 0

    def __setitem__(self, key: str, value: Any) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        super().__setitem__(key, value)


@pytest.mark.usefixtures("small_grains")
def test_what_an_interrupt_left_on_its_way_is_over_before_its_unit_comes_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = streamed(path, 4096, 64)
    expected = run(model)

    armed, computing, written, over = (threading.Event() for _ in range(4))

    def expand_one_while_it_is_used(source: Any, destination: Any) -> None:
        if armed.is_set():
            armed.clear()
            computing.wait(0.2)
            destination[:] = 255
            written.set()
            over.wait(0.2)
        compressor.expand(source, destination)

    def compute(*_: Any) -> None:
        computing.set()
        written.wait(0.05)

    model.layers[0].register_forward_pre_hook(compute)
    model.layers[0].register_forward_hook(lambda *_: over.set())
    monkeypatch.setattr(compressed, "expand", expand_one_while_it_is_used)
    ring = loadstone.of(model).residency._ring
    for number in range(3):
        for slot in ring.slots:
            ring._empty(slot)  # so that the first unit is not foreseen
        ring.where = Interrupted(ring.where)
        ring.where.left = 1
        armed.set()
        with pytest.raises(KeyboardInterrupt):
            run(model)
        for event in (computing, written, over):
            event.clear()
        assert torch.equal(run(model), expected), number


def test_a_thread_that_computes_keeps_the_turn_however_long_it_takes(path: Path) -> None:
    model = streamed(path)
    expected = run(model)
    inside, go_on = threading.Event(), threading.Event()

    def dawdle(*_: Any) -> None:
        if not inside.is_set():
            inside.set()
            go_on.wait(10)

    model.layers[1].register_forward_pre_hook(dawdle)
    found: list[torch.Tensor] = []
    first = threading.Thread(target=lambda: found.append(run(model)))
    first.start()
    inside.wait(10)
    second = threading.Thread(target=lambda: found.append(run(model)))
    second.start()
    second.join(1.5)
    assert second.is_alive()
    assert found == []
    go_on.set()
    for thread in (first, second):
        thread.join(10)
    assert len(found) == 2
    assert all(torch.equal(one, expected) for one in found)
