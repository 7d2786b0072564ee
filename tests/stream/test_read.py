import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from loadstone.errors import TruncatedFile, UnreadableFile
from loadstone.events import BytesMoved
from loadstone.stream.convert import bfloat16_to_float32
from loadstone.stream.memory import Arena, map_file
from loadstone.stream.read import Reader
from loadstone.stream.source import Source
from loadstone.stream.spans import CHUNK_BYTES, Fill


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, np.ndarray]:
    content = np.random.default_rng(0).integers(0, 256, 3 * CHUNK_BYTES + 1234, dtype=np.uint8)
    path = tmp_path / "weights.bin"
    path.write_bytes(content.tobytes())
    return path, content


def test_large_and_small_ranges_arrive_whole(data: tuple[Path, np.ndarray]) -> None:
    path, content = data
    arena = Arena()
    large = 2 * CHUNK_BYTES + 10
    ranges = [(0, large), (large, 7), (large + 7, 1000), (3 * CHUNK_BYTES, 1234)]
    fills = [Fill(file=path, offset=begin, nbytes=count, destination=arena.take(count)) for begin, count in ranges]
    reader = Reader()
    reader.submit(fills).wait()
    for fill in fills:
        assert np.array_equal(fill.destination, content[fill.offset : fill.offset + fill.nbytes])
    assert reader.done_bytes == sum(count for _, count in ranges)


