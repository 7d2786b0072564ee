"""Threads that share work of one kind: it comes in lots, of which the most urgent is worked off first."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import sys
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Lot = TypeVar("Lot")
Item = TypeVar("Item")
Tool = TypeVar("Tool")

# How long a thread without work waits for more before it ends.
_LINGER_S = 1.0


class Crew(Generic[Lot, Item, Tool]):
    """Threads that begin with the first lot, and end by themselves when there is nothing to do.

    Args:
        take: the next item of a lot, which `work` is called with then; None when it has none left.
        work: does one, with what the thread has for it.
        tool: makes that.
        name: of the threads.
        niceness: how much they give way to other threads at least, 0 to 19; where the system knows that of threads.
    """

    def __init__(
        self,
        take: Callable[[Lot], Item | None],
        work: Callable[[Lot, Item, Tool], None],
        tool: Callable[[], Tool],
        *,
        name: str,
        niceness: int = 0,
    ) -> None:
        self._take, self._do, self._tool = take, work, tool
        self._name = name
        self._niceness = niceness
        self._lock = threading.RLock()  # its `with` ends in one step, that of a condition can be interrupted in between
        self._changed = threading.Condition(self._lock)
        self._queue: list[tuple[int, int, Lot]] = []
        self._serial = itertools.count()
        self._threads: set[threading.Thread] = set()
        self._closed = False

    @property
    def threads(self) -> tuple[threading.Thread, ...]:
        """Those there are now."""
        with self._lock:
            return tuple(self._threads)

    def begin(self, lot: Lot, priority: int, num_threads: int) -> None:
        """Have a lot worked off.

        Args:
            lot: it.
            priority: lower numbers come first; of equal ones the earlier.
            num_threads: how many there are to be at least.
        """
        with self._lock:
            heapq.heappush(self._queue, (priority, next(self._serial), lot))
            while len(self._threads) < num_threads:
                thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                thread.start()  # first: one that an interrupt kept from starting must not be counted
                self._threads.add(thread)
            self._changed.notify_all()

    def close(self, cancel: Callable[[Lot], None]) -> None:
        """Cancel every lot and end the threads; whoever begins another has threads again."""
        with self._lock:
            self._closed = True
            lots, threads = [lot for *_, lot in self._queue], tuple(self._threads)
            self._queue.clear()
            self._changed.notify_all()
        for lot in lots:
            cancel(lot)
        for thread in threads:
            thread.join()
        self._closed = False

    def _work(self) -> None:
        if self._niceness:
            give_way(self._niceness)
        tool = self._tool()
        while (job := self._next()) is not None:
            lot, item = job
            self._do(lot, item, tool)
            del lot, item, job  # what was delivered must not live on in a thread that waits

    def _next(self) -> tuple[Lot, Item] | None:
        with self._lock:
            while True:
                while self._queue:
                    lot = self._queue[0][2]
                    if (item := self._take(lot)) is not None:
                        return lot, item
                    heapq.heappop(self._queue)
                if self._closed or (not self._changed.wait(_LINGER_S) and not self._queue):
                    self._threads.discard(threading.current_thread())
                    return None


def give_way(niceness: int) -> None:
    """Have the calling thread give way to others; only Linux knows that of threads, not of processes."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, max(niceness, os.getpriority(os.PRIO_PROCESS, thread)))
