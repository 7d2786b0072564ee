"""Slices of a matrix lie where they belong, one after the other, in memory that is far smaller than the matrix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_refill import Array, Files, as_bfloat16, floats, wanted

from loadstone.errors import FileChanged
from loadstone.hardware.pages import PAGE_BYTES
from loadstone.stream.refill import Refill
from loadstone.stream.slices import Slices, can_slice

ROWS, COLUMNS = 1001, 52  # rows of 208 bytes, which no page holds a whole number of
WINDOW = 8 * PAGE_BYTES


@pytest.fixture(params=[0, 8, 4095 * 8])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    """A matrix between other tensors, which begins anywhere in a page."""
    made = Files(tmp_path / "model.bin", begin=request.param)
    made.add("head", floats(ROWS, COLUMNS), "float32")
    made.add("after", floats(5000), "float32")
    return made


def matrix(files: Files) -> Array:
    info = files.tensors["head"]
    return np.frombuffer(files.content, np.float32, ROWS * COLUMNS, info.offset).reshape(ROWS, COLUMNS)


def opened(files: Files, dtype: str = "float32") -> tuple[Refill, Slices]:
    checkpoint = files.write()
    head = wanted("head", (ROWS, COLUMNS), dtype)
    refill = Refill({"head": [head]}, checkpoint)
    return refill, Slices(head, "head", refill, WINDOW)


def shown(slices: Slices, memory: Array) -> Array:
    begin = slices.begin
    return memory[begin : begin + ROWS * COLUMNS * 4].view(np.float32).reshape(ROWS, COLUMNS)


def test_each_slice_is_right_where_it_belongs_pass_after_pass(files: Files) -> None:
    refill, slices = opened(files)
    expected = matrix(files)
    for _ in range(5):  # of an odd number of slices: each comes to either window
        seen: list[int] = []
        for rows, memory in slices.each():
            assert np.array_equal(shown(slices, memory)[rows.start : rows.stop], expected[rows.start : rows.stop])
            seen += rows
        assert seen == list(range(ROWS))
    assert len(slices.rows) % 2 == 1
    pages = 5 * len(slices.rows) * 2 * PAGE_BYTES
    assert 5 * expected.nbytes <= slices.read_bytes <= 5 * expected.nbytes + pages
    slices.close()
    refill.close()


def test_what_is_cast_on_the_way_is_too(files: Files) -> None:
    refill, slices = opened(files, "bfloat16")
    expected = as_bfloat16(matrix(files)).view(np.uint16).reshape(ROWS, COLUMNS)
    for _ in range(3):
        for rows, memory in slices.each():
            found = memory.view(np.uint16).reshape(ROWS, COLUMNS)[rows.start : rows.stop]
            assert np.array_equal(found, expected[rows.start : rows.stop])
    assert slices.read_bytes == 3 * matrix(files).nbytes
    slices.close()
    refill.close()


def test_memory_is_that_of_two_windows(files: Files) -> None:
    refill, slices = opened(files)
    for _, memory in slices.each():
        shown(slices, memory).sum()
    begin, end = (hex(memory.ctypes.data + offset)[2:] for offset in (0, memory.size))
    maps = [one for one in Path("/proc/self/maps").read_text().splitlines() if begin <= one[:12] < end]
    assert len(maps) >= memory.size // WINDOW
    assert len({one.split()[4] for one in maps}) == 1  # the same file in memory, again and again
    assert all(Path(f"/proc/self/map_files/{one.split()[0]}").stat().st_size == WINDOW for one in maps)
    slices.close()
    assert not memory.any()
    refill.close()


def test_what_was_left_in_the_midst_begins_anew(files: Files) -> None:
    refill, slices = opened(files)
    expected = matrix(files)
    for stop in (0, 1, 2):
        for number, _ in enumerate(slices.each()):
            if number == stop:
                break
        for rows, memory in slices.each():
            assert np.array_equal(shown(slices, memory)[rows.start : rows.stop], expected[rows.start : rows.stop])
    slices.close()
    refill.close()


def test_a_file_that_changed_is_told_and_nothing_of_it_is_used(files: Files) -> None:
    refill, slices = opened(files)
    for _ in slices.each():
        pass
    right, changed = bytes(files.content), bytearray(files.content)
    changed[files.tensors["head"].offset :] = bytes(len(changed) - files.tensors["head"].offset)
    kept = files.path.with_suffix(".kept")
    files.path.rename(kept)
    files.path.write_bytes(changed)
    with pytest.raises(FileChanged, match=r"model\.bin"):
        list(slices.each())
    kept.replace(files.path)
    assert files.path.read_bytes() == right
    expected = matrix(files)
    for rows, memory in slices.each():
        assert np.array_equal(shown(slices, memory)[rows.start : rows.stop], expected[rows.start : rows.stop])
    slices.close()
    refill.close()


def test_what_cannot_be_cut_into_rows_has_no_slices(files: Files) -> None:
    checkpoint = files.write()
    head = wanted("head", (ROWS, COLUMNS), "float32")
    assert can_slice(head, checkpoint.tensors, WINDOW)
    assert can_slice(head, checkpoint.tensors, 2 * PAGE_BYTES + COLUMNS * 4)
    assert not can_slice(head, checkpoint.tensors, 2 * PAGE_BYTES + COLUMNS * 4 - 1)
    assert can_slice(wanted("head", (ROWS, COLUMNS), "bfloat16"), checkpoint.tensors, PAGE_BYTES * 2 + COLUMNS * 2)
    assert not can_slice(wanted("head", (COLUMNS, ROWS), "float32"), checkpoint.tensors, WINDOW)
    assert not can_slice(wanted("after", (5000,), "float32"), checkpoint.tensors, WINDOW)
