"""Progress on standard error: the stage that runs, and a bar in bytes while bytes move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loadstone.events import BytesMoved, Event, Observer, StageStarted, ignore

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


@contextmanager
def shown(console: Console, *, quiet: bool) -> Iterator[Observer]:
    """An observer that draws, while entered.

    Args:
        console: standard error.
        quiet: draw nothing; also where standard error is no terminal.
    """
    if not draws(console, quiet=quiet):
        yield ignore
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn

    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
    )
    with progress:
        yield _Drawer(progress).tell


def draws(console: Console, *, quiet: bool) -> bool:
    """Whether anything is drawn."""
    return console.is_terminal and not quiet


class _Drawer:
    """Turns events into bars."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._stage = progress.add_task("starting", total=None)
        self._bars: dict[str, TaskID] = {}

    def tell(self, event: Event) -> None:
        """Draw one event."""
        if isinstance(event, StageStarted):
            self._progress.update(self._stage, description=event.stage)
        elif isinstance(event, BytesMoved):
            if event.stage not in self._bars:
                self._bars[event.stage] = self._progress.add_task(event.stage, total=event.total_bytes)
            self._progress.update(self._bars[event.stage], completed=event.done_bytes, total=event.total_bytes)
