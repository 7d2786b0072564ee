"""The front of a unit stays, the rest comes and goes in slots, and both are seen as one stretch of memory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from test_refill import Files, files, wanted, words

from loadstone.errors import FileChanged
from loadstone.hardware.memory import resident
from loadstone.hardware.pages import PAGE_BYTES
from loadstone.stream.from_files import FromFiles
from loadstone.stream.fronts import FrontedUnit, SharedSlot, front_bytes
from loadstone.stream.refill import Refill
from loadstone.stream.staying import Stays

__all__ = ["files"]  # a fixture
SHAPES = {"a": 5000, "b": 300_000, "c": 7, "d": 90_001}


@pytest.mark.parametrize(
    ("nbytes", "slot", "front"),
    [(10_000, 10_000, 0), (10_000, 9_999, 4096), (10_000, 5904, 4096), (10_000, 5903, 8192), (10_000, 1, 12_288)],
)
def test_a_front_is_whole_pages(nbytes: int, slot: int, front: int) -> None:
    assert front_bytes(nbytes, slot) == front


def test_the_pages_of_a_slot_are_seen_behind_a_front() -> None:
    slot, other = SharedSlot(5000), SharedSlot(8192)
    unit = FrontedUnit(PAGE_BYTES + 4500, PAGE_BYTES)
    unit.data[:PAGE_BYTES] = 1
    slot.data[:], other.data[:] = 2, 3
    unit.show(slot)
    assert np.unique(unit.data[PAGE_BYTES:]).tolist() == [2]
    unit.data[-1] = 7
    assert slot.data[4499] == 7
    unit.show(other)
    assert np.unique(unit.data[PAGE_BYTES:]).tolist() == [3]
    unit.hide()
    assert np.unique(unit.data[PAGE_BYTES:]).tolist() == [0]
    assert np.unique(unit.data[:PAGE_BYTES]).tolist() == [1]
    assert other.data[0] == 3
    slot.close()
    other.close()


def shared_bytes() -> int:
    """What this process sees of memory that is shared, each page as often as it is seen."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssShmem"))


def test_a_slot_that_was_closed_takes_no_memory() -> None:
    before = shared_bytes()
    slot, unit = SharedSlot(32 << 20), FrontedUnit(33 << 20, 1 << 20)
    unit.show(slot)
    unit.data[:] = 1
    assert shared_bytes() - before >= 32 << 20
    unit.hide()
    slot.close()
    del slot
    assert shared_bytes() - before < 1 << 20


def fronted(files: Files, slot_bytes: int, dtype: str = "bfloat16") -> tuple[FromFiles, dict[str, bytes]]:
    """Two units of two tensors each, and what each tensor must be."""
    arrays = {name: words(count) for name, count in SHAPES.items()}
    files.content = bytearray(1000)
    for name, array in arrays.items():
        files.add(name, array, "bfloat16", gap=4 if name == "d" else 0)
    one = {name: wanted(name, array.shape, dtype) for name, array in arrays.items()}
    refill = Refill({"ab": [one["a"], one["b"]], "cd": [one["c"], one["d"]]}, files.write())
    return FromFiles(refill, ("ab", "cd"), Stays(slot_bytes=slot_bytes)), {
        name: array.tobytes() for name, array in arrays.items()
    }


def check(filler: FromFiles, unit: str, slot: torch.Tensor, content: dict[str, bytes]) -> None:
    layout = filler.layout(unit)
    for place, view in zip(layout.places, layout.views(filler.seen(unit, slot)), strict=True):
        assert view.view(torch.uint8).numpy().tobytes() == content[place.fqn]


@pytest.mark.parametrize("slot_bytes", [4096, 20_000, 200_000])
@pytest.mark.parametrize("ahead", [False, True])
def test_what_is_seen_is_what_the_files_hold(files: Files, slot_bytes: int, ahead: bool) -> None:
    filler, content = fronted(files, slot_bytes)
    assert all(filler.layout(unit).slot_bytes <= slot_bytes for unit in ("ab", "cd"))
    if ahead:
        filler.bring_kept()
    slots = [filler.slot(slot_bytes) for _ in range(2)]
    for number in range(5):
        for unit in ("ab", "cd"):
            slot = slots[number % 2]
            filling = filler.fill(unit, slot)
            filling.wait()
            whole = sum(map(len, parts(content, unit)))
            expected = filler.moved_bytes(unit) if ahead or number else whole
            assert expected <= filling.total_bytes <= expected + 4  # the gap before `d`
            check(filler, unit, slot, content)
            filler.release(slot)
            check(filler, unit, slot, content)  # it is still there
    filler.close()


def parts(content: dict[str, bytes], unit: str) -> list[bytes]:
    return [content[name] for name in unit]


def test_a_unit_that_comes_into_another_slot_is_seen_there_only(files: Files) -> None:
    filler, content = fronted(files, 8192)
    slots = [filler.slot(8192) for _ in range(2)]
    for slot in slots:
        filler.fill("ab", slot).wait()
    check(filler, "ab", slots[1], content)
    filler.fill("cd", slots[0]).wait()  # where `ab` was read to before
    check(filler, "ab", slots[1], content)
    check(filler, "cd", slots[0], content)
    filler.close()


def test_fronts_go_with_the_last_slot_and_when_units_are_to_come_whole(files: Files) -> None:
    filler, content = fronted(files, 8192)
    before = resident().anonymous_bytes
    slot = filler.slot(8192)
    filler.bring_kept()
    filler.forget(slot)
    del slot
    assert resident().anonymous_bytes - before < 300_000
    filler.fill_whole()
    assert filler.layout("ab").slot_bytes == filler.layout("ab").nbytes
    slot = filler.slot(filler.layout("ab").nbytes)
    filler.fill("ab", slot).wait()
    check(filler, "ab", slot, content)
    filler.close()


def test_what_is_cast_has_no_front(files: Files) -> None:
    filler, _ = fronted(files, 8192, "float32")
    assert [filler.layout(unit).front_bytes for unit in ("ab", "cd")] == [0, 0]
    filler.close()


def test_a_file_that_changed_gives_no_fronts(files: Files) -> None:
    filler, _ = fronted(files, 8192)
    os.utime(files.path, (1, 1))
    with pytest.raises(FileChanged, match="weights"):
        filler.bring_kept()
    filler.close()


def test_a_slot_that_has_room_for_all_of_a_unit_takes_all_of_it(files: Files) -> None:
    filler, content = fronted(files, 8192)
    slot = filler.slot(filler.layout("ab").nbytes)
    filling = filler.fill("ab", slot)
    filling.wait()
    assert filling.total_bytes == sum(map(len, parts(content, "ab")))
    assert filler.seen("ab", slot) is slot
    check(filler, "ab", slot, content)
    filler.close()
