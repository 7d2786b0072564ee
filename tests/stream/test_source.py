import errno
import mmap
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loadstone.errors import TruncatedFile
from loadstone.hardware.storage import Storage
from loadstone.stream.memory import is_cached, map_file
from loadstone.stream.source import Mode, Source, choose_manner, manners_of, staging_bytes

NBYTES = 3 * 4096 + 777
MODES = {False: Mode.BUFFERED, True: Mode.DIRECT}


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, np.ndarray]:
    content = np.random.default_rng(0).integers(0, 256, NBYTES, dtype=np.uint8)
    path = tmp_path / "weights.bin"
    path.write_bytes(content.tobytes())
    return path, content


def staging() -> np.ndarray:
    return np.frombuffer(mmap.mmap(-1, staging_bytes(NBYTES)), np.uint8)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    ("offset", "nbytes"), [(0, NBYTES), (0, 1), (1, 4096), (4095, 2), (4096, 4096), (NBYTES - 1, 1), (5000, 0)]
)
def test_any_range_is_read_whole(data: tuple[Path, np.ndarray], direct: bool, offset: int, nbytes: int) -> None:
    path, content = data
    source = Source(path, MODES[direct])
    wanted = content[offset : offset + nbytes]
    assert np.array_equal(source.read(offset, nbytes, staging()), wanted)
    destination = np.zeros(nbytes, np.uint8)
    source.read_into(offset, destination, staging())
    assert np.array_equal(destination, wanted)
    source.close()


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(("offset", "found"), [(4100, NBYTES - 4100), (NBYTES, 0), (NBYTES + 9000, 0)])
def test_a_range_past_the_end_says_what_was_there(
    data: tuple[Path, np.ndarray], direct: bool, offset: int, found: int
) -> None:
    source = Source(data[0], MODES[direct])
    with pytest.raises(TruncatedFile, match=rf"expected 12,000 bytes at offset {offset:,}, found {found:,}; "):
        source.read(offset, 12_000, staging())
    source.close()


def test_a_file_system_that_refuses_direct_reads_is_read_through_the_cache(
    data: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, content = data
    real_open, real_read = os.open, os.preadv

    def refuse(name: object, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct reads here")
        return real_open(name, flags, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    source = Source(path, Mode.DIRECT)
    assert np.array_equal(source.read(10, 5000, staging()), content[10:5010])
    source.close()
    monkeypatch.setattr(os, "open", real_open)

    source = Source(path, Mode.DIRECT)
    refusals = iter([OSError(errno.EINVAL, "not this alignment")])

    def refuse_once(*arguments: object) -> int:
        for error in refusals:
            raise error
        return real_read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", refuse_once)
    assert np.array_equal(source.read(10, 5000, staging()), content[10:5010])
    source.close()


def test_what_is_in_the_page_cache_is_read_through_it(data: tuple[Path, np.ndarray]) -> None:
    path, _ = data
    path.read_bytes()
    assert manners_of([path])[path].mode is Mode.BUFFERED


def test_a_file_dropped_from_the_page_cache_is_read_past_it(data: tuple[Path, np.ndarray]) -> None:
    path, _ = data
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if is_cached(map_file(path)):
        pytest.skip("a file system in memory, where nothing can be dropped")
    assert manners_of([path])[path].mode is Mode.DIRECT


LOCAL = Storage(file_system="ext4", network=False, rotational=None, direct_alignment=512)


@pytest.mark.parametrize(
    ("storage", "cached", "mode", "num_threads"),
    [
        (LOCAL, 0.0, Mode.DIRECT, 8),
        (LOCAL, 0.5, Mode.DIRECT, 8),
        (LOCAL, 0.7, Mode.BUFFERED, 4),
        (replace(LOCAL, direct_alignment=None), 0.0, Mode.DIRECT, 8),  # not told: tried
        (replace(LOCAL, direct_alignment=0), 0.0, Mode.BUFFERED, 4),
        (replace(LOCAL, direct_alignment=1 << 20), 0.0, Mode.BUFFERED, 4),
        (replace(LOCAL, rotational=True), 0.0, Mode.BUFFERED, 1),
        (replace(LOCAL, file_system="nfs4", network=True), 0.0, Mode.BUFFERED, 16),
        (replace(LOCAL, file_system="nfs4", network=True), 1.0, Mode.BUFFERED, 4),
    ],
)
def test_the_manner_follows_from_what_was_probed(storage: Storage, cached: float, mode: Mode, num_threads: int) -> None:
    manner = choose_manner(storage, cached, cores=4)
    assert (manner.mode, manner.num_threads) == (mode, num_threads)


def test_a_file_that_cannot_be_probed_is_read_the_plain_way(tmp_path: Path) -> None:
    assert manners_of([tmp_path / "gone"])[tmp_path / "gone"].mode is Mode.BUFFERED


@pytest.mark.parametrize("phase", [0, 777])
@pytest.mark.parametrize("offset", [0, 1, 4096, 4095])
def test_large_direct_reads_arrive_whole_wherever_they_go(tmp_path: Path, phase: int, offset: int) -> None:
    nbytes = 100 * 4096 + 5
    content = np.random.default_rng(1).integers(0, 256, offset + nbytes + 3, dtype=np.uint8)
    (tmp_path / "w").write_bytes(content.tobytes())
    # With phase 0 the address is aligned as the offset in the file is, so that blocks need no staging.
    memory = np.frombuffer(mmap.mmap(-1, nbytes + 3 * 4096), np.uint8)
    begin = offset % 4096 + phase
    memory[:] = 7
    source = Source(tmp_path / "w", Mode.DIRECT)
    source.read_into(offset, memory[begin : begin + nbytes], staging())
    source.close()
    assert np.array_equal(memory[begin : begin + nbytes], content[offset : offset + nbytes])
    assert (memory[:begin] == 7).all()
    assert (memory[begin + nbytes :] == 7).all()
