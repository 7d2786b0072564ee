"""A plan as one page that needs nothing else: bars, the strip with every tensor, timelines, reasons, and tables."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from loadstone.plan.values import DevicePlan, Pass, Placement, Plan, UnitKind
from loadstone.report import plan_svg
from loadstone.report.markup import Markup, element, join
from loadstone.report.plan_parts import (
    Cell,
    bound_by,
    cells_of,
    format_speed,
    moved_by,
    occupancy,
    parts_of,
    passes_of,
    resident_units,
    subject,
    title,
)
from loadstone.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from loadstone.checkpoint.values import TensorInfo

_Value = TypeVar("_Value", bound=Hashable)
TensorsOfUnits = Mapping[str, Sequence["TensorInfo"]]

_PASSES = {
    "prompt": "The prompt, up to the first token",
    "token": "Each further token",
    "pass": "A pass over the input",
}
_HINT = (
    "Point at a layer, or move with the arrow keys, to see its tensors. A click or Enter keeps them open, "
    "Escape lets go."
)


def to_html(plan: Plan, tensors: TensorsOfUnits | None = None, alternatives: Sequence[Plan] = ()) -> str:
    """Draw the plan as a page.

    Args:
        plan: what to draw.
        tensors: what the checkpoint holds of each unit, by the unit's name.
        alternatives: plans that fit instead, or as well.

    Returns:
        The text of one HTML file, which asks for nothing from outside.
    """
    cells = cells_of(plan)
    sections = [
        _header(plan),
        _figures(plan),
        _section("Memory", *map(_device, plan.devices)),
        _strip(plan, cells),
        _section("One pass", *(_timeline(name, one) for name, one in passes_of(plan))),
    ]
    if plan.reasons:
        reasons = (element("li", None, reason) for reason in plan.reasons)
        sections.append(_section("Why", element("ul", {"class": "reasons"}, *reasons)))
    if alternatives:
        sections.append(_section("What else fits", _alternatives(alternatives)))
    sections.append(_tables(plan, cells))
    return Template(_resource("plan_page.html")).substitute(
        title=join([f"Plan: {title(plan)}"]),
        css=_resource("plan_page.css"),
        js=_resource("plan_page.js"),
        definitions=plan_svg.definitions(),
        body=join(sections),
        data=_json(_strip_data(cells, tensors or {})),
    )


def _resource(name: str) -> str:
    return resources.files("loadstone.report").joinpath(name).read_text(encoding="utf-8")


def _json(data: Any) -> str:
    """JSON that is safe inside `<script>`: nothing in it can close the element or open a comment."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _header(plan: Plan) -> Markup:
    return element(
        "header",
        None,
        element("p", {"class": "eyebrow"}, f"Plan for {plan.identity.source}"),
        element("h1", None, plan.identity.architecture or "Weights without a class"),
        element("p", {"class": "muted"}, subject(plan)),
        element("p", None, plan.label) if plan.label else Markup(),
    )


def _figures(plan: Plan) -> Markup:
    prediction = plan.prediction
    first = "First token after" if prediction.generates else "First pass"
    moved = format_bytes(plan.streamed_bytes) if plan.streams else "nothing"
    figures = (
        ("Load", format_seconds(prediction.load_s), bound_by(prediction.load_bound_by)),
        (first, format_seconds(prediction.prefill.seconds), bound_by(prediction.prefill.bound_by)),
        ("Then", format_speed(plan), bound_by(prediction.decode.bound_by)),
        ("Moved in each pass", moved, moved_by(plan)),
    )
    tiles = (
        element("div", None, element("dt", None, name), element("dd", None, value, element("small", None, why)))
        for name, value, why in figures
    )
    basis = (
        "Predicted from rates measured on this machine."
        if prediction.measured
        else "Estimated: the rates are typical ones, nothing was measured on this machine."
    )
    return join([element("dl", {"class": "figures"}, *tiles), element("p", {"class": "note"}, basis)])


def _section(heading: str, *children: Markup) -> Markup:
    name = heading.lower().replace(" ", "-")
    title_element = element("h2", {"id": name}, heading)
    return element("section", {"class": "card", "aria-labelledby": name}, title_element, *children)


