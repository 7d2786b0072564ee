"""The room that experts share: what a plan keeps of them in memory, and the slots of those it streams."""

from __future__ import annotations

from dataclasses import dataclass

from loadstone.plan.units import Inventory
from loadstone.plan.values import Plan, UnitKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Memory for experts of all layers.

    Attributes:
        nbytes: how much; 0 where no expert is streamed.
        tensors: the names of their tensors in the checkpoint.
    """

    nbytes: int = 0
    tensors: frozenset[str] = frozenset()


def expert_room(plan: Plan, found: Inventory) -> Room:
    """What a plan gives to experts, where it streams any of them.

    Which experts are worth keeping is known only once routers have chosen, so that those which the plan keeps in memory
    say how many stay, not which.

    Args:
        plan: what goes where.
        found: the units that it places.
    """
    units = {unit.name: unit for unit in found.units if unit.kind is UnitKind.EXPERT}
    placed = [(units[one.unit], one.is_streamed) for one in plan.placements if one.unit in units]
    away = [unit.memory_bytes for unit, is_streamed in placed if is_streamed]
    if not away:
        return Room()
    kept_bytes = sum(unit.memory_bytes for unit, is_streamed in placed if not is_streamed)
    # Where other units are streamed too, the ring is theirs, and one expert's memory is planned beside it.
    others = any(
        one.is_streamed and one.unit not in units and one.kind is not UnitKind.EMBEDDING for one in plan.placements
    )
    num_slots = 1 if others else max(1, plan.num_slots)
    tensors = frozenset(name for unit, _ in placed for name in unit.tensors)
    return Room(nbytes=kept_bytes + num_slots * max(away), tensors=tensors)
