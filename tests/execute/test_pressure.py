"""Blocks go while memory is short and come back when it is not; nobody is told twice, and no number changes."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_residency import LAYERS, folder, logits, stats, streamed
from test_states import away

import control_groups
import loadstone
from loadstone.errors import FileChanged
from loadstone.execute import pressure
from loadstone.execute.pressure import Judgement, Watch, asked_for_bytes, is_out_of_memory, margin_for

__all__ = ["folder"]  # a fixture

pytestmark = pytest.mark.usefixtures("quiet")


def test_what_is_short_is_asked_for_at_once_and_what_is_free_after_a_while() -> None:
    judgement = Judgement(margin_bytes=100)
    assert judgement.judge(250, 0, 0) == 0
    assert judgement.judge(40, 0, 0) == 60
    looks = [judgement.judge(250, 60, 30) for _ in range(10)]
    assert looks == [0] * 9 + [-50]
    assert [judgement.judge(1000, 60, 30) for _ in range(10)][-1] == -60


def test_what_is_free_for_a_moment_only_brings_nothing_back() -> None:
    judgement = Judgement(margin_bytes=100)
    for _ in range(5):
        assert [judgement.judge(300, 60, 30) for _ in range(9)] == [0] * 9
        assert judgement.judge(210, 60, 30) == 0  # enough to go on, too little for the smallest unit
    assert [judgement.judge(300, 60, 30) for _ in range(9)] == [0] * 9
    assert judgement.judge(99, 60, 30) == 1


@pytest.mark.parametrize(
    ("total", "free", "margin"),
    [
        (100_000_000_000, 90_000_000_000, 5_000_000_000),
        (100_000_000_000, 1_000_000_000, 500_000_000),
        (100_000_000_000, 0, 32_000_000),
        (100_000_000, 0, 5_000_000),
    ],
)
def test_the_margin_is_what_a_plan_leaves_where_it_leaves_less(total: int, free: int, margin: int) -> None:
    assert margin_for(total, free) == margin


@pytest.mark.parametrize(
    ("error", "found", "nbytes"),
    [
        (MemoryError(), True, 0),
        (OSError(12, "Cannot allocate memory"), True, 0),
        (OSError(2, "No such file or directory"), False, 0),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error"),
            True,
            4096,
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True, 0),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, 0),
        (ValueError("out of memory"), False, 0),
        (None, False, 0),
    ],
)
def test_errors_of_memory_are_told_from_others(error: BaseException | None, found: bool, nbytes: int) -> None:
    assert is_out_of_memory(error) is found
    assert error is None or asked_for_bytes(error) == nbytes


def press(model: nn.Module, nbytes: int) -> None:
    residency = loadstone.of(model).residency
    assert residency is not None
    residency.ask(nbytes)


def test_blocks_go_and_come_back_and_it_is_said_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, model = loadstone.load(folder), streamed(folder, LAYERS[:2])
    expected, before = logits(whole), away(model)
    block = sum(parameter.nbytes for parameter in whole.model.layers[0].parameters())
    with caplog.at_level(logging.WARNING, "loadstone.execute"):
        for _ in range(2):
            press(model, 2 * block)
            assert len(away(model)) > len(before)
            for _ in range(2):
                assert torch.equal(logits(model), expected)
            press(model, -10 * block)
            assert away(model) == before
            assert torch.equal(logits(model), expected)
    assert [record.message.split(" of weights")[0][:27] for record in caplog.records] == ["memory is short: gives back"]
    assert stats(model).given_back_bytes >= 4 * block


def test_what_is_asked_for_in_a_forward_is_done_between_its_blocks(folder: Path) -> None:
    whole, model = loadstone.load(folder), streamed(folder, LAYERS[::5])
    seen: list[int] = []

    def ask(*_: Any) -> None:
        thread = threading.Thread(target=press, args=(model, 10**9))
        thread.start()
        thread.join()
        seen.append(len(away(model)))

    handle = model.model.layers[2].mlp.register_forward_pre_hook(ask)
    assert torch.equal(logits(model), logits(whole))
    handle.remove()
    assert len(away(model)) > seen[0]
    assert torch.equal(logits(model), logits(whole))


def test_with_gradients_nothing_goes(folder: Path) -> None:
    model = loadstone.load(folder)
    total = sum(parameter.nbytes for parameter in model.parameters())
    loadstone.of(model).park()
    residency: Any = loadstone.of(model).residency
    residency.ask(total)
    assert loadstone.of(model).is_parked
    model(torch.arange(5)[None]).logits.float().sum().backward()
    assert away(model) == set()


def test_what_comes_back_keeps_within_the_limit(folder: Path) -> None:
    model = loadstone.load(folder)
    total = sum(parameter.nbytes for parameter in model.parameters())
    loadstone.of(model).limit(int(0.7 * total))
    before = away(model)
    press(model, total // 4)
    assert away(model) > before
    press(model, -total)
    assert away(model) == before


def test_the_thread_looks_asks_and_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressure, "PERIOD_S", 0.002)
    monkeypatch.setattr(pressure, "host_memory", lambda: (10**12, free[0]))
    free, others = [10**12], watchers()
    model = streamed(folder, LAYERS[:2])
    before = away(model)
    free[0] = 0
    wait_until(lambda: stats(model).given_back_bytes > 0)
    assert len(away(model)) > len(before)
    free[0] = 10**12
    wait_until(lambda: away(model) == before)
    loadstone.of(model).park()
    wait_until(lambda: not watchers() - others)
    loadstone.of(model).wake()
    assert watchers() - others
    loadstone.of(model).close()
    wait_until(lambda: not watchers() - others)


def watchers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "loadstone-pressure"}


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_thread_outlives_a_fault_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Faulty:
        num_asked = 0

        def ask(self, nbytes: int) -> None:
            self.num_asked += 1
            raise FileChanged(f"{nbytes}: on purpose")

        def given_back(self) -> tuple[int, int]:
            return 0, 0

    monkeypatch.setattr(pressure, "PERIOD_S", 0.002)
    faulty = Faulty()
    watch = Watch(faulty)
    watch.margin_bytes, watch.look = 10, lambda: 3
    watch.start()
    wait_until(lambda: faulty.num_asked > 3)
    watch.stop()
    told = [record.getMessage() for record in caplog.records]
    assert told == ["weights cannot come back to memory: 7: on purpose"]


def test_a_forward_without_memory_gives_some_back_and_says_what_to_do(folder: Path) -> None:
    whole, model = loadstone.load(folder), streamed(folder, LAYERS[:2])

    def fail(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1000 bytes.")

    handle = model.model.layers[4].mlp.register_forward_pre_hook(fail)
    notes = []
    for _ in range(4):
        with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
            logits(model)
        notes += caught.value.__notes__
        residency: Any = loadstone.of(model).residency
        residency._states.watch.margin_bytes = 10**9
    handle.remove()
    assert notes[0].startswith("Loadstone gave back ")
    assert notes[0].endswith("call the model again, from the beginning of its text where it keeps a cache.")
    assert notes[-1] == "Nothing is left that Loadstone could give back; use a shorter context or a smaller batch."
    assert torch.equal(logits(model), logits(whole))


_CHILD = """
import json, os, sys, time
from pathlib import Path
Path(sys.argv[2], "cgroup.procs").write_text(str(os.getpid()))
import torch, loadstone
from loadstone.execute import pressure
from loadstone.hardware.memory import host_memory

