"""A plan drawn in the terminal: a bar for each device, the strip of layers, the timeline of a pass, the reasons."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from loadstone.plan.values import DevicePlan, Pass, Plan, UnitKind
from loadstone.report.plan_parts import (
    Cell,
    Part,
    Residence,
    bound_by,
    cells_of,
    format_speed,
    occupancy,
    parts_of,
    passes_of,
    prediction_line,
    resident_units,
    subject,
    title,
)
from loadstone.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.rule import Rule
    from rich.text import Text

# Symbols differ as well as colours, and all of them are in the character sets of old terminals.
_PARTS = {
    Part.LEVEL: ("▄", "bright_black"),
    Part.WEIGHTS: ("█", "blue"),
    Part.MAPPED: ("▓", "cyan"),
    Part.KV_CACHE: ("╬", "magenta"),
    Part.ACTIVATIONS: ("≈", "red"),
    Part.SLOTS: ("≡", "yellow"),
    Part.WORKSPACE: ("+", "green"),
    Part.FREE: ("·", "dim"),
}
_RESIDENCES = {
    Residence.RESIDENT: ("█", "blue"),
    Residence.MAPPED: ("▓", "cyan"),
    Residence.FROM_MEMORY: ("▒", "yellow"),
    Residence.FROM_DISK: ("░", "red"),
}
_MIXED = ("▌", "yellow")
_COMPUTE, _TRANSFER, _BOTH, _IDLE = ("▀", "blue"), ("▄", "yellow"), ("█", "green"), ("·", "dim")
_DEVICES = "0123456789abcdefghijklmnopqrstuvwxyz"
_LABEL = 9
_WIDEST_BAR = 96


def render(plan: Plan, console: Console) -> None:
    """Draw the plan.

    Args:
        plan: what to draw.
        console: where; its width is respected, from 60 columns on.
    """
    from rich.text import Text

    console.print(Text(title(plan), style="bold"))
    console.print(Text(subject(plan)))
    if plan.label:
        console.print(Text(plan.label, style="green"))
    console.print(_rule("memory, a bar for each device's budget"))
    bar_width = _bar_width(console.width, map(_device_end, plan.devices))
    for device in plan.devices:
        console.print(*_device_lines(device, bar_width, console.width), sep="\n")
    console.print(_rule("layers, in execution order"))
    console.print(*_strip_lines(plan, console.width), sep="\n")
    console.print(_rule("one pass, compute against transfer"))
    bar_width = _bar_width(console.width - _LABEL, (_pass_end(one) for _, one in passes_of(plan)))
    for name, one in passes_of(plan):
        console.print(*_pass_lines(name, one, bar_width, console.width), sep="\n")
    console.print(Text.assemble(("predicted: ", "bold"), prediction_line(plan)))
    if plan.reasons:
        console.print(_rule("why"))
        _render_reasons(plan.reasons, console)


def _rule(words: str) -> Rule:
    from rich.rule import Rule
    from rich.text import Text

    # Rich would look for emoji in a plain string, and import the list of them.
    return Rule(Text(words, style="rule.text"), align="left", style="dim")


def render_alternatives(plans: Sequence[Plan], console: Console) -> None:
    """Draw what fits instead of what was asked for.

    Args:
        plans: the alternatives, each with its label.
        console: where; its width is respected.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("what changes", overflow="fold", ratio=3)
    table.add_column("peak per device", overflow="fold", ratio=4)
    table.add_column("speed", justify="right", no_wrap=True)
    for plan in plans:
        peaks = ", ".join(f"{device.device} {format_bytes(device.peak_bytes)}" for device in plan.devices)
        table.add_row(Text(plan.label or "as asked"), Text(peaks), format_speed(plan))
    console.print(table)


def _bar_width(width: int, ends: Iterable[str]) -> int:
    """The same for bars that stand below each other, with room for what is written at their ends."""
    return max(8, min(_WIDEST_BAR, width - max(map(len, ends), default=0)))


def _device_end(device: DevicePlan) -> str:
    return f" {occupancy(device)}"


def _pass_end(one: Pass) -> str:
    return f" {format_seconds(one.seconds)}, {bound_by(one.bound_by)}"


def _device_lines(device: DevicePlan, bar_width: int, width: int) -> Iterator[Text]:
    from rich.text import Text

    parts = parts_of(device)
    yield Text.assemble((device.device, "bold"), f"  {device.name}" if device.name != device.device else "")
    bar = Text()
    for part, cells in zip(parts, _shares(list(parts.values()), bar_width), strict=True):
        symbol, style = _PARTS[part]
        bar.append(symbol * cells, style=style)
    yield bar.append(_device_end(device), style="red" if device.free_bytes < 0 else "")
    entries = [(_PARTS[part], f"{part.value} {format_bytes(nbytes)}") for part, nbytes in parts.items()]
    yield from _legend(entries, width)