def _device(device: DevicePlan) -> Markup:
    name = element("h3", None, device.device, element("span", None, f"  {device.name}"))
    figures = element("span", {"class": "over" if device.free_bytes < 0 else None}, occupancy(device))
    caption = element("figcaption", None, name, figures)
    entries = (
        (plan_svg.PART_CLASSES[part], part.value, format_bytes(nbytes)) for part, nbytes in parts_of(device).items()
    )
    return element("figure", None, caption, plan_svg.memory_bar(device), _legend(entries))


def _legend(entries: Iterable[tuple[str, str, str]]) -> Markup:
    items = (
        element("li", None, plan_svg.swatch(kind), element("span", None, f"{name} ", element("b", None, value)))
        for kind, name, value in entries
    )
    return element("ul", {"class": "legend"}, *items)


def _timeline(name: str, one: Pass) -> Markup:
    end = element("span", None, f"{format_seconds(one.seconds)}, {bound_by(one.bound_by)}")
    caption = element("figcaption", None, element("h3", None, _PASSES[name]), end)
    entries = (("compute", "compute", one.compute_s), ("transfer", "transfer", one.transfer_s))
    legend = _legend((kind, words, format_seconds(seconds)) for kind, words, seconds in entries)
    return element("figure", None, caption, plan_svg.timeline(_PASSES[name], one), legend)


def _strip(plan: Plan, cells: Sequence[Cell]) -> Markup:
    legend = _legend(
        (plan_svg.RESIDENCE_CLASSES[kind], kind.value, words) for kind, words in resident_units(plan.placements)
    )
    header = ("tensor", "stored as", "shape", "size", "file")
    heads = (element("th", {"scope": "col", "class": "number" if name == "size" else None}, name) for name in header)
    table = element("table", None, element("thead", None, element("tr", None, *heads)), element("tbody"))
    scroller = {"class": "scroller", "tabindex": 0, "role": "region", "aria-label": "tensors"}
    panel = element(
        "div",
        {"id": "panel", "hidden": "hidden"},
        element("h3", {"aria-live": "polite"}),
        element("p"),
        element("div", scroller, table),
    )
    hint = element("p", {"id": "hint", "class": "note", "hidden": "hidden"}, _HINT)
    drawing = plan_svg.strip(cells, [f"{_name(cell)}: {_facts(cell)}" for cell in cells])
    return _section("Layers, in execution order", drawing, legend, hint, panel)


def _name(cell: Cell) -> str:
    return f"{len(cell.placements):,} experts of {cell.name}" if cell.kind is UnitKind.EXPERT else cell.name


def _facts(cell: Cell) -> str:
    places = [f"{kind.value} {format_bytes(nbytes)}" for kind, (_, nbytes) in cell.residences.items()]
    return f"{', '.join(places)}; computed on {cell.compute} in {_dtypes(cell.placements)}"


def _dtypes(placements: Sequence[Placement]) -> str:
    return ", ".join(dict.fromkeys(placement.compute_dtype for placement in placements))


def _note(placement: Placement) -> str:
    moved = f", {format_bytes(placement.moved_bytes)} moved in each pass" if placement.moved_bytes else ""
    front = f", the first {format_bytes(placement.front_bytes)} kept on {placement.compute}"
    more = f", {format_bytes(placement.compressed_bytes)} kept there compressed"
    kept = (front if placement.front_bytes else "") + (more if placement.compressed_bytes else "")
    if placement.slice_bytes:
        kept = f", in slices of {format_bytes(placement.slice_bytes)}, two of them at a time"
    if placement.spare_bytes:
        kept = f", {format_bytes(placement.spare_bytes)} of it in RAM too, for when others take its place"
    home = f"{placement.home}, mapped from files" if placement.mapped else placement.home
    return f"{format_bytes(placement.home_bytes)} of {placement.storage_dtype} on {home}{kept}{moved}"


