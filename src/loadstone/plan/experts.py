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
    units = {unit.name: unit for whole in found.units for unit in (*found.parts(whole), whole)}
    placed = [(units[one.unit], one.is_streamed) for one in plan.placements if one.kind is not UnitKind.EMBEDDING]
    experts = [(unit, is_streamed) for unit, is_streamed in placed if unit.kind is UnitKind.EXPERT]
    away = max((unit.memory_bytes for unit, is_streamed in experts if is_streamed), default=0)
    if not away:
        return Room()
    others = [unit.memory_bytes for unit, is_streamed in placed if is_streamed and unit.kind is not UnitKind.EXPERT]
    largest = max(others, default=0)
    # What `place` reserves, less the ring of the other units; beside those it reserves one expert more.
    slot_bytes = max(1, plan.num_slots) * (max(away, largest) - largest) + (away if others else 0)
    return Room(
        nbytes=sum(unit.memory_bytes for unit, is_streamed in experts if not is_streamed) + slot_bytes,
        tensors=frozenset(name for unit, _ in experts for name in unit.tensors),
    )