def test_neighbouring_small_ranges_are_read_in_one_call(
    data: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = data
    calls: list[int] = []
    real = Source.read
    monkeypatch.setattr(Source, "read", lambda *args: (calls.append(1), real(*args))[1])
    fills = [Fill(file=path, offset=100 * i, nbytes=100, destination=np.zeros(100, np.uint8)) for i in range(1000)]
    reader = Reader(num_threads=1)
    reader.submit(fills).wait()
    assert len(calls) == 1


def test_a_cast_across_chunks_keeps_every_element_in_place(data: tuple[Path, np.ndarray]) -> None:
    path, content = data
    count = 3 * CHUNK_BYTES
    destination = np.zeros(2 * count, np.uint8)
    fill = Fill(
        file=path,
        offset=2,
        nbytes=count,
        destination=destination,
        kernel=bfloat16_to_float32,
        source_bits=16,
        destination_bits=32,
    )
    reader = Reader()
    reader.submit([fill]).wait()
    assert np.array_equal(destination.view(np.uint16)[1::2], content[2 : 2 + count].view(np.uint16))


def test_a_file_cut_short_is_an_error_that_names_it(data: tuple[Path, np.ndarray]) -> None:
    path, _ = data
    fill = Fill(file=path, offset=3 * CHUNK_BYTES, nbytes=5000, destination=np.zeros(5000, np.uint8))
    batch = Reader().submit([fill])
    with pytest.raises(TruncatedFile, match=r"weights\.bin: expected 5,000 bytes at offset 3,145,728, found 1,234"):
        batch.wait()


def test_a_missing_file_is_raised_to_whoever_waits(tmp_path: Path) -> None:
    batch = Reader().submit([Fill(file=tmp_path / "gone", offset=0, nbytes=4, destination=np.zeros(4, np.uint8))])
    with pytest.raises(UnreadableFile, match="gone"):
        batch.wait()


def test_progress_ends_with_every_byte_told(data: tuple[Path, np.ndarray]) -> None:
    path, content = data
    events: list[BytesMoved] = []
    reader = Reader(observer=events.append)
    reader.submit([Fill(file=path, offset=0, nbytes=content.size, destination=np.zeros(content.size, np.uint8))]).wait()
    assert events[-1].done_bytes == events[-1].total_bytes == content.size


def test_a_map_can_be_written_to_without_touching_the_file(data: tuple[Path, np.ndarray]) -> None:
    path, content = data
    mapped = map_file(path)
    mapped[:100] = 0
    assert path.read_bytes() == content.tobytes()


def test_a_sparse_file_larger_than_memory_opens(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(1 << 42)
    assert map_file(path).nbytes == 1 << 42


def test_an_empty_file_is_truncated(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(TruncatedFile, match="found an empty file"):
        map_file(tmp_path / "empty")


def test_the_arena_gives_zeroed_aligned_separate_memory() -> None:
    arena = Arena()
    taken = [arena.take(count) for count in (1, 63, 64, 65, 5 << 20, 3)]
    for index, piece in enumerate(taken):
        assert piece.ctypes.data % 64 == 0
        assert not piece.any()
        piece[:] = index + 1
    assert [int(piece[0]) for piece in taken] == [1, 2, 3, 4, 5, 6]


class Gate:
    """A kernel that waits until it is opened, and notes what it was called with."""

    def __init__(self) -> None:
        self.opened, self.entered = threading.Event(), threading.Event()
        self.seen: list[int] = []

    def __call__(self, source: np.ndarray, destination: np.ndarray) -> None:
        self.entered.set()
        assert self.opened.wait(10)
        self.seen.append(int(destination[0]))


def marked(path: Path, mark: int, kernel: Gate, count: int = 1) -> list[Fill]:
    """Fills of a whole chunk each, so that each is a read of its own; the kernel sees `mark`."""
    destination = np.full(CHUNK_BYTES, mark, np.uint8)
    return [Fill(file=path, offset=0, nbytes=CHUNK_BYTES, destination=destination, kernel=kernel)] * count


def test_the_batch_of_the_lowest_number_comes_first(data: tuple[Path, np.ndarray]) -> None:
    path, _ = data
    gate = Gate()
    reader = Reader(num_threads=1)
    first = reader.submit(marked(path, 0, gate, 3), priority=5)
    assert gate.entered.wait(10)
    late = reader.submit(marked(path, 9, gate), priority=9)
    urgent = reader.submit(marked(path, 1, gate), priority=1)
    equal = reader.submit(marked(path, 6, gate), priority=5)
    gate.opened.set()
    for batch in (first, late, urgent, equal):
        batch.wait()
    assert gate.seen == [0, 1, 0, 0, 6, 9]


def test_a_cancelled_batch_stops_and_the_others_arrive(data: tuple[Path, np.ndarray]) -> None:
    path, content = data
    gate = Gate()
    reader = Reader(num_threads=1)
    stopped = reader.submit(marked(path, 0, gate, 3))
    assert gate.entered.wait(10)
    destination = np.zeros(content.size, np.uint8)
    kept = reader.submit([Fill(file=path, offset=0, nbytes=content.size, destination=destination)])
    threading.Timer(0.05, gate.opened.set).start()
    stopped.cancel()
    assert len(gate.seen) == 1
    kept.wait()
    assert np.array_equal(destination, content)
    assert stopped.done_bytes == CHUNK_BYTES


def test_an_error_of_one_batch_is_raised_to_it_alone(data: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    path, content = data
    reader = Reader(num_threads=2)
    bad = reader.submit([Fill(file=tmp_path / "gone", offset=0, nbytes=4, destination=np.zeros(4, np.uint8))])
    destination = np.zeros(content.size, np.uint8)
    good = reader.submit([Fill(file=path, offset=0, nbytes=content.size, destination=destination)])
    good.wait()
    with pytest.raises(UnreadableFile, match="gone"):
        bad.wait()
    assert np.array_equal(destination, content)


def test_a_read_error_is_raised_and_the_reader_goes_on(
    data: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, content = data
    reader = Reader()

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", broken)
        batch = reader.submit([Fill(file=path, offset=0, nbytes=9, destination=np.zeros(9, np.uint8))])
        with pytest.raises(UnreadableFile, match=rf"{path.name}: expected to read the file, found: Input/output error"):
            batch.wait()
    destination = np.zeros(9, np.uint8)
    reader.submit([Fill(file=path, offset=0, nbytes=9, destination=destination)]).wait()
    assert np.array_equal(destination, content[:9])


def test_an_observer_that_raises_is_heard_by_who_waits(data: tuple[Path, np.ndarray]) -> None:
    def observer(event: object) -> None:
        raise RuntimeError("no more")

    path, _ = data
    batch = Reader(observer=observer).submit([Fill(file=path, offset=0, nbytes=9, destination=np.zeros(9, np.uint8))])
    with pytest.raises(RuntimeError, match="no more"):
        batch.wait()


def open_files() -> set[str]:
    """Those of this process that are on disk."""
    return {str(link.resolve()) for link in Path("/proc/self/fd").glob("*")}


def test_closing_ends_threads_and_files(data: tuple[Path, np.ndarray]) -> None:
    path, _ = data
    gate = Gate()
    threads, files = set(threading.enumerate()), open_files()
    reader = Reader(num_threads=2)
    batch = reader.submit(marked(path, 0, gate, 50))
    assert gate.entered.wait(10)
    threading.Timer(0.05, gate.opened.set).start()
    reader.close()
    batch.wait()
    assert batch.done_bytes < batch.total_bytes
    assert set(threading.enumerate()) <= threads
    assert open_files() <= files


def test_no_fills_are_done_at_once() -> None:
    Reader().submit([]).wait()
