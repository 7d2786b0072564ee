"""The drawings of a plan's page as SVG: bars of memory, the strip of layers, timelines. Widths are in per cent.

Colours and patterns are classes, which the page's style sheet gives a meaning, light and dark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from loadstone.plan.values import DevicePlan, Pass, UnitKind
from loadstone.report.markup import Markup, element, join
from loadstone.report.plan_parts import Cell, Part, Residence, bound_by, occupancy, parts_of
from loadstone.units import format_bytes, format_seconds

PART_CLASSES = {
    Part.LEVEL: "level",
    Part.WEIGHTS: "weights",
    Part.MAPPED: "mapped",
    Part.KV_CACHE: "kv",
    Part.ACTIVATIONS: "activations",
    Part.SLOTS: "slots",
    Part.WORKSPACE: "workspace",
    Part.FREE: "free",
}
RESIDENCE_CLASSES = {
    Residence.RESIDENT: "weights",
    Residence.MAPPED: "mapped",
    Residence.FROM_MEMORY: "ram",
    Residence.FROM_DISK: "disk",
}
# A longer strip is cut into lines of equal length: 28 places stay wide enough to point at on a small screen.
_MOST_PER_LINE = 32
_LABEL_HEIGHT, _CELL_HEIGHT, _DEVICE_HEIGHT, _LINE_GAP = 18, 38, 24, 12
_LANE_HEIGHT = 16


def definitions() -> Markup:
    """The patterns that tell streamed from resident without colour."""
    hatch = _pattern("hatch", "ram", element("path", {"d": "M-2,2 l4,-4 M0,8 l8,-8 M6,10 l4,-4"}))
    dots = _pattern("dots", "disk", element("path", {"d": "M2,2 h.01 M6,6 h.01", "class": "dot"}))
    return element("svg", {"class": "definitions", "aria-hidden": "true"}, element("defs", None, hatch, dots))


def _pattern(name: str, ground: str, figure: Markup) -> Markup:
    attributes = {"id": name, "width": 8, "height": 8, "patternUnits": "userSpaceOnUse"}
    return element(
        "pattern", attributes, element("rect", {"width": 8, "height": 8, "class": f"{ground}-ground"}), figure
    )


def swatch(kind: str) -> Markup:
    """The sample of a legend."""
    sample = element("rect", {"class": kind, "width": 14, "height": 14, "rx": 3})
    return element("svg", {"class": "swatch", "aria-hidden": "true", "width": 14, "height": 14}, sample)


def memory_bar(device: DevicePlan) -> Markup:
    """The budget of a device, cut into its parts."""
    parts = parts_of(device)
    whole = sum(parts.values())
    pieces, listed, start = [], [], 0.0
    for part, nbytes in parts.items():
        share = 100 * nbytes / whole
        words = f"{part.value} {format_bytes(nbytes)}"
        text = next((text for text in (words, part.value) if share >= 1.1 * len(text)), None)
        pieces.append(_piece(start, share, PART_CLASSES[part], words, text))
        listed.append(words)
        start += share
    if device.free_bytes < 0:
        budget = f"{100 * device.budget_bytes / whole:.3f}%"
        pieces.append(element("line", {"class": "budget", "x1": budget, "x2": budget, "y1": 0, "y2": "100%"}))
    return _drawing("bar", f"{device.device}: {occupancy(device)}: {', '.join(listed)}", pieces)


def timeline(name: str, one: Pass) -> Markup:
    """One pass: computing above, moving below, on the scale of the longer."""
    scale = max(one.seconds, one.compute_s, one.transfer_s) or 1.0
    lanes = []
    for index, (kind, seconds) in enumerate((("compute", one.compute_s), ("transfer", one.transfer_s))):
        text = f"{kind}: {format_seconds(seconds)}"
        share = f"{100 * seconds / scale:.3f}%"
        lane = {"x": 0, "y": index * _LANE_HEIGHT, "height": _LANE_HEIGHT - 2}
        lanes.append(element("rect", {**lane, "width": "100%", "class": "track"}))
        tooltip = element("title", None, text)
        lanes.append(element("g", None, tooltip, element("rect", {**lane, "width": share, "class": kind})))
    words = (
        f"{name}: {format_seconds(one.seconds)}, {bound_by(one.bound_by)}; compute {format_seconds(one.compute_s)}, "
        f"transfer {format_seconds(one.transfer_s)}"
    )
    return _drawing("timeline", words, lanes)


def _drawing(kind: str, words: str, children: Sequence[Markup]) -> Markup:
    attributes = {"class": kind, "role": "img", "aria-label": words}
    return element("svg", attributes, element("title", None, words), *children)


def _piece(start: float, share: float, kind: str, tooltip: str, text: str | None) -> Markup:
    """A part of a bar: an `<svg>` of its own, which cuts off text that a narrow screen has no room for."""
    label = element("text", {"x": 10, "y": "50%", "dy": ".35em", "class": f"on-{kind}"}, text) if text else Markup()
    return element(
        "svg",
        {"x": f"{start:.3f}%", "width": f"{share:.3f}%", "height": "100%"},
        element("title", None, tooltip),
        element("rect", {"width": "100%", "height": "100%", "class": f"piece {kind}"}),
        label,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grid:
    """Where the cells of the strip lie: heights in pixels, widths in per cent.

    Attributes:
        lines: how many times the strip is cut.
        per_line: the places of a line.
        rows: 2 where there are experts.
        has_lane: whether the devices are written below.
    """

    lines: int
    per_line: int
    rows: int
    has_lane: bool

    @property
    def line_height(self) -> int:
        lane = _DEVICE_HEIGHT if self.has_lane else 0
        return _LABEL_HEIGHT + self.rows * _CELL_HEIGHT + lane + _LINE_GAP

    def box(self, place: int, num_places: int, top: int, height: int) -> dict[str, object]:
        """Neighbouring places of one line."""
        x, width = (f"{100 * places / self.per_line:.3f}%" for places in (place, num_places))
        return {"x": x, "y": top, "width": width, "height": height}


def _grid(cells: Sequence[Cell]) -> _Grid:
    columns = max((cell.column for cell in cells), default=0) + 1
    lines = -(-columns // _MOST_PER_LINE)
    return _Grid(
        lines=lines,
        per_line=-(-columns // lines),
        rows=2 if any(cell.kind is UnitKind.EXPERT for cell in cells) else 1,
        has_lane=len({cell.compute for cell in cells}) > 1,
    )


def strip(cells: Sequence[Cell], descriptions: Sequence[str]) -> Markup:
    """The layers in execution order, those of a line beside each other; experts are a second row.

    Args:
        cells: of the whole plan.
        descriptions: of each cell, for its label and tooltip.

    Returns:
        A listbox: its options are focusable one at a time (the page's script moves the focus).
    """
    grid = _grid(cells)
    drawn = []
    for index, (cell, words) in enumerate(zip(cells, descriptions, strict=True)):
        line, place = divmod(cell.column, grid.per_line)
        row, top = int(cell.kind is UnitKind.EXPERT), line * grid.line_height
        if row == 0 or cells[index - 1].column != cell.column:
            drawn.append(_cell_label(cell, grid.box(place, 1, top, _LABEL_HEIGHT)))
        box = grid.box(place, 1, top + _LABEL_HEIGHT + row * _CELL_HEIGHT, _CELL_HEIGHT)
        drawn.append(_option(index, cell, words, box))
    if grid.has_lane:
        drawn += [_device_lane(cells, grid, line) for line in range(grid.lines)]
    attributes = {
        "id": "strip",
        "class": "strip",
        "role": "listbox",
        "aria-label": "Layers in execution order; arrow keys move, Enter keeps the details open",
        "aria-orientation": "horizontal",
        "height": grid.lines * grid.line_height - _LINE_GAP,
        "data-per-line": grid.per_line,
    }
    return element("svg", attributes, *drawn)


def _cell_label(cell: Cell, box: Mapping[str, object]) -> Markup:
    kind = "minor word"
    if cell.label.isdecimal():
        kind = "minor" if int(cell.label) % 5 else "major"
    text = element("text", {"x": "50%", "y": 12, "class": kind}, cell.label)
    return element("svg", {**box, "class": "label", "aria-hidden": "true"}, text)


def _option(index: int, cell: Cell, words: str, box: Mapping[str, object]) -> Markup:
    sizes = cell.bytes_by_residence
    # A unit without bytes is drawn like the others.
    whole = sum(sizes.values()) or len(sizes)
    portions, bottom = [], 100.0
    for kind, nbytes in sizes.items():
        share = 100 * (nbytes or int(whole == len(sizes))) / whole
        bottom -= share
        area = {"y": f"{max(0.0, bottom):.3f}%", "width": "100%", "height": f"{share:.3f}%"}
        portions.append(element("rect", {**area, "class": RESIDENCE_CLASSES[kind]}))
    edge = {"width": "100%", "height": "100%"}
    gap, ring = (element("rect", {**edge, "class": kind}) for kind in ("gap", "ring"))
    attributes = {
        "role": "option",
        "id": f"cell-{index}",
        "class": "cell",
        "tabindex": "0" if index == 0 else "-1",
        "aria-selected": "false",
        "aria-label": words,
        "data-column": cell.column,
        "data-row": int(cell.kind is UnitKind.EXPERT),
    }
    return element("g", attributes, element("title", None, words), element("svg", box, *portions, gap, ring))


def _device_lane(cells: Sequence[Cell], grid: _Grid, line: int) -> Markup:
    """Which device computes, as brackets under runs of cells."""
    top = line * grid.line_height + _LABEL_HEIGHT + grid.rows * _CELL_HEIGHT
    by_column = {cell.column: cell.compute for cell in cells if cell.column // grid.per_line == line}
    runs = []
    for device, run in groupby(sorted(by_column.items()), key=lambda item: item[1]):
        places = [column % grid.per_line for column, _ in run]
        has_room = 100 * len(places) / grid.per_line >= 1.1 * len(device)
        text = element("text", {"x": "50%", "y": 19}, device) if has_room else Markup()
        bracket = element("line", {"x1": 4, "x2": "100%", "y1": 4, "y2": 4})
        box = grid.box(places[0], len(places), top, _DEVICE_HEIGHT)
        runs.append(element("svg", box, element("title", None, f"computed on {device}"), bracket, text))
    return element("g", {"class": "lane", "aria-hidden": "true"}, join(runs))
