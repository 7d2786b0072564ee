"""Measure what the disk and the memory can do at best, once, and remember it."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from loadstone.hardware.memory import num_cores
from loadstone.hardware.spec import Rates

_CHUNK_BYTES = 4 << 20
_DISK_BYTES = 256 << 20
_MEMORY_BYTES = 256 << 20
_DISK_THREADS = 8


def measure(path: Path, cache: Path) -> Rates:
    """The rates of this machine and of the disk under `path`, from the cache where they were measured before.

    Takes about half a second the first time.

    Args:
        path: a weight file, some 100 MB or more for the disk's rate to mean something.
        cache: the folder that keeps what was measured.
    """
    known = cached(path, cache)
    if known is not None:
        return known
    rates = Rates(
        disk_bytes_per_s=_disk_rate(path), copy_bytes_per_s=_memory_rate(1), touch_bytes_per_s=_memory_rate(0)
    )
    file = _cache_file(path, cache)
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs the next measurement
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(asdict(rates)))
        temporary.replace(file)
    return rates


def cached(path: Path, cache: Path) -> Rates | None:
    """What was measured before for the disk under `path`."""
    try:
        return Rates(**json.loads(_cache_file(path, cache).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _cache_file(path: Path, cache: Path) -> Path:
    return cache / "rates" / f"{path.stat().st_dev}-{num_cores()}.json"


def _disk_rate(path: Path) -> float | None:
    """Direct reads (past the page cache) of the first 256 MB by eight threads; None where O_DIRECT is refused."""
    nbytes = min(path.stat().st_size, _DISK_BYTES) // _CHUNK_BYTES * _CHUNK_BYTES
    if nbytes == 0 or not hasattr(os, "O_DIRECT"):
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    offsets = iter(range(0, nbytes, _CHUNK_BYTES))
    failed = []

    def work() -> None:
        buffer = mmap.mmap(-1, _CHUNK_BYTES)  # page-aligned, as direct reads require
        for offset in offsets:
            try:
                os.preadv(descriptor, [buffer], offset)
            except OSError as error:
                failed.append(error)
                return

    seconds = _timed([work] * _DISK_THREADS)
    os.close(descriptor)
    return None if failed else nbytes / seconds


def _memory_rate(pass_number: int) -> float:
    """The rate of writing fresh memory (pass 0) or of copying into touched memory (pass 1), all cores."""
    import numpy as np

    source = np.ones(_CHUNK_BYTES // 4, np.uint8)
    cores = num_cores()
    share = _MEMORY_BYTES // cores // source.size * source.size
    maps = [mmap.mmap(-1, share) for _ in range(cores)]

    def worker(view: mmap.mmap) -> Callable[[], None]:
        array = np.frombuffer(view, np.uint8)

        def work() -> None:
            for begin in range(0, share, source.size):
                array[begin : begin + source.size] = source

        return work

    works = [worker(view) for view in maps]
    for _ in range(pass_number):
        _timed(works)
    return cores * share / _timed(works)


def _timed(works: Sequence[Callable[[], None]]) -> float:
    threads = [threading.Thread(target=work) for work in works]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(time.perf_counter() - begin, 1e-9)
