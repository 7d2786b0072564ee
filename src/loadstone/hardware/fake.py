"""Hardware that is not there, for tests: it keeps the order of the real one, and its lateness."""

from __future__ import annotations

import mmap
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray


class FakeLink:
    """The way to a device whose memory is the host's: what is enqueued is done later, in order, by another thread.

    Whoever reads into a slot again before it was taken finds other bytes on the "device", as on a real one.

    Args:
        delay_s: how long each piece of work waits before it is done.
    """

    def __init__(self, delay_s: float = 0.0) -> None:
        self._delay_s = delay_s
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="loadstone-fake-device", daemon=True)
        self._thread.start()
        self.num_locked_bytes = 0

    def locked(self, nbytes: int) -> NDArray[np.uint8]:
        """Ordinary memory."""
        self.num_locked_bytes += nbytes
        return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)

    def fork(self) -> None:
        """What was computed before is there already."""

    def enqueue(self, work: Callable[[], Any]) -> None:
        """Have it done later."""
        self._work.put(work)

    def mark(self) -> Callable[[], None]:
        """A function that returns when all that was enqueued until now is done."""
        reached = threading.Event()
        self._work.put(reached.set)
        return reached.wait  # type: ignore[return-value]

    def join(self) -> None:
        """Wait, because what computes next here is the host, which does not queue.

        Raises:
            BaseException: the first error of what was enqueued, as a device tells errors late.
        """
        self.mark()()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread."""
        self._work.put(None)
        self._thread.join()
        self.num_locked_bytes = 0

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            time.sleep(self._delay_s)
            try:
                work()
            except BaseException as error:  # told at `join`
                self._error = self._error or error
