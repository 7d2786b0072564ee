"""How much memory this process has, may have, and had at most."""

from __future__ import annotations

import math
import mmap
import os
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from loadstone.hardware import cgroup
from loadstone.hardware.spec import Limit

# How often memory is looked at: each look costs threads that work on every core a switch, 10 % of a load where it was
# every 10 ms.
_SHORTEST_S, _LONGEST_S, _SHARE = 0.005, 0.05, 0.02
_STATM = Path("/proc/self/statm")
_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentBytes:
    """Resident memory of this process.

    Attributes:
        anonymous_bytes: memory of its own (weights that were decoded, Python, torch).
        file_bytes: mapped files that are in memory (weights used where they lie; the kernel can drop them).
    """

    anonymous_bytes: int
    file_bytes: int


def resident() -> ResidentBytes:
    """Resident memory now. Where the kernel does not tell files apart (macOS), all of it counts as anonymous."""
    try:
        _, total, file_backed, *_ = _STATM.read_bytes().split()
    except OSError:
        import psutil

        return ResidentBytes(anonymous_bytes=psutil.Process().memory_info().rss, file_bytes=0)
    file_pages = int(file_backed)
    return ResidentBytes(
        anonymous_bytes=(int(total) - file_pages) * mmap.PAGESIZE, file_bytes=file_pages * mmap.PAGESIZE
    )


class PeakWatch:
    """Samples resident memory while it is entered; peaks that are shorter than a fiftieth of that time can be missed.

    Attributes:
        peak: the largest of each kind seen.
    """

    def __init__(self) -> None:
        self.peak = resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="loadstone-peak", daemon=True)

    def __enter__(self) -> PeakWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._note()

    def _sample(self) -> None:
        begin = time.perf_counter()
        while not self._done.wait(min(_LONGEST_S, max(_SHORTEST_S, _SHARE * (time.perf_counter() - begin)))):
            self._note()

    def _note(self) -> None:
        now = resident()
        self.peak = ResidentBytes(
            anonymous_bytes=max(self.peak.anonymous_bytes, now.anonymous_bytes),
            file_bytes=max(self.peak.file_bytes, now.file_bytes),
        )


def host_memory(limits: Iterable[Limit] | None = None) -> tuple[int, int]:
    """Total and free bytes that this process may use: the machine's, or what a limit leaves where that is less.

    Args:
        limits: those of `host_limits()`, where they were asked for already.
    """
    total, free = _machine_memory()
    for limit in host_limits() if limits is None else limits:
        total, free = min(total, limit.limit_bytes), min(free, limit.free_bytes)
    return total, free


def host_limits() -> tuple[Limit, ...]:
    """What keeps this process below the memory of the machine: control groups, `ulimit`, strict overcommit."""
    total, free = _machine_memory()
    limits = (*cgroup.memory_limits(), *_process_limits(), *_commit_limit())
    return tuple(limit for limit in limits if limit.limit_bytes < total or limit.free_bytes < free)


def _machine_memory() -> tuple[int, int]:
    meminfo = _table(_MEMINFO)
    if {"MemTotal", "MemAvailable"} <= meminfo.keys():
        return meminfo["MemTotal"], meminfo["MemAvailable"]
    import psutil  # it takes longer to import than everything else here, and Linux does not need it

    memory = psutil.virtual_memory()
    return memory.total, memory.available


def _process_limits() -> Iterator[Limit]:
    """`ulimit`; what counts against it is address space, used or not. No kernel enforces RLIMIT_RSS today."""
    status = _table(_STATUS)
    if "VmSize" not in status:
        return
    import resource

    for what, kind, used in (
        ("ulimit -v", resource.RLIMIT_AS, status["VmSize"]),
        ("ulimit -d", resource.RLIMIT_DATA, status.get("VmData", 0)),
    ):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            yield Limit(what=what, limit_bytes=limit, used_bytes=used)


def _commit_limit() -> Iterator[Limit]:
    """With `vm.overcommit_memory = 2` the kernel refuses what it could not back at once."""
    try:
        strict = _OVERCOMMIT.read_text().strip() == "2"
    except OSError:
        return
    meminfo = _table(_MEMINFO) if strict else {}
    if "CommitLimit" in meminfo:
        yield Limit(
            what="vm.overcommit_memory = 2",
            limit_bytes=meminfo["CommitLimit"],
            used_bytes=meminfo.get("Committed_AS", 0),
        )


def _table(path: Path) -> dict[str, int]:
    """The lines `Name:  123 kB` of a file of /proc, in bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    parts = (line.replace(":", " ").split() for line in lines)
    return {words[0]: int(words[1]) * 1024 for words in parts if len(words) == 3 and words[2] == "kB"}


def num_cores() -> int:
    """The cores this process may keep busy: those it is bound to, or the time its group gives it if that is less."""
    cores, quota = num_bound_cores(), cgroup.cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def num_bound_cores() -> int:
    """The cores this process may run on, however little time it gets there."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def can_show_pages() -> bool:
    """Whether this system can show the same memory at several addresses, as `loadstone.stream.fronts` does."""
    return hasattr(os, "memfd_create")
