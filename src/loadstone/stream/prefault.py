"""Bring mapped files in from the disk, and into the page tables, before somebody waits for them.

Two threads each populate every other step of the very map that the parameters are views of: the disk is kept busy, and
the page faults of the first forward are paid while something else is waited for (imports, building the module).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from loadstone.stream.memory import Bytes, populate

_STEP_BYTES = 2 << 20
_NUM_THREADS = 2


class Prefault:
    """Background population of mapped bytes; harmless to abandon."""

    def __init__(self, ranges: Sequence[Bytes]) -> None:
        self._ranges = tuple(ranges)
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(index,), name=f"loadstone-prefault-{index}", daemon=True)
            for index in range(_NUM_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop after the step that is under way."""
        self._stopped.set()

    def wait(self) -> None:
        """Return when all of it is in."""
        for thread in self._threads:
            thread.join()

    def _work(self, index: int) -> None:
        for mapped in self._ranges:
            for begin in range(index * _STEP_BYTES, mapped.size, _NUM_THREADS * _STEP_BYTES):
                if self._stopped.is_set():
                    return
                populate(mapped[begin : begin + _STEP_BYTES])
