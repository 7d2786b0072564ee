"""How long at least one of several threads was at work."""

from __future__ import annotations

import threading
import time


class Busy:
    """A clock that runs while anybody works."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_working = 0
        self._since_s = self._past_s = 0.0

    @property
    def seconds(self) -> float:
        """How long it ran so far."""
        with self._lock:
            return self._past_s + (time.perf_counter() - self._since_s if self._num_working else 0.0)

    def begin(self) -> None:
        """One more works."""
        with self._lock:
            if not self._num_working:
                self._since_s = time.perf_counter()
            self._num_working += 1

    def end(self) -> None:
        """One less."""
        with self._lock:
            self._num_working -= 1
            if not self._num_working:
                self._past_s += time.perf_counter() - self._since_s
