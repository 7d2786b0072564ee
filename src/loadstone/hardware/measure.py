"""Measure what the disk and the memory can do at best, once, and remember it."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from loadstone.compression import can_compress
from loadstone.compressor import compress, expand
from loadstone.hardware.measured import (
    MeasuredDevice,
    known_rates,
    remember_devices,
    remember_rates,
    with_measures,
)
from loadstone.hardware.memory import num_cores
from loadstone.hardware.pages import Bytes, adjoining
from loadstone.hardware.spec import Device, Machine, Rates
from loadstone.hardware.storage import existing_parent

_CHUNK_BYTES = 4 << 20
_DISK_BYTES, _LOOK_BYTES = 256 << 20, 128 << 20
_MEMORY_BYTES = 256 << 20
_DISK_THREADS = 8
_STRETCH_BYTES, _EXPANDED_BYTES = 1 << 20, 64 << 20
_AT_MOST_S = 0.8  # for writing a sample, and for reading from a slow disk
_EXPAND_LOOKS, _DISK_LOOKS, _CACHE_LOOKS = 5, 8, 2

_log = logging.getLogger("loadstone.hardware")

_DIRECT = getattr(os, "O_DIRECT", 0)


def measure(path: Path, cache: Path) -> Rates:
    """The rates of this machine and of the disk under `path`, from the cache where they were measured before.

    Takes about a second the first time.

    Args:
        path: a weight file, some 100 MB or more for the disk's rate to mean something.
        cache: the folder that keeps what was measured.
    """
    known = known_rates(path, cache)
    if known is not None:
        return known
    rates = measure_rates(path)
    remember_rates(rates, path, cache)
    return rates


def measure_rates(path: Path | None) -> Rates:
    """The same, measured now; without a file only the memory's."""
    return Rates(
        disk_bytes_per_s=_disk_rate(path) if path and _DIRECT else None,
        cached_bytes_per_s=None if path is None else _cached_rate(path),
        copy_bytes_per_s=_memory_rate(1),
        touch_bytes_per_s=_memory_rate(0),
        expand_bytes_per_s=_expand_rate() if can_compress() else None,
    )


def measure_machine(machine: Machine, folder: Path, cache: Path) -> Machine:
    """Measure all that a plan needs, in a few seconds, and keep it for later plans.

    Args:
        machine: as `probe` found it.
        folder: the folder (or file) whose disk is measured; a sample is written to it for the while, if it has no large
            file.
        cache: the folder that keeps what was measured.

    Returns:
        The machine with its rates.
    """
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if busy > machine.num_cores:
        _log.warning(
            "other programs keep this machine busy (load %.1f on %d cores), so the rates are what they leave; measure "
            "again when it is quiet",
            busy,
            machine.num_cores,
        )
    with _sample(folder) as path:
        rates = measure_rates(path)
        measures = {device.id: _measure_device(device) for device in machine.devices}
        if path is not None and rates.disk_bytes_per_s is not None:  # a rented disk changes within seconds
            later = _disk_rate(path) or rates.disk_bytes_per_s
            rates = replace(rates, disk_bytes_per_s=(rates.disk_bytes_per_s + later) / 2)
    if path is not None:  # half of it should not stand for all of it later
        remember_rates(rates, folder, cache)
    remember_devices(machine, measures, cache)
    return with_measures(replace(machine, rates=rates), measures)


def _measure_device(device: Device) -> MeasuredDevice:
    from loadstone.hardware import measure_compute  # it imports torch

    try:
        link = None if device.kind == "cpu" else measure_compute.measure_link(device)
        return MeasuredDevice(compute=measure_compute.measure_compute(device), link_bytes_per_s=link)
    except RuntimeError as error:  # torch's word for memory that is full, too
        _log.warning("%s was not measured, free its memory and try again: %s", device.id, error)
        return MeasuredDevice()


@contextlib.contextmanager
def _sample(folder: Path) -> Iterator[Path | None]:
    """A file to read: the largest of the folder, or one that is written there and taken away; None if it cannot be."""
    if folder.is_file():
        yield folder
        return
    files = [path for path in folder.glob("*") if path.is_file()] if folder.is_dir() else []
    largest = max(files, key=lambda path: path.stat().st_size, default=None)
    if largest is not None and largest.stat().st_size >= _DISK_BYTES:
        yield largest
        return
    with contextlib.ExitStack() as stack:
        path = None
        try:
            made = tempfile.TemporaryDirectory(dir=existing_parent(folder), prefix=".loadstone-")
            path = Path(stack.enter_context(made)) / "sample"
            _write_sample(path)
        except OSError as error:
            _log.warning("%s: its disk was not measured, name a model there with --model: %s", folder, error)
            path = None
        yield path


