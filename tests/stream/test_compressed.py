"""The middle of a unit is kept compressed: it is read once, and comes from memory bit by bit as it was."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from test_refill import Array, Files, as_bfloat16, files, floats, wanted, words

from loadstone.compression import GRAIN_BYTES, SHARE, kept_bytes, whole_grains
from loadstone.compressor import compress, expand
from loadstone.errors import FileChanged
from loadstone.hardware.memory import resident
from loadstone.stream.from_files import FromFiles
from loadstone.stream.refill import Refill
from loadstone.stream.spans import CHUNK_BYTES
from loadstone.stream.staying import Stays

__all__ = ["files"]  # a fixture
SHAPES = {"a": 5000, "b": 1_300_000, "c": 7, "d": 900_001}
READ_BYTES = 100_000


def weights(count: int) -> Array:
    """As those of a model: alike in size."""
    return as_bfloat16(0.02 * floats(count)).view(np.uint16)


def kept(
    files: Files, stays: Stays, arrays: dict[str, Array] | None = None, dtype: str = "bfloat16"
) -> tuple[FromFiles, dict[str, bytes]]:
    """Two units of two tensors each, and what each tensor must be."""
    arrays = arrays or {name: weights(count) for name, count in SHAPES.items()}
    files.content = bytearray(1000)
    for name, array in arrays.items():
        files.add(name, array, "bfloat16", gap=4 if name == "d" else 0)
    one = {name: wanted(name, array.shape, dtype) for name, array in arrays.items()}
    refill = Refill({"ab": [one["a"], one["b"]], "cd": [one["c"], one["d"]]}, files.write())
    return FromFiles(refill, ("ab", "cd"), stays), {name: array.tobytes() for name, array in arrays.items()}


def check(filler: FromFiles, unit: str, slot: torch.Tensor, content: dict[str, bytes]) -> None:
    for place, view in zip(filler.layout(unit).places, filler.layout(unit).views(filler.seen(unit, slot)), strict=True):
        assert view.view(torch.uint8).numpy().tobytes() == content[place.fqn]


def every_value() -> Array:
    return np.arange(1 << 16, dtype=np.uint16)


@pytest.mark.parametrize("data", [weights(300_001), words(1000), every_value(), np.zeros(70_000, np.uint16)])
def test_all_bits_come_back(data: Array) -> None:
    out = np.full(data.nbytes, 0xAA, np.uint8)
    expand(np.frombuffer(compress(data.view(np.uint8)), np.uint8), out)
    assert out.tobytes() == data.tobytes()


@pytest.mark.parametrize("size", [0.3, 0.02, 0.0183, 0.0157, 0.0134, 0.0115, 0.0099, 1e-4])
def test_weights_take_less_than_is_planned_for_them(size: float) -> None:
    """However large they are: where exponents of many bits' difference meet, another number is added to them."""
    data = as_bfloat16(size * floats(CHUNK_BYTES // 2)).view(np.uint8)
    assert len(compress(data)) < SHARE * CHUNK_BYTES


@pytest.mark.parametrize("slot_bytes", [0, 400_000, 1_500_000])
@pytest.mark.parametrize("ahead", [False, True])
def test_what_is_seen_is_what_the_files_hold(files: Files, slot_bytes: int, ahead: bool) -> None:
    filler, content = kept(files, Stays(slot_bytes=slot_bytes, read_bytes=READ_BYTES))
    layouts = [filler.layout(unit) for unit in ("ab", "cd")]
    slots = [filler.slot(max(layout.slot_bytes for layout in layouts)) for _ in range(2)]
    if ahead:
        filler.bring_kept()
    for number in range(4):
        for unit in ("ab", "cd"):
            slot = slots[number % 2]
            slot.fill_(0xAA)
            filling = filler.fill(unit, slot)
            filling.wait()
            whole = sum(len(content[name]) for name in unit)
            expected = filler.moved_bytes(unit) if ahead or number else whole
            assert expected <= filling.total_bytes <= expected + 4  # the gap before `d`
            assert not ahead or filling.total_bytes <= READ_BYTES + 2 * GRAIN_BYTES
            check(filler, unit, slot, content)
            filler.release(slot)
            check(filler, unit, slot, content)  # it is still there
    filler.close()


def test_what_does_not_compress_is_read_each_time_and_takes_no_memory(files: Files) -> None:
    mixed = np.concatenate([weights(700_000), words(600_000)])
    arrays = {"a": words(5000), "b": mixed, "c": words(7), "d": words(900_001)}
    filler, content = kept(files, Stays(read_bytes=READ_BYTES), arrays)
    slot = filler.slot(max(filler.layout(unit).slot_bytes for unit in ("ab", "cd")))
    before = resident().anonymous_bytes
    filler.bring_kept()
    layout = filler.layout("cd")
    assert layout.compressed_bytes == kept_bytes(whole_grains(layout.nbytes - READ_BYTES))
    assert filler.moved_bytes("cd") > 600_000  # of numbers at random some fit where better ones were planned
    assert READ_BYTES < filler.moved_bytes("ab") < len(content["b"])
    assert resident().anonymous_bytes - before < filler.layout("ab").compressed_bytes + 8 * (2 << 20)
    for _ in range(2):
        for unit in ("ab", "cd"):
            slot.fill_(0xAA)
            filling = filler.fill(unit, slot)
            filling.wait()
            assert filler.moved_bytes(unit) <= filling.total_bytes <= filler.moved_bytes(unit) + 4
            check(filler, unit, slot, content)
    filler.close()


def test_it_goes_with_the_last_slot_and_when_units_are_to_come_whole(files: Files) -> None:
    filler, content = kept(files, Stays(read_bytes=READ_BYTES))
    slot = filler.slot(filler.layout("ab").slot_bytes)
    filler.bring_kept()
    before = resident().anonymous_bytes
    filler.forget(slot)
    del slot
    assert before - resident().anonymous_bytes > 1_500_000 + filler.layout("ab").nbytes
    filler.fill_whole()
    assert filler.layout("ab").kept_bytes == 0
    slot = filler.slot(filler.layout("ab").nbytes)
    filling = filler.fill("ab", slot)
    filling.wait()
    assert filling.total_bytes == sum(len(content[name]) for name in "ab")
    check(filler, "ab", slot, content)
    filler.close()


def test_a_unit_that_is_to_stay_is_read_whole(files: Files) -> None:
    filler, content = kept(files, Stays(read_bytes=READ_BYTES))
    slot = filler.slot(filler.layout("ab").slot_bytes)
    filler.bring_kept()
    memory = filler.memory(filler.layout("ab").nbytes)
    filling = filler.fill("ab", memory)
    filling.wait()
    assert filling.total_bytes == sum(len(content[name]) for name in "ab")
    check(filler, "ab", memory, content)
    filler.forget(memory)
    filler.fill("ab", slot).wait()
    check(filler, "ab", slot, content)
    filler.close()


def test_what_is_cast_is_not_kept_compressed(files: Files) -> None:
    filler, _ = kept(files, Stays(read_bytes=READ_BYTES), dtype="float32")
    assert [filler.layout(unit).compressed_bytes for unit in ("ab", "cd")] == [0, 0]
    filler.close()


def test_a_file_that_changed_is_not_kept(files: Files) -> None:
    filler, _ = kept(files, Stays(read_bytes=READ_BYTES))
    os.utime(files.path, (1, 1))
    with pytest.raises(FileChanged, match="weights"):
        filler.bring_kept()
    filler.close()


def test_what_was_kept_of_other_content_is_not_used_when_the_right_one_is_back(files: Files) -> None:
    filler, content = kept(files, Stays(read_bytes=READ_BYTES))
    slot = filler.slot(filler.layout("ab").slot_bytes)
    filler.fill("cd", slot).wait()  # the file is open
    right, times = files.path.read_bytes(), files.path.stat()
    write_over(files.path, bytes(len(right)))
    filler.fill("ab", slot).wait()
    with pytest.raises(FileChanged):
        filler.check("ab")
    write_over(files.path, right)
    os.utime(files.path, ns=(times.st_atime_ns, times.st_mtime_ns))
    filler.fill("ab", slot).wait()
    filler.check("ab")
    check(filler, "ab", slot, content)
    filler.close()


def write_over(path: Path, data: bytes) -> None:
    with path.open("r+b") as file:
        file.write(data)


def test_a_fill_that_is_cancelled_leaves_what_it_has_read(files: Files) -> None:
    filler, content = kept(files, Stays(read_bytes=READ_BYTES))
    slot = filler.slot(filler.layout("ab").slot_bytes)
    for _ in range(20):
        filler.fill("ab", slot).cancel()
    filler.fill("ab", slot).wait()
    check(filler, "ab", slot, content)
    assert filler.fill("ab", slot).total_bytes <= READ_BYTES + 2 * GRAIN_BYTES
    filler.close()
