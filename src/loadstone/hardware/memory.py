"""How much memory this process has, may have, and had at most."""

from __future__ import annotations

import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import psutil

_SAMPLE_S = 0.01
_STATM = Path("/proc/self/statm")
_CGROUP_FILE = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")


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
        return ResidentBytes(anonymous_bytes=psutil.Process().memory_info().rss, file_bytes=0)
    file_pages = int(file_backed)
    return ResidentBytes(
        anonymous_bytes=(int(total) - file_pages) * mmap.PAGESIZE, file_bytes=file_pages * mmap.PAGESIZE
    )


class PeakWatch:
    """Samples resident memory every 10 ms while it is entered; peaks shorter than that can be missed.

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
        while not self._done.wait(_SAMPLE_S):
            self._note()

    def _note(self) -> None:
        now = resident()
        self.peak = ResidentBytes(
            anonymous_bytes=max(self.peak.anonymous_bytes, now.anonymous_bytes),
            file_bytes=max(self.peak.file_bytes, now.file_bytes),
        )


def host_memory() -> tuple[int, int]:
    """Total and free bytes that this process may use: the machine's, or its container's where that is less."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for limit, used in _cgroup_limits():
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def _cgroup_limits() -> list[tuple[int, int]]:
    """(limit, use that cannot be reclaimed) in bytes of every group this process is in, outermost included."""
    found = []
    for folder, limit_name, usage_name in _cgroup_folders():
        try:
            text = (folder / limit_name).read_text().strip()
            if text == "max":
                continue
            usage = int((folder / usage_name).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        # Page cache counts as use, but goes when memory is needed. (cgroup v1 has the `total_` names, v2 the others.)
        cache = sum(int(stat.get(f"total_{name}", stat.get(name, 0))) for name in ("inactive_file", "active_file"))
        found.append((int(text), max(0, usage - cache)))
    return found


def _cgroup_folders() -> list[tuple[Path, str, str]]:
    folders = []
    try:
        lines = _CGROUP_FILE.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = _CGROUP_ROOT, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = _CGROUP_ROOT / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = base / path.lstrip("/")
        while folder != base.parent:
            folders.append((folder, *names))
            folder = folder.parent
    return folders


def num_cores() -> int:
    """The cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
