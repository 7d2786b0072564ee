from pathlib import Path

import numpy as np
import pytest

from loadstone.errors import TruncatedFile
from loadstone.events import BytesMoved, ignore
from loadstone.stream.convert import bfloat16_to_float32
from loadstone.stream.memory import Arena, map_file
from loadstone.stream.read import CHUNK_BYTES, Fill, Reader
from loadstone.stream.source import Source


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
    reader = Reader(observer=ignore)
    reader.start(fills)
    reader.wait()
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
    reader = Reader(observer=ignore, num_threads=1)
    reader.start(fills)
    reader.wait()
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
    reader = Reader(observer=ignore)
    reader.start([fill])
    reader.wait()
    assert np.array_equal(destination.view(np.uint16)[1::2], content[2 : 2 + count].view(np.uint16))


def test_a_file_cut_short_is_an_error_that_names_it(data: tuple[Path, np.ndarray]) -> None:
    path, _ = data
    fill = Fill(file=path, offset=3 * CHUNK_BYTES, nbytes=5000, destination=np.zeros(5000, np.uint8))
    reader = Reader(observer=ignore)
    reader.start([fill])
    with pytest.raises(TruncatedFile, match=r"weights\.bin: expected 5,000 bytes at offset 3,145,728, found 1,234"):
        reader.wait()


def test_a_missing_file_is_raised_to_whoever_waits(tmp_path: Path) -> None:
    reader = Reader(observer=ignore)
    reader.start([Fill(file=tmp_path / "gone", offset=0, nbytes=4, destination=np.zeros(4, np.uint8))])
    with pytest.raises(FileNotFoundError, match="gone"):
        reader.wait()


def test_progress_ends_with_every_byte_told(data: tuple[Path, np.ndarray]) -> None:
    path, content = data
    events: list[BytesMoved] = []
    reader = Reader(observer=events.append)
    reader.start([Fill(file=path, offset=0, nbytes=content.size, destination=np.zeros(content.size, np.uint8))])
    reader.wait()
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
