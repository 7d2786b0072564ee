"""A plan as a plain table: what is placed alike in one row, then devices, then times."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from loadstone.plan.values import HOST, DevicePlan, Pass, Placement, Plan
from loadstone.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.console import Console

_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def render(plan: Plan, console: Console) -> None:
    """Draw a plan.

    Args:
        plan: the plan.
        console: where to.
    """
    from rich.table import Table
    from rich.text import Text  # plain text: what is looked up for markup and emoji costs 20 ms

    run = plan.run
    console.print(Text(f"{plan.identity.architecture or 'checkpoint'} in {plan.identity.source}", style="bold"))
    console.print(
        Text(f"context {run.context:,} tokens, batch {run.batch}, prompt {run.prompt_tokens:,} tokens, {plan.dtype}")
    )
    for line in plan.reasons:
        console.print(Text(f"  {line}", style="dim"))
    units = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("unit", "home", "computes on"):
        units.add_column(Text(heading))
    for heading in ("size", "moved per pass"):
        units.add_column(Text(heading), justify="right")
    for row in _rows(plan.placements):
        units.add_row(*map(Text, row))
    console.print(units)
    devices = Table(box=None, pad_edge=False, header_style="dim")
    devices.add_column(Text("device"))
    for heading in ("peak", "budget", "weights", "KV cache", "activations", "slots", "other"):
        devices.add_column(Text(heading), justify="right")
    for device in plan.devices:
        devices.add_row(*map(Text, _device_row(device)))
    console.print(devices)
    for line in _times(plan):
        console.print(Text(line))


def _rows(placements: Iterable[Placement]) -> Iterable[tuple[str, str, str, str, str]]:
    """One row for units that differ in their numbers only and are placed alike."""
    alike: dict[tuple[str, str, str], list[Placement]] = {}
    for one in placements:
        home = f"{one.home} (mapped)" if one.mapped and one.home == HOST else one.home
        alike.setdefault((_NUMBER.sub(".*", one.unit), home, one.compute), []).append(one)
    for (pattern, home, compute), group in alike.items():
        label = f"{len(group)} × {pattern}" if len(group) > 1 else group[0].unit
        moved = sum(one.moved_bytes for one in group)
        size = format_bytes(sum(one.home_bytes for one in group))
        yield label, home, compute, size, format_bytes(moved) if moved else ""


def _device_row(device: DevicePlan) -> tuple[str, ...]:
    reserved = device.reservation
    sizes = (
        device.peak_bytes,
        device.budget_bytes,
        device.weight_bytes + device.mapped_bytes,
        reserved.kv_cache_bytes,
        reserved.activation_bytes + reserved.logits_bytes,
        reserved.slot_bytes,
        reserved.workspace_bytes + device.level_bytes,
    )
    return (device.device, *map(format_bytes, sizes))


def _times(plan: Plan) -> Iterable[str]:
    predicted = plan.prediction
    yield f"load         {format_seconds(predicted.load_s)}, bound by {predicted.load_bound_by}"
    first = predicted.load_s + predicted.prefill.seconds
    yield f"first token  {format_seconds(first)} from the start, of which the prompt {_pass(predicted.prefill)}"
    yield f"then         {predicted.tokens_per_s:.3g} tokens/s, a pass {_pass(predicted.decode)}"
    if not predicted.measured:
        yield "from typical rates where none were measured on this machine"


def _pass(one: Pass) -> str:
    return f"{format_seconds(one.seconds)}, bound by {one.bound_by}"
