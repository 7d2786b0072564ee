"""Hashing files side by side."""

import hashlib
import threading
from pathlib import Path

import pytest

from loadstone.events import BytesMoved
from loadstone.stream import hashing
from loadstone.stream.hashing import Wanted, hash_files


def wanted(path: Path) -> Wanted:
    return Wanted(path=path, begins=(lambda _: hashlib.sha256(), lambda nbytes: hashlib.md5(str(nbytes).encode())))


@pytest.mark.parametrize("nbytes", [0, 1, (1 << 20) - 1, 1 << 20, (3 << 20) + 17])
def test_digests_are_those_of_hashlib(tmp_path: Path, nbytes: int) -> None:
    content = bytes(range(256)) * (nbytes // 256 + 1)
    path = tmp_path / "file"
    path.write_bytes(content[:nbytes])
    (done,) = hash_files([wanted(path)])
    assert done.digests[0] == hashlib.sha256(content[:nbytes]).hexdigest()
    assert done.digests[1] == hashlib.md5(str(nbytes).encode() + content[:nbytes]).hexdigest()
    assert (done.nbytes, done.fault) == (nbytes, "")


def test_files_are_hashed_side_by_side_and_come_back_in_order(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(6)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * (number * 1000 + 1))
    barrier = threading.Barrier(3, timeout=10)
    met: list[str] = []

    def begin(_: int) -> object:
        # Passes only when three threads are here at once.
        if len(met) < 3:
            met.append(threading.current_thread().name)
            barrier.wait()
        return hashlib.sha256()

    done = hash_files([Wanted(path=path, begins=(begin,)) for path in paths], num_threads=3)
    assert [one.path for one in done] == paths
    assert [one.digests[0] for one in done] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert len(set(met)) == 3


def test_an_unreadable_file_is_a_fault_and_the_others_are_hashed(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.write_bytes(b"x")
    missing, done = hash_files([wanted(tmp_path / "missing"), wanted(good)])
    assert "expected a file, found nothing there" in missing.fault
    assert missing.digests == ()
    assert done.digests[0] == hashlib.sha256(b"x").hexdigest()


def test_a_disk_that_fails_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3000))

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(hashing.os, "preadv", fail)
    (done,) = hash_files([wanted(path)])
    assert "expected to read it to its end, found Input/output error at byte 0; check the disk" in done.fault


def test_progress_never_goes_back(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / str(number)).write_bytes(bytes(2_500_000))
    events: list[BytesMoved] = []
    hash_files([wanted(tmp_path / str(number)) for number in range(4)], observer=events.append, num_threads=4)  # type: ignore[arg-type]
    assert [event.done_bytes for event in events] == sorted(event.done_bytes for event in events)
    assert events[-1] == BytesMoved(stage="hash", done_bytes=10_000_000, total_bytes=10_000_000)
