"""Bring mapped files in from the disk, and into the page tables, before somebody waits for them.

A thread walks the very maps that the parameters are views of: it populates a step, which reads the disk, and then
touches each page of it, which on virtual machines makes the host back the page (measured: up to 5 of a first forward's
6 seconds). So the first forward finds its weights in memory; the time went by while torch was imported.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from loadstone.stream.memory import PAGE_BYTES, Bytes, populate

_STEP_BYTES = 2 << 20


class Prefault:
    """Background population of mapped bytes; harmless to abandon."""

    def __init__(self, ranges: Sequence[Bytes]) -> None:
        self._ranges = tuple(ranges)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="loadstone-prefault", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop after the step that is under way."""
        self._stopped.set()

    def wait(self) -> None:
        """Return when all of it is in."""
        self._thread.join()

    def _work(self) -> None:
        for mapped in self._ranges:
            for begin in range(0, mapped.size, _STEP_BYTES):
                if self._stopped.is_set():
                    return
                step = mapped[begin : begin + _STEP_BYTES]
                populate(step)
                step[::PAGE_BYTES].max()
