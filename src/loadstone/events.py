"""What happens during a load, told to whoever asked. Stages emit events; only the command line draws them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


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


Event = StageStarted | StageFinished | BytesMoved
Observer = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The observer of those who do not care."""


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
