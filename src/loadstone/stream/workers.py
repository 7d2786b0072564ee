"""A few threads that run jobs by priority; what they do can be waited for and given up."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable

Work = Callable[["Job"], None]


class Job:
    """Something that a worker does.

    Attributes:
        total_bytes: what it moves.
        is_cancelled: nobody wants it any more; the work may look and stop.
        on_cancel: called when that happens while the work runs.
    """

    def __init__(self, total_bytes: int, work: Work) -> None:
        self.total_bytes = total_bytes
        self.is_cancelled = False
        self.on_cancel: Callable[[], None] | None = None
        self._work = work
        self._begun = False
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._over = threading.Event()

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to wait for."""
        return self._over.is_set()

    def wait(self) -> None:
        """Return when it is done.

        Raises:
            BaseException: what the work raised.
        """
        self._over.wait()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Give it up; returns when the work does not run, and will not."""
        with self._lock:
            self.is_cancelled = True
            if not self._begun:
                self._over.set()
        if (give_up := self.on_cancel) is not None:
            give_up()
        self._over.wait()

    def run(self) -> None:
        """Do it, unless it was given up."""
        with self._lock:
            if self.is_cancelled:
                return
            self._begun = True
        try:
            self._work(self)
        except BaseException as error:  # carried to the thread that waits, and raised there
            self._error = error
        self._over.set()


class Workers:
    """The threads; they begin with the first job, end at `close`, and begin anew with the next one.

    Unlike those of a `Crew` they stay while there is nothing to do, and take turns: a thread may own the buffer that
    its jobs go through, and when one of two has been used the other is next.

    Args:
        count: how many.
        name: of the threads.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._lock = threading.RLock()  # its `with` ends in one step, that of a condition can be interrupted in between
        self._changed = threading.Condition(self._lock)
        self._queue: list[tuple[int, int, Job]] = []
        self._serial = itertools.count()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def begin(self, job: Job, *, priority: int = 0) -> Job:
        """Have a job done, and give it back; lower numbers come first, and of equal ones the earlier."""
        with self._lock:
            self._closed = False
            heapq.heappush(self._queue, (priority, next(self._serial), job))
            if len(self._threads) < self._count:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                thread.start()  # first: one that an interrupt kept from starting must not be counted
                self._threads.append(thread)
            self._changed.notify()
        return job

    def close(self) -> None:
        """Give up what waits, finish what runs, end the threads."""
        with self._lock:
            self._closed = True
            waiting = [job for *_, job in self._queue]
            self._queue.clear()
            threads, self._threads = self._threads, []
            self._changed.notify_all()
        for job in waiting:
            job.cancel()
        for thread in threads:
            thread.join()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            job.run()
            del job  # what it refers to must not live on in a thread that waits

    def _next(self) -> Job | None:
        with self._lock:
            while not self._queue:
                if self._closed:
                    return None
                self._changed.wait()
            return heapq.heappop(self._queue)[2]