def _write_sample(path: Path) -> None:
    """Bytes that do not compress, as many as the disk takes in the time."""
    chunk = mmap.mmap(-1, _CHUNK_BYTES)  # page-aligned, as direct writes require
    chunk.write(os.urandom(_CHUNK_BYTES))
    flags = os.O_WRONLY | os.O_CREAT | os.O_DSYNC if hasattr(os, "O_DSYNC") else os.O_WRONLY | os.O_CREAT
    try:
        descriptor = os.open(path, flags | _DIRECT, 0o600)
    except OSError:  # tmpfs and some others take no direct writes
        descriptor = os.open(path, flags, 0o600)
    try:
        end = time.perf_counter() + _AT_MOST_S
        for _ in range(_DISK_BYTES // _CHUNK_BYTES):
            os.write(descriptor, chunk)
            if time.perf_counter() > end:
                break
    finally:
        os.close(descriptor)


def _disk_rate(path: Path) -> float | None:
    return _read_rate(path, os.O_RDONLY | _DIRECT, _DISK_THREADS, _DISK_LOOKS)


def _cached_rate(path: Path) -> float | None:
    """Reads out of the page cache into touched memory, all cores; the first pass fills the cache."""
    _read_rate(path, os.O_RDONLY, num_cores(), _CACHE_LOOKS)
    return _read_rate(path, os.O_RDONLY, num_cores(), _CACHE_LOOKS)


def _read_rate(path: Path, flags: int, num_threads: int, num_looks: int) -> float | None:
    """Reads of the first stretches of a file, or as many as the time allows; None where that is refused.

    The median of them: rented disks are fast for as long as nothing was read for a while, and busy ones by turns.
    """
    try:
        descriptor = os.open(path, flags)
    except OSError:
        return None
    end = time.perf_counter() + _AT_MOST_S
    buffers = [adjoining(_CHUNK_BYTES) for _ in range(num_threads)]
    whole = path.stat().st_size // _CHUNK_BYTES * _CHUNK_BYTES
    rates: list[float] = []
    try:
        for begin in range(0, min(whole, num_looks * _LOOK_BYTES), _LOOK_BYTES):
            offsets = range(begin, min(whole, begin + _LOOK_BYTES), _CHUNK_BYTES)
            rates.append(_rate_of_reads(descriptor, offsets, buffers, end))
            if time.perf_counter() > end:
                break
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return statistics.median(rates) if rates else None


def _rate_of_reads(descriptor: int, offsets: Iterable[int], buffers: Sequence[Bytes], end: float) -> float:
    """A chunk at each offset, a thread for each buffer; less when the time has come.

    Raises:
        OSError: a read failed.
    """
    remaining = iter(offsets)
    done: list[int] = []
    failed: list[OSError] = []

    def reading(buffer: Bytes) -> None:
        for offset in remaining:
            try:
                done.append(os.preadv(descriptor, [buffer.data], offset))
            except OSError as error:
                failed.append(error)
            if failed or time.perf_counter() > end:
                return

    seconds = _timed([partial(reading, buffer) for buffer in buffers])
    if failed:
        raise failed[0]
    return sum(done) / seconds


def _memory_rate(pass_number: int) -> float:
    """The rate of writing fresh memory (pass 0) or of copying into touched memory (pass 1), all cores."""
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


def _expand_rate() -> float:
    """The rate at which weights come out of compressed memory into memory that was touched before, all cores."""
    normal = np.random.default_rng(0).standard_normal(_STRETCH_BYTES // 2, np.float32)
    weights = (normal.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    made: list[bytes] = []
    _timed([lambda: made.append(compress(weights))])  # not in this thread, where Blosc would start threads that stay
    cores = num_cores()
    count = -(-_EXPANDED_BYTES // cores // _STRETCH_BYTES)
    places = [np.ones((count, _STRETCH_BYTES), np.uint8) for _ in range(cores)]
    # Each stretch from memory of its own, as in a model.
    kept = [[bytearray(made[0]) for _ in range(count)] for _ in range(cores)]

    def worker(number: int) -> Callable[[], None]:
        def work() -> None:
            for data, place in zip(kept[number], places[number], strict=True):
                expand(data, place)

        return work

    works = [worker(number) for number in range(cores)]
    return cores * count * _STRETCH_BYTES / statistics.median(_timed(works) for _ in range(_EXPAND_LOOKS))


def _timed(works: Sequence[Callable[[], None]]) -> float:
    threads = [threading.Thread(target=work) for work in works]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(time.perf_counter() - begin, 1e-9)
