"""Units that are alike, and how many of each stay: what a placement is chosen by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from loadstone.plan.cost import likeness, moved_bytes
from loadstone.plan.fronts import Split
from loadstone.plan.segment import Segment
from loadstone.plan.slices import held_bytes
from loadstone.plan.values import DISK, Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Units that are alike in everything that a choice depends on.

    Attributes:
        units: in execution order.
        size: of one in the device's memory.
        slot: what one takes of the ring.
        kept: the memory of what stays of one that is streamed.
        held_bytes: what must be held of a unit that goes through no slot; None for other units.
        gain: seconds that a resident byte saves in a decoding pass, then in the pass over the prompt.
    """

    units: tuple[Unit, ...]
    size: int
    slot: int
    kept: int
    held_bytes: int | None
    gain: tuple[float, float]


@dataclass(slots=True, kw_only=True)
class Choice:
    """How many of each group stay.

    Attributes:
        groups: in the order in which memory is filled.
        kept: how many of each.
        num_slots: of the ring.
        slot_bytes: of one slot.
        split: how units are divided; None where they come whole.
        left_bytes: room that is left.
        torn: a unit of which only some parts stay: its group, the unit, those that do, those that do not.
        pass_s: a decoding pass, then the pass over the prompt.
        moving_s: the part of each that moving would take alone.
    """

    groups: Sequence[Group]
    kept: list[int]
    num_slots: int
    slot_bytes: int
    left_bytes: int
    split: Split | None = None
    torn: tuple[Group, Unit, tuple[Unit, ...], tuple[Unit, ...]] | None = None
    pass_s: tuple[float, float] = field(default=(0.0, 0.0))
    moving_s: tuple[float, float] = field(default=(0.0, 0.0))


def is_slotted(group: Group) -> bool:
    """Whether what is streamed of them goes through slots."""
    return group.held_bytes is None


def streamed_groups(choice: Choice) -> list[Group]:
    """The groups of which not all stay."""
    return [group for group, kept in zip(choice.groups, choice.kept, strict=True) if kept < len(group.units)]


def grouped(segment: Segment, units: Sequence[Unit]) -> list[Group]:
    """Like units together, in the order in which memory is filled: what saves most per byte, then the smallest."""
    alike: dict[tuple[object, ...], list[Unit]] = {}
    for unit in units:
        alike.setdefault(likeness(unit), []).append(unit)
    groups = [_group(segment, tuple(members)) for members in alike.values()]
    return sorted(groups, key=lambda group: (tuple(-gain for gain in group.gain), group.size))


def _group(segment: Segment, units: tuple[Unit, ...]) -> Group:
    unit = units[0]
    way = segment.speeds.way(DISK, segment.device)
    size = max(1, unit.memory_bytes)
    decode, prompt = (moved_bytes(unit, tokens) / way[0] / (size - unit.kept_bytes or 1) for tokens in segment.tokens)
    goes_by_parts = not unit.is_slotted and segment.offload
    # Rounded, so that units which differ by rounding only are taken by size.
    gain = (_rounded(decode), _rounded(prompt))
    return Group(
        units=units,
        size=unit.memory_bytes,
        slot=unit.slot_bytes_on(segment.device),
        kept=unit.kept_bytes,
        held_bytes=held_bytes(unit, max(segment.tokens)) if goes_by_parts else None,
        gain=gain,
    )


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
