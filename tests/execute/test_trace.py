"""A trace tells what each thread did and when, as the Trace Event Format has it."""

from __future__ import annotations

import json
import threading
import time
import timeit
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loadstone
from loadstone.api.begun import Request
from loadstone.api.load import carry_out
from loadstone.errors import DestinationError
from loadstone.events import NO_TRACE
from loadstone.execute.trace import Recording, block_names, recorded
from loadstone.execute.values import Streaming
from loadstone.report.trace import write_trace

UNITS = tuple(f"layers.{number}" for number in range(6))


class Tower(nn.Module):
    """Blocks in a list, and what is beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 256)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(256, 2048), nn.Linear(2048, 256)) for _ in UNITS)
        self.head = nn.Linear(256, 50)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        found: torch.Tensor = self.head(x)
        return found


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("tower") / "tower.safetensors"
    torch.manual_seed(0)
    save_file(Tower().state_dict(), path)
    return path


def streamed(path: Path) -> Any:
    return carry_out(Request(source=path, into=Tower, streaming=Streaming(units=UNITS, num_slots=2)))


def run(model: nn.Module, passes: int = 3) -> None:
    with torch.inference_mode():
        for _ in range(passes):
            model(torch.arange(48)[None])


def test_a_trace_has_reads_waits_switches_and_compute_on_named_threads(tower: Path, tmp_path: Path) -> None:
    model = streamed(tower)
    run(model, 1)
    before = loadstone.of(model).stats()
    with loadstone.of(model).trace(tmp_path / "trace.json"):
        run(model, 3)
    after = loadstone.of(model).stats()
    assert before is not None
    assert after is not None
    data = json.loads((tmp_path / "trace.json").read_text())
    assert data["otherData"] == {"spans_left_out": 0}
    events = data["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert event["tid"] in names
            kinds[event["cat"]].append(event)
    assert kinds.keys() == {"pass", "compute", "read", "wait", "switch"}
    assert [event["name"] for event in kinds["pass"]] == [f"pass {n}, 1 x 48 tokens" for n in (1, 2, 3)]
    computed = [event["name"] for event in kinds["compute"]]
    assert computed == ["embed", *UNITS, "head"] * 3
    assert len(kinds["wait"]) == len(kinds["switch"]) == 3 * len(UNITS)
    assert sum(event["args"]["bytes"] for event in kinds["wait"]) == after.streamed_bytes - before.streamed_bytes
    assert {names[event["tid"]] for event in kinds["compute"]} == {"forward (MainThread)"}
    assert all(names[event["tid"]].startswith("reader ") for event in kinds["read"])
    assert {event["args"]["of"] for event in kinds["read"]} == set(UNITS)
    assert all(event["args"]["GB/s"] > 0 for event in kinds["read"])
    for event in kinds["compute"]:  # each within a pass
        around = [one for one in kinds["pass"] if one["ts"] <= event["ts"] <= one["ts"] + one["dur"]]
        assert len(around) == 1


def test_reads_go_on_while_something_else_computes(tower: Path) -> None:
    model = streamed(tower)
    for layer in model.layers:  # a computation long enough to be seen beside a read of the page cache
        layer[1].register_forward_pre_hook(lambda *_: time.sleep(0.01))
    run(model, 1)
    with recorded(model, loadstone.of(model).residency) as recording:
        run(model, 2)
    spans = list(recording.spans())
    computing = [one for one in spans if one.kind == "compute"]
    beside = sum(
        any(
            one.begin_s < read.begin_s + read.seconds and read.begin_s < one.begin_s + one.seconds
            for one in computing
            if one.name != read.name
        )
        for read in spans
        if read.kind == "read"
    )
    assert beside > 0
    found = loadstone.of(model).stats()
    assert found is not None
    assert found.overlap > 0.5


def test_nothing_stays_after_a_trace(tower: Path, tmp_path: Path) -> None:
    model = streamed(tower)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    path = tmp_path / "trace.json"
    path.write_text("an older one")
    handle = model.layers[5].register_forward_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError), loadstone.of(model).trace(path):
        run(model, 1)
    handle.remove()
    assert json.loads(path.read_text())["traceEvents"]
    assert list(tmp_path.iterdir()) == [path]
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    residency: Any = loadstone.of(model).residency
    (reader,) = residency._filler.readers()
    assert residency._ring.tracer is reader.tracer is NO_TRACE


def test_a_resident_model_is_traced_too(tower: Path, tmp_path: Path) -> None:
    model = loadstone.load(tower, into=Tower)
    with loadstone.of(model).trace(tmp_path / "trace.json"):
        run(model, 1)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [event["name"] for event in events if event["ph"] == "X"][-1] == "pass 1, 1 x 48 tokens"
    with loadstone.of(model).trace(tmp_path / "b.json"):
        with pytest.raises(ValueError, match="this Tower is traced already"), loadstone.of(model).trace("c.json"):
            pass
        run(model, 1)
    assert len(json.loads((tmp_path / "b.json").read_text())["traceEvents"]) > 3


def test_a_place_where_no_trace_can_be_written_is_named_before_anything_runs(tower: Path, tmp_path: Path) -> None:
    loaded = loadstone.of(model := loadstone.load(tower, into=Tower))
    assert model is not None
    for path, words in (
        (tmp_path / "none" / "t.json", r"none/t\.json: expected a folder to write the trace into"),
        (tmp_path, "expected the name of a file for the trace, found a folder"),
    ):
        with pytest.raises(DestinationError, match=words), loaded.trace(path):
            raise AssertionError("the body ran")


def test_a_disk_that_takes_no_trace_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(DestinationError, match=r"t\.json: expected to write the trace, found: No space left on device"):
        write_trace(tmp_path / "t.json", Recording())
    assert list(tmp_path.iterdir()) == []


def test_spans_are_bounded_and_the_rest_is_counted(tmp_path: Path) -> None:
    recording = Recording(max_spans=5)
    for number in range(8):
        recording.span("read", f"unit {number}", time.perf_counter(), 7)
    thread = threading.Thread(target=lambda: recording.span("read", "other", 0.0), name="elsewhere")
    thread.start()
    thread.join()
    assert [one.name for one in recording.spans()] == [f"unit {number}" for number in range(5)]
    assert recording.num_left_out == 4
    write_trace(tmp_path / "t.json", recording)
    assert json.loads((tmp_path / "t.json").read_text())["otherData"] == {"spans_left_out": 4}


def test_a_tracer_that_keeps_nothing_costs_nothing_to_speak_of() -> None:
    begin = time.perf_counter()
    seconds = min(timeit.repeat(lambda: NO_TRACE.span("read", "unit", begin, 1), number=1000, repeat=5)) / 1000
    assert seconds < 20e-6  # beside reads of a megabyte and more, which take a millisecond


def test_blocks_are_found_in_lists_and_beside_them() -> None:
    assert block_names(Tower(), ("layers.0", "layers.1.0", "nowhere")) == ["embed", *UNITS, "head", "layers.1.0"]
    assert block_names(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ()) == ["0"]