def _shares(amounts: Sequence[float], width: int) -> list[int]:
    """Cut `width` cells in proportion to positive amounts; each gets one at least, and together they get all."""
    spare = width - len(amounts)
    total = sum(amounts)
    exact = [spare * amount / total for amount in amounts]
    cells = [1 + int(share) for share in exact]
    short_of = sorted(range(len(amounts)), key=lambda index: int(exact[index]) - exact[index])
    for index in short_of[: width - sum(cells)]:
        cells[index] += 1
    return cells


def _legend(entries: Iterable[tuple[tuple[str, str], str]], width: int) -> Iterator[Text]:
    """Symbols with what they mean, as many to a line as fit; none is torn apart."""
    from rich.text import Text

    line = Text()
    for (symbol, style), words in entries:
        entry = Text.assemble((symbol, style), f" {words}")
        if line and len(line) + 3 + len(entry) > width:
            yield line
            line = Text()
        line.append("   " if line else "").append_text(entry)
    if line:
        yield line


def _strip_lines(plan: Plan, width: int) -> Iterator[Text]:
    from rich.text import Text

    cells = cells_of(plan)
    columns = max((cell.column for cell in cells), default=-1) + 1
    devices = _device_symbols(cell.compute for cell in cells)
    room = width - _LABEL
    cell_width = max(1, min(3, room // max(1, columns)))
    per_line = room // cell_width
    for start in range(0, columns, per_line):
        shown = [cell for cell in cells if start <= cell.column < start + per_line]
        layers = {cell.column: cell for cell in shown if cell.kind is not UnitKind.EXPERT}
        experts = {cell.column: cell for cell in shown if cell.kind is UnitKind.EXPERT}
        span = range(start, min(start + per_line, columns))
        yield Text(" " * _LABEL + _scale({**experts, **layers}, span, cell_width), style="dim")
        yield _row("layers", layers, span, cell_width)
        if experts:
            yield _row("experts", experts, span, cell_width)
        if len(devices) > 1:
            on = {cell.column: devices[cell.compute] for cell in shown}
            yield Text("on".ljust(_LABEL) + "".join(on[column].ljust(cell_width) for column in span))
    entries = [(_RESIDENCES[kind], f"{kind.value}: {words}") for kind, words in resident_units(plan.placements)]
    if any(len(cell.bytes_by_residence) > 1 for cell in cells):
        entries.append((_MIXED, "parts here, parts there"))
    yield from _legend(entries, width)
    if len(devices) > 1:
        yield from _legend([((symbol, "bold"), f"computes on {device}") for device, symbol in devices.items()], width)


def _device_symbols(devices: Iterable[str]) -> dict[str, str]:
    """A character for each: the number of `cuda:1`, the letter of `cpu`, or the next that is free."""
    symbols: dict[str, str] = {}
    for device in dict.fromkeys(devices):
        candidates = (*device.partition(":")[2][-1:], device[0], *_DEVICES)
        symbols[device] = next((symbol for symbol in candidates if symbol not in symbols.values()), "?")
    return symbols


def _row(label: str, cells: dict[int, Cell], span: range, cell_width: int) -> Text:
    from rich.text import Text

    row = Text(label.ljust(_LABEL))
    for column in span:
        if column not in cells:
            row.append(" " * cell_width)
            continue
        kinds = list(cells[column].residences)
        symbol, style = _RESIDENCES[kinds[0]] if len(kinds) == 1 else _MIXED
        row.append(symbol * cell_width, style=style)
    return row


def _scale(cells: dict[int, Cell], span: range, cell_width: int) -> str:
    """The numbers of every tenth block and a letter or more for what is no block, where there is room."""
    scale = ""
    for place, column in enumerate(span):
        label, is_block = cells[column].label, cells[column].label.isdecimal()
        if is_block and int(label) % 10 == 0 and len(scale) <= place * cell_width:
            scale = scale.ljust(place * cell_width) + label
        elif not is_block:
            scale = scale[: place * cell_width].ljust(place * cell_width) + (
                label if len(label) <= cell_width else label[:1]
            )
    return scale


def _pass_lines(name: str, one: Pass, bar_width: int, width: int) -> Iterator[Text]:
    from rich.text import Text

    scale = max(one.seconds, one.compute_s, one.transfer_s)
    compute, transfer = (round(bar_width * part / scale) if scale else 0 for part in (one.compute_s, one.transfer_s))
    both, longer = min(compute, transfer), max(compute, transfer)
    line = Text(name.ljust(_LABEL))
    for (symbol, style), cells in (
        (_BOTH, both),
        (_COMPUTE if compute > transfer else _TRANSFER, longer - both),
        (_IDLE, bar_width - longer),
    ):
        line.append(symbol * cells, style=style)
    yield line.append(_pass_end(one))
    entries = [(_COMPUTE, f"compute {format_seconds(one.compute_s)}")]
    if one.transfer_s:
        entries.append((_TRANSFER, f"transfer {format_seconds(one.transfer_s)}"))
    if both:
        entries.append((_BOTH, "both"))
    for line in _legend(entries, width - _LABEL):
        yield Text(" " * _LABEL).append_text(line)


def _render_reasons(reasons: Iterable[str], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for reason in reasons:
        table.add_row(Text("-"), Text(reason))
    console.print(table)