class Holder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(1024, 2048, bias=False) for _ in range(20))
    def forward(self, x):
        return sum(layer(x).sum() for layer in self.layers)

pressure.PERIOD_S = 0.05
model = loadstone.load(sys.argv[1], dtype="float32", into=Holder)
x = torch.ones(1, 1024)
total = sum(parameter.nbytes for parameter in model.parameters())
with torch.inference_mode():
    expected = model(x)
    loadstone.of(model).limit(total - 8_000_000)
    residency = loadstone.of(model).residency
    margin = residency._states.watch.margin_bytes
    away = lambda: sum("Streamed" in type(parameter).__name__ for parameter in model.parameters())
    counts, same = [away()], True
    for fills in (True, False):
        ballast = torch.ones((host_memory()[1] - margin // 2) // 4) if fills else None
        end = time.monotonic() + 20
        while time.monotonic() < end and (away() > counts[0]) != fills:
            same &= torch.equal(model(x), expected)
            time.sleep(0.02)
        same &= torch.equal(model(x), expected)
        counts.append(away())
    print(json.dumps({"counts": counts, "same": same, "given": loadstone.of(model).stats().given_back_bytes}))
"""


def test_in_a_control_group_that_fills_up_blocks_go_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({f"layers.{n}.weight": torch.randn(2048, 1024).bfloat16() for n in range(20)}, path)
    with control_groups.real_group(900_000_000) as group:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, str(path), str(group)], capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    first, pressed, free = found["counts"]
    assert pressed > first
    assert free == first
    assert found["same"]
    assert found["given"] >= (pressed - first) * 8_000_000
    assert "memory is short: gives back" in done.stderr
