"""Hardware that is not there, for tests: it keeps the order of the real one, and its lateness."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from loadstone.hardware.pages import Bytes, anonymous


class _Lane:
    """A stream: what is put in is done later, in order, by a thread of its own."""

    def __init__(self, name: str, delay_s: Callable[[], float]) -> None:
        self._delay_s = delay_s
        self._work: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], Any], *, late: bool = True) -> None:
        """Have it done; `late` after the usual delay."""
        if late:
            self._work.put(lambda: time.sleep(self._delay_s()))
        self._work.put(work)

    def point(self) -> threading.Event:
        """Set when all that was put in until now is done."""
        reached = threading.Event()
        self._work.put(reached.set)
        return reached

    def close(self) -> None:
        """Finish, and end the thread."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except BaseException as error:  # told when somebody waits
                self.error = self.error or error


class FakeMoved:
    """A point in the copies of a fake device."""

    def __init__(self, point: threading.Event, link: FakeLink) -> None:
        self._point = point
        self._link = link

    def is_over(self) -> bool:
        """Whether all before it is done."""
        return self._point.is_set()

    def wait(self) -> None:
        """Return when it is."""
        self._point.wait()

    def join(self) -> None:
        """What computes from now on waits for it."""
        self._link.hold_computation(self._point)


class FakeLink:
    """The way to a device whose memory is the host's: what is enqueued is done later, in order, by another thread.

    Whoever reads into a slot again before it was taken finds other bytes on the "device", as on a real one.

    Args:
        delay_s: how long each piece of work waits before it is done, or a function that tells anew each time.
        compute_delay_s: the same for what is given to `compute`, which then runs in a stream of its own; None where
            the host itself computes, at once.
    """

    def __init__(
        self, delay_s: float | Callable[[], float] = 0.0, compute_delay_s: float | Callable[[], float] | None = None
    ) -> None:
        self._copies = _Lane("loadstone-fake-device", _as_function(delay_s))
        self._computation = None
        if compute_delay_s is not None:
            self._computation = _Lane("loadstone-fake-compute", _as_function(compute_delay_s))
        self.num_locked_bytes = 0

    def locked(self, nbytes: int) -> Bytes:
        """Ordinary memory."""
        self.num_locked_bytes += nbytes
        return anonymous(nbytes)

    def unlock(self, memory: Bytes) -> None:
        """It is ordinary again."""
        self.num_locked_bytes -= memory.nbytes

    def fork(self) -> None:
        """What is enqueued from now on waits for what was given to `compute` until now."""
        self.computed()()

    def enqueue(self, work: Callable[[], Any]) -> None:
        """Have it done later."""
        self._copies.put(work)

    def mark(self) -> Callable[[], None]:
        """A function that returns when all that was enqueued until now is done."""
        return self._copies.point().wait  # type: ignore[return-value]

    def join(self) -> None:
        """What computes from now on waits for all that was enqueued.

        Raises:
            BaseException: the first error of what was enqueued, as a device tells errors late.
        """
        self.moved().join()

    def moved(self) -> FakeMoved:
        """The point that the copies have come to when all that was enqueued until now is done."""
        return FakeMoved(self._copies.point(), self)

    def computed(self) -> Callable[[], None]:
        """A function after whose call what is enqueued waits for what was given to `compute` until now."""
        if self._computation is None:
            return lambda: None
        point = self._computation.point()
        return lambda: self._copies.put(point.wait, late=False)

    def compute(self, work: Callable[[], Any]) -> None:
        """Have it done in the stream that computes; returns before it is."""
        if self._computation is None:
            work()
        else:
            self._computation.put(work)

    def hold_computation(self, point: threading.Event) -> None:
        """What computes from now on waits for a point: the host, which does not queue, or the stream that does.

        Raises:
            BaseException: the first error of what was enqueued.
        """
        if self._computation is None:
            point.wait()
        else:
            self._computation.put(point.wait, late=False)
        self._raise()

    def synchronize(self) -> None:
        """Return when the device has nothing left to do.

        Raises:
            BaseException: the first error of what it did.
        """
        self._copies.point().wait()
        if self._computation is not None:
            self._computation.point().wait()
        self._raise()

    def close(self) -> None:
        """End the threads."""
        if self._computation is not None:
            self._computation.close()
        self._copies.close()
        self.num_locked_bytes = 0

    def _raise(self) -> None:
        for lane in (self._copies, self._computation):
            if lane is not None and lane.error is not None:
                raise lane.error


def _as_function(delay_s: float | Callable[[], float]) -> Callable[[], float]:
    return delay_s if callable(delay_s) else lambda: delay_s
