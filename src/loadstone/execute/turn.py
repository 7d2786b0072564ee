"""Whose turn it is to compute with a streamed model."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from types import CodeType

from torch import nn

# How long a thread waits before it looks whether the other one still computes.
_PATIENCE_S = 0.5


class Turn:
    """A lock that its thread may take again, and that is not lost with a forward that an interrupt has ended.

    Threads queue for it: one that computes on and on does not keep the others out.

    Hooks end with the forward they belong to, but not when Ctrl-C ends it: then nobody gives the turn back. So whoever
    waits looks whether the thread that has it is still inside a module's forward.

    Args:
        on_lost: called by the thread that takes the turn from one whose forward ended without a word.
        scopes: the code of functions that take the turn with `with`, outside of any forward too.
    """

    def __init__(self, on_lost: Callable[[], None], scopes: Iterable[CodeType]) -> None:
        self._on_lost = on_lost
        self._inside = {nn.Module._call_impl.__code__, *scopes}
        self._lock = threading.RLock()  # its `with` ends in one step, that of a condition can be interrupted in between
        self._changed = threading.Condition(self._lock)
        self._door = threading.Lock()
        self._owner = 0
        self._depth = 0

    @property
    def is_mine(self) -> bool:
        """Whether this thread has it."""
        return self._owner == threading.get_ident()

    def acquire(self) -> None:
        """Wait for it."""
        if self.is_mine:
            self._take()
            return
        with self._door:
            self._take()

    def try_acquire(self) -> bool:
        """Take it if nobody else has it."""
        me = threading.get_ident()
        with self._lock:
            if self._owner not in (0, me):
                return False
            self._owner = me
            self._depth += 1
            return True

    def _take(self) -> None:
        me, was_lost = threading.get_ident(), False
        with self._lock:
            while self._owner not in (0, me):
                if not self._changed.wait(_PATIENCE_S) and self._is_lost():
                    self._owner = self._depth = 0
                    was_lost = True
            # One store: an interrupt finds it taken or free.
            self._owner = me
            self._depth += 1
        if was_lost:
            self._on_lost()

    def release(self) -> None:
        """Give it back, once for each time that it was taken."""
        with self._lock:
            self._depth -= 1
            if self._depth <= 0:
                self._free()

    def drop(self) -> None:
        """Give it back at once, however often it was taken."""
        with self._lock:
            self._free()

    def _free(self) -> None:
        self._depth = 0
        self._owner = 0
        self._changed.notify()

    def _is_lost(self) -> bool:
        """Whether its thread is in no forward any more; one that has ended is not."""
        frame = sys._current_frames().get(self._owner)
        while frame is not None:
            if frame.f_code in self._inside:
                return False
            frame = frame.f_back
        return True

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()