class _Numbered(Generic[_Value]):
    """Values with numbers in the order of their first use: each is written once, however often it is referred to."""

    def __init__(self) -> None:
        self._numbers: dict[_Value, int] = {}

    def number(self, value: _Value) -> int:
        return self._numbers.setdefault(value, len(self._numbers))

    def __iter__(self) -> Iterator[_Value]:
        return iter(self._numbers)


def _strip_data(cells: Sequence[Cell], tensors: TensorsOfUnits) -> dict[str, Any]:
    """What the page's script shows of each cell. A unit's tensors are a flat list of (leaf, form, file) numbers."""
    leaves, notes = _Numbered[str](), _Numbered[str]()
    files, forms = _Numbered[Path](), _Numbered[tuple[str, tuple[int, ...], int]]()
    shown = []
    for cell in cells:
        units = []
        for placement in cell.placements:
            numbers = []
            for info in tensors.get(placement.unit, ()):
                leaf = leaves.number(_leaf(info.name, placement.unit))
                form = forms.number((info.encoding or info.dtype, info.shape, info.nbytes))
                numbers += [leaf, form, files.number(info.file)]
            units.append([placement.unit, notes.number(_note(placement)), numbers])
        shown.append({"title": _name(cell), "facts": _facts(cell), "units": units})
    return {
        "leaves": list(leaves),
        "forms": [
            (kind, " × ".join(f"{n:,}" for n in shape) or "scalar", format_bytes(nbytes))
            for kind, shape, nbytes in forms
        ],
        "files": [file.name for file in files],
        "notes": list(notes),
        "cells": shown,
    }


def _leaf(name: str, unit: str) -> str:
    """`.weight` where the unit's name stands before it, else `=` and the whole name."""
    return name.removeprefix(unit) if name.startswith(f"{unit}.") else f"={name}"


def _table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    head = element("tr", None, *(element("th", {"scope": "col"}, name) for name in header))
    body = (
        element("tr", None, element("th", {"scope": "row"}, row[0]), *(element("td", None, text) for text in row[1:]))
        for row in rows
    )
    table = element(
        "table", None, element("caption", None, caption), element("thead", None, head), element("tbody", None, *body)
    )
    return element("div", {"class": "wide"}, table)


def _alternatives(plans: Sequence[Plan]) -> Markup:
    rows = (
        (
            plan.label or "as asked",
            ", ".join(f"{device.device} {format_bytes(device.peak_bytes)}" for device in plan.devices),
            format_seconds(plan.prediction.prefill.seconds),
            format_speed(plan),
        )
        for plan in plans
    )
    return _table("Instead of the plan above", ("what changes", "peak per device", "first pass", "speed"), rows)


def _tables(plan: Plan, cells: Sequence[Cell]) -> Markup:
    """Everything that is drawn, in words and figures."""
    memory = (
        (
            f"{device.device} {device.name}",
            ", ".join(f"{part.value} {format_bytes(nbytes)}" for part, nbytes in parts_of(device).items()),
            format_bytes(device.peak_bytes),
            format_bytes(device.budget_bytes),
        )
        for device in plan.devices
    )
    passes = (
        (
            _PASSES[name],
            f"{one.tokens:,}",
            format_seconds(one.compute_s),
            format_seconds(one.transfer_s),
            format_seconds(one.seconds),
            bound_by(one.bound_by),
        )
        for name, one in passes_of(plan)
    )
    details = element(
        "details",
        None,
        element("summary", None, "Show the tables"),
        _table("Memory", ("device", "parts", "peak", "budget"), memory),
        _table("Layers", ("unit", "where", "computed on", "dtype", "moved in each pass"), map(_layer_row, cells)),
        _table("Passes", ("pass", "tokens", "compute", "transfer", "time", "limit"), passes),
    )
    return _section("The same in tables", details)


def _layer_row(cell: Cell) -> tuple[str, ...]:
    places = (f"{kind.value} {format_bytes(nbytes)}" for kind, nbytes in cell.bytes_by_residence.items())
    return _name(cell), ", ".join(places), cell.compute, _dtypes(cell.placements), format_bytes(cell.moved_bytes)
