"""What a run shows on standard error besides its text: how the load goes, then where a streamed forward is."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loadstone.cli.progress import draws, shown
from loadstone.events import BytesMoved, Event, Observer, PassProgress, ignore
from loadstone.units import format_rate, format_seconds

if TYPE_CHECKING:
    from rich.console import Console

    from loadstone.plan.values import Plan

# The rate is that of so many seconds.
_WINDOW_S = 2.0


class Screen:
    """Standard error during a run.

    Args:
        console: standard error.
        quiet: draw nothing; also where standard error is no terminal.

    Attributes:
        observer: what the load is given; streamed forwards tell it of their progress later.
    """

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self._console = console
        self._quiet = quiet
        self._draws = draws(console, quiet=quiet)
        self._now: Observer = ignore
        self.observer: Observer = self._tell if self._draws else ignore

    def _tell(self, event: Event) -> None:
        self._now(event)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Show how a load goes."""
        with shown(self._console, quiet=self._quiet) as observer:
            self._now = observer
            try:
                yield
            finally:
                self._now = ignore

    @contextmanager
    def answering(self, plan: Plan | None, say: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
        """Show where the forwards of a streamed model are.

        Args:
            plan: what was followed.
            say: writes text to standard output.

        Yields:
            What writes text: where both go to the terminal, the first of it ends the line, so that they never mix.
        """
        if not self._draws or plan is None or not plan.streams:
            yield say
            return
        from rich.live import Live
        from rich.text import Text

        line = PassLine(plan.prediction.prefill.seconds)
        # Rich would send what is written to standard output to its own console.
        live = Live(
            console=self._console,
            get_renderable=lambda: Text(line.text(), style="dim"),
            refresh_per_second=8,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        share_a_terminal = sys.stdout.isatty()

        def say_below(text: str) -> None:
            line.num_texts += 1
            if share_a_terminal:
                live.stop()
            say(text)

        with live:
            live.refresh()
            self._now = line.tell
            try:
                yield say_below
            finally:
                self._now = ignore


class PassLine:
    """One line about the forward that is under way.

    Args:
        predicted_s: how long the plan gives the forward over the prompt.
        clock: tells the time in seconds.

    Attributes:
        num_texts: pieces of text so far.
    """

    def __init__(self, predicted_s: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.num_texts = 0
        self._predicted_s = predicted_s
        self._clock = clock
        self._begin_s = clock()
        self._moved: deque[tuple[float, int]] = deque()
        self._pass: PassProgress | None = None

    def tell(self, event: Event) -> None:
        """Take note of an event."""
        if isinstance(event, PassProgress):
            self._pass = event
        elif isinstance(event, BytesMoved) and event.stage == "stream":
            now = self._clock()
            self._moved.append((now, event.done_bytes))
            while now - self._moved[0][0] > _WINDOW_S and len(self._moved) > 2:
                self._moved.popleft()

    def text(self) -> str:
        """The line as it is now."""
        at = self._pass
        if at is None:
            return f"reading the prompt{self._first_token(None)}"
        parts = [f"pass {at.number}"]
        if at.unit:
            parts.append(f"{at.unit} ({at.done_units + 1} of {at.num_units} streamed)")
        if rate := self._bytes_per_s():
            parts.append(format_rate(rate))
        if at.seconds:
            parts.append(f"waited {min(1.0, at.waited_s / at.seconds):.0%}")
        return ", ".join(parts) + self._first_token(at)

    def _bytes_per_s(self) -> float:
        if len(self._moved) < 2:
            return 0.0
        (begin, before), (end, after) = self._moved[0], self._moved[-1]
        return (after - before) / (end - begin) if end > begin else 0.0

    def _first_token(self, at: PassProgress | None) -> str:
        """When it comes: as far as this pass has come by now, or as the plan says."""
        if self.num_texts or (at is not None and (at.is_over or at.number > 1)):
            return ""
        spent_s = self._clock() - self._begin_s
        left_s = self._predicted_s - spent_s
        if at is not None and at.done_bytes and at.total_bytes:
            left_s = at.seconds * (at.total_bytes - at.done_bytes) / at.done_bytes
        return f", first token in about {format_seconds(round(left_s))}" if left_s >= 1 else ", first token soon"
