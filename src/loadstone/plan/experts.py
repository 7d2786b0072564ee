"""The room that experts share: what a plan keeps of them in memory, and the slots of those it streams."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loadstone.plan.values import HOST, Plan, Unit, UnitKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Memory for experts of all layers.

    Attributes:
        nbytes: how much; 0 where no expert is streamed.
        tensors: the names of their tensors in the checkpoint.
    """

    nbytes: int = 0
    tensors: frozenset[str] = frozenset()


def ring_bytes(streamed: Iterable[Unit], num_slots: int, device: str = HOST) -> int:
    """The memory that streamed units need: the slots of a ring, or the others' slots and one expert beside.

    Args:
        streamed: the units; what is looked up by rows or read in slices needs no slot.
        num_slots: of the ring.
        device: that has it.
    """
    slotted = [unit for unit in streamed if unit.is_slotted]
    experts = [unit for unit in slotted if unit.kind is UnitKind.EXPERT]
    others = [unit for unit in slotted if unit.kind is not UnitKind.EXPERT]
    apart = 0
    if experts and others:
        apart = sum(_slot_sizes(others, num_slots, device)) + _slot_sizes(experts, 1, device)[0]
    return max(sum(_slot_sizes(slotted, num_slots, device)), apart)


def _slot_sizes(streamed: Iterable[Unit], num_slots: int, device: str) -> list[int]:
    """How large the slots of a ring are: slot i suits the i-th largest unit, so that any of them find room at once."""
    return sorted((unit.slot_bytes_on(device) for unit in streamed), reverse=True)[:num_slots]


def expert_room(plan: Plan, units: Mapping[str, Unit], device: str = HOST) -> Room:
    """What a plan gives to experts that are streamed: what it keeps of them, and what others leave of the slots.

    Which experts are worth keeping is known only once routers have chosen, so that those which the plan keeps in memory
    say how many stay, not which.

    Args:
        plan: what goes where.
        units: that its placements name.
        device: that they are streamed to.
    """
    placed = [(units[one.unit], one.is_streamed) for one in plan.placements if one.compute == device]
    experts = [(unit, is_streamed) for unit, is_streamed in placed if unit.kind is UnitKind.EXPERT]
    if not any(is_streamed for _, is_streamed in experts):
        return Room()
    kept_bytes = sum(unit.memory_bytes for unit, is_streamed in experts if not is_streamed)
    streamed = [unit for unit, is_streamed in placed if is_streamed]
    others = [unit for unit in streamed if unit.kind is not UnitKind.EXPERT]
    slot_bytes = ring_bytes(streamed, plan.num_slots, device) - ring_bytes(others, plan.num_slots, device)
    return Room(nbytes=kept_bytes + slot_bytes, tensors=frozenset(name for unit, _ in experts for name in unit.tensors))
