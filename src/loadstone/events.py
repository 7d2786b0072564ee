"""What happens during a load and a streamed forward, told to whoever asked; only the command line draws it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStarted:
    """A stage of the load begins."""

    stage: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFinished:
    """A stage is over.

    Attributes:
        stage: its name.
        seconds: its wall-clock time.
        detail: what it found, in one line for people.
        lines: the same in full, with real names, for those who want to see how loading works.
    """

    stage: str
    seconds: float
    detail: str
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BytesMoved:
    """Bytes have arrived where they belong.

    Attributes:
        stage: the stage that moves them.
        done_bytes: so far, in this stage.
        total_bytes: in the end.
    """

    stage: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PassProgress:
    """Where a forward of a streamed model is: told when it begins, whenever a unit is needed, and when it is over.

    Attributes:
        number: of the forward, from 1 on.
        unit: what is needed now; "" at the beginning and at the end.
        done_units: streamed units that were needed before.
        num_units: how many there are.
        done_bytes: what was read for this forward and has been waited for.
        total_bytes: what one use of every unit reads.
        seconds: since it began.
        waited_s: of that, waiting for bytes.
        is_over: whether this is its end.
    """

    number: int
    unit: str
    done_units: int
    num_units: int
    done_bytes: int
    total_bytes: int
    seconds: float
    waited_s: float
    is_over: bool = False


Event = StageStarted | StageFinished | BytesMoved | PassProgress
Observer = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The observer of those who do not care."""


class Tracer(Protocol):
    """Who keeps what each thread did, and when."""

    def span(self, kind: str, name: str, begin_s: float, nbytes: int = 0) -> None:
        """Keep that the thread at hand has done something until now.

        Args:
            kind: "read", "wait", "switch", ...
            name: of what it was done with.
            begin_s: when it began, on the clock of `time.perf_counter`.
            nbytes: that it moved.
        """


class _NoTrace:
    """The tracer of those who do not care."""

    def span(self, kind: str, name: str, begin_s: float, nbytes: int = 0) -> None:
        """Keep nothing."""


NO_TRACE: Tracer = _NoTrace()


@dataclass(slots=True)
class StageDetail:
    """The place where a running stage writes down what it found: in a line, and in full."""

    text: str = ""
    lines: tuple[str, ...] = ()


@dataclass(slots=True)
class Recorder:
    """Times stages, keeps them for the report, and passes every event on.

    Attributes:
        observer: who else wants to know.
        finished: the stages that are over, in order.
    """

    observer: Observer = ignore
    finished: list[StageFinished] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[StageDetail]:
        """Time the body as stage `name`; the body sets `.text` on what is yielded."""
        self.observer(StageStarted(stage=name))
        detail = StageDetail()
        begin = time.perf_counter()
        yield detail
        seconds = time.perf_counter() - begin
        event = StageFinished(stage=name, seconds=seconds, detail=detail.text, lines=detail.lines)
        self.finished.append(event)
        self.observer(event)
