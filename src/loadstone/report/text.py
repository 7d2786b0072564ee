"""What reports that are drawn have in common: facts in two columns, notes, and the drawing as plain text."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 100


def as_text(draw: Callable[[Console], None]) -> str:
    """What `draw` draws, as text that is 100 columns wide."""
    from rich.console import Console

    drawn = io.StringIO()
    draw(Console(file=drawn, width=_WIDTH, color_system=None))
    return "\n".join(line.rstrip() for line in drawn.getvalue().splitlines())


def draw_facts(console: Console, facts: Iterable[tuple[str, str]]) -> None:
    """Names, and what is to be said of each."""
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in facts:
        table.add_row(name, text)
    console.print(table)


def draw_notes(console: Console, notes: Iterable[str]) -> None:
    """What was noticed, a line each."""
    for note in notes:
        console.print(f"[yellow]note[/yellow]  {note}", highlight=False)
