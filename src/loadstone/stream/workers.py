"""A few threads that run jobs by priority; what they do can be waited for and given up."""

from __future__ import annotations

import threading
from collections.abc import Callable

from loadstone.stream.crew import Crew

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

    def take(self) -> Job | None:
        """Itself, for whoever runs it; None if it was taken or given up."""
        with self._lock:
            if self._begun or self.is_cancelled:
                return None
            self._begun = True
            return self

    def run(self) -> None:
        """Do it; it must have been taken."""
        try:
            self._work(self)
        except BaseException as error:  # carried to the thread that waits, and raised there
            self._error = error
        self._over.set()


class Workers:
    """The threads; they begin with the first job, end at `close`, and begin anew with the next one.

    Args:
        count: how many.
        name: of the threads.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        # They wait as long as it takes: a thread may own what its jobs go through.
        self._crew = Crew(Job.take, _run, _nothing, name=name, linger_s=None)

    def begin(self, job: Job, *, priority: int = 0) -> Job:
        """Have a job done, and give it back; lower numbers come first, and of equal ones the earlier."""
        self._crew.begin(job, priority, self._count)
        return job

    def close(self) -> None:
        """Give up what waits and what runs, end the threads."""
        self._crew.close(Job.cancel)


def _run(_: Job, job: Job, __: None) -> None:
    job.run()


def _nothing() -> None:
    """What a thread has for its jobs."""
