"""Hashes of whole files: many files side by side, each read ahead of its hash."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadstone.checkpoint.files import OpenFile, open_regular
from loadstone.errors import LoadstoneError
from loadstone.events import BytesMoved, Observer, ignore
from loadstone.hardware.memory import num_cores

STAGE = "hash"

# Stays in the L2 cache between the read and the hash; hashlib lets other threads run while it works on it.
_CHUNK_BYTES = 1 << 20
# The kernel reads this much further while a chunk is hashed: a disk needs requests in flight to be fast.
_AHEAD_BYTES = 16 << 20

Begin = Callable[[int], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A file to be hashed.

    Attributes:
        path: the file.
        begins: for each hash that is wanted, what begins it for a file of so many bytes.
    """

    path: Path
    begins: tuple[Begin, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hashed:
    """What came of it.

    Attributes:
        path: the file.
        digests: in hex, one for each that was wanted; none if the file could not be read.
        nbytes: how many bytes were read.
        seconds: how long that took.
        fault: why it could not be read; "" if it was.
    """

    path: Path
    digests: tuple[str, ...]
    nbytes: int
    seconds: float
    fault: str = ""


def hash_files(
    wanted: Sequence[Wanted], *, observer: Observer = ignore, num_threads: int | None = None
) -> list[Hashed]:
    """Hash files in parallel; one file is hashed by one thread, as its hash runs from front to back.

    Args:
        wanted: the files.
        observer: is told of bytes, as stage `hash`, of all files together.
        num_threads: at most; by default as many as cores, and at least two, so that one can wait for the disk.

    Returns:
        One result for each, in order; a file that cannot be read has a fault instead of digests.
    """
    progress = _Progress(observer, sum(_size(one.path) for one in wanted))
    # The largest first: the last thread to work should not begin with the longest piece.
    order = sorted(wanted, key=lambda one: -_size(one.path))
    with ThreadPoolExecutor(num_threads or max(2, num_cores()), thread_name_prefix="loadstone-hash") as pool:
        done = dict(
            zip((one.path for one in order), pool.map(lambda one: _hash(one, progress.add), order), strict=True)
        )
    return [done[one.path] for one in wanted]


class _Progress:
    """Adds up bytes of several threads."""

    def __init__(self, observer: Observer, total_bytes: int) -> None:
        self._observer = observer
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done_bytes += nbytes
            self._observer(BytesMoved(stage=STAGE, done_bytes=self._done_bytes, total_bytes=self._total_bytes))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _hash(wanted: Wanted, tell: Callable[[int], None]) -> Hashed:
    begin_s = time.perf_counter()
    done = 0
    try:
        with open_regular(wanted.path) as file:
            hashes = [begin(file.nbytes) for begin in wanted.begins]
            for chunk in _chunks(file):
                for one in hashes:
                    one.update(chunk)
                done += len(chunk)
                tell(len(chunk))
    except LoadstoneError as error:
        return Hashed(path=wanted.path, digests=(), nbytes=done, seconds=0.0, fault=str(error))
    except OSError as error:
        fault = (
            f"{wanted.path}: expected to read it to its end, found {error.strerror} at byte {done:,}; check the disk."
        )
        return Hashed(path=wanted.path, digests=(), nbytes=done, seconds=0.0, fault=fault)
    digests = tuple(one.hexdigest() for one in hashes)
    return Hashed(path=wanted.path, digests=digests, nbytes=done, seconds=time.perf_counter() - begin_s)


def _chunks(file: OpenFile) -> Iterable[memoryview]:
    """The bytes of a file from front to back; what is yielded is valid until the next one."""
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, max(1, file.nbytes))))
    offset = asked = 0
    while True:
        if hasattr(os, "posix_fadvise") and asked < min(file.nbytes, offset + _AHEAD_BYTES // 2):
            os.posix_fadvise(file.fd, asked, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
            asked += _AHEAD_BYTES
        count = os.preadv(file.fd, [buffer], offset)
        if count == 0:
            return
        yield buffer[:count]
        offset += count
