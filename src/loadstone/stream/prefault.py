"""Bring mapped files in from the disk, and into the page tables, before somebody waits for them.

A few threads walk the very maps that the parameters are views of: each populates a step, which reads the disk, and then
has each page of it touched, which on virtual machines makes the host back the page (left to the forward, that took up
to 5 of its 6 seconds). Where torch has to be imported, the time goes by meanwhile; what is left is waited for at the
end of the load: a forward that runs after its weights asks for pages here and there, and took up to 4.6 s where waiting
first takes 2.7 in all.

Where torch is imported already, two things differ (3.1 GB, cold: 1.8 s instead of 3.3). One more thread asks the
kernel to read far ahead, which keeps the disk busy, and the imports from it where there are some. And what the page
cache holds is left to the forward: faulting it in from other threads takes as long, and from the same cores. It is
told apart before anything is read, in steps: a system that reclaims pages while there is room leaves holes in what is
cached (one page that was gone cost 0.15 s for all of 3.1 GB).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from loadstone.errors import TruncatedFile
from loadstone.events import BytesMoved, Observer
from loadstone.hardware.memory import num_cores
from loadstone.hardware.pages import Bytes
from loadstone.stream.memory import TOUCH_BYTES, Toucher, is_cached, will_need

_MAX_THREADS = 4
_TELL_BYTES = 64 << 20
# Each question costs 3 µs; what is missed is read when it is used.
_NUM_STEP_PROBES = 2


Wait = Callable[[], None]


def at_once() -> None:
    """Nothing is waited for."""


class Prefault:
    """Background population of mapped bytes; harmless to abandon.

    Args:
        ranges: stretches of mapped files, in the order they are wanted.
        beside_imports: torch is being imported meanwhile.
        after: waited for first, where it is.
        observer: is told about bytes.

    Attributes:
        done_bytes: brought in so far.
        seconds: how long that took, what ran meanwhile included.
    """

    def __init__(
        self, ranges: Sequence[tuple[Path, Bytes]], *, beside_imports: bool, after: Wait = at_once, observer: Observer
    ) -> None:
        self.done_bytes = 0
        self.seconds = 0.0
        self._ranges = list(ranges if beside_imports else _not_cached(ranges))
        self._total_bytes = sum(mapped.size for _, mapped in self._ranges)
        self._start = time.perf_counter()
        self._observer = observer
        self._after = after if beside_imports else at_once
        self._steps = _steps(self._ranges)
        self._cut_short: Path | None = None
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        work = self._shares(beside_imports=beside_imports) if self._ranges else []
        self._threads = [
            threading.Thread(target=target, name=f"loadstone-prefault-{number}", daemon=True)
            for number, target in enumerate(work)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop after the steps that are under way."""
        self._stopped.set()

    def wait(self) -> None:
        """Return when all of it is in.

        Raises:
            TruncatedFile: a file was cut short meanwhile.
        """
        for thread in self._threads:
            thread.join()
        if self._cut_short is not None:
            raise TruncatedFile(
                f"{self._cut_short}: expected the file as it was when it was opened, found that it was cut short "
                "while it was loaded; copy or download it again."
            )

    def _shares(self, *, beside_imports: bool) -> list[Wait]:
        """What each thread does."""
        work: list[Wait] = [self._work] * _num_threads(beside_imports=beside_imports)
        return work if beside_imports else [*work, self._read_ahead]

    def _work(self) -> None:
        self._after()
        with Toucher() as toucher:
            while (step := self._next()) is not None:
                path, stretch = step
                if not toucher.touch(stretch):
                    self._cut_short = path
                    self.stop()
                    return
                self._tell(stretch.size)

    def _next(self) -> tuple[Path, Bytes] | None:
        with self._lock:
            return None if self._stopped.is_set() else next(self._steps, None)

    def _read_ahead(self) -> None:
        for _, stretch in _steps(self._ranges):
            if self._stopped.is_set():
                return
            will_need(stretch)

    def _tell(self, nbytes: int) -> None:
        with self._lock:
            before, self.done_bytes = self.done_bytes, self.done_bytes + nbytes
            self.seconds = time.perf_counter() - self._start
            event = BytesMoved(stage="page in", done_bytes=self.done_bytes, total_bytes=self._total_bytes)
        if before // _TELL_BYTES != event.done_bytes // _TELL_BYTES or event.done_bytes == self._total_bytes:
            self._observer(event)


def _num_threads(*, beside_imports: bool) -> int:
    """How many threads bring pages in. The imports run in one, and what takes their core or their disk slows them."""
    if beside_imports:
        return max(1, min(_MAX_THREADS, num_cores() - 1))
    return min(_MAX_THREADS, max(2, num_cores()))


def _not_cached(ranges: Iterable[tuple[Path, Bytes]]) -> Iterator[tuple[Path, Bytes]]:
    """The steps of ranges that the page cache does not hold."""
    for path, stretch in _steps([(path, mapped) for path, mapped in ranges if not is_cached(mapped)]):
        if not is_cached(stretch, _NUM_STEP_PROBES):
            yield path, stretch


def _steps(ranges: Sequence[tuple[Path, Bytes]]) -> Iterator[tuple[Path, Bytes]]:
    for path, mapped in ranges:
        for begin in range(0, mapped.size, TOUCH_BYTES):
            yield path, mapped[begin : begin + TOUCH_BYTES]
