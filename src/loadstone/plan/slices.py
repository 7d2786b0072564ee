"""Heads that are streamed in slices of their rows, where not even one of them would find room as a whole.

A head over a large vocabulary can be larger than the slots of all blocks together, and is needed once in a pass, for
the newest tokens. Two slices of it are in memory at a time: with the one is computed while the other is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from loadstone.plan.cost import rows_bytes
from loadstone.plan.values import NUM_WINDOWS, Seen, Unit, UnitKind

# Sizes of a slice that are tried. With few slices the products around them cost little; smaller ones leave more room.
SLICE_BYTES = (256 << 20, 64 << 20, 16 << 20)


def with_slices(units: Sequence[Unit]) -> Iterator[tuple[Unit, ...]]:
    """The same units with heads in slices, for each size of a slice that some head is worth."""
    for nbytes in SLICE_BYTES:
        sliced = tuple(replace(unit, slice_bytes=nbytes) if _is_sliceable(unit, nbytes) else unit for unit in units)
        if any(unit.slice_bytes for unit in sliced):
            yield sliced


def _is_sliceable(unit: Unit, nbytes: int) -> bool:
    """Whether a unit is one matrix that is multiplied with the newest tokens, and larger than its slices."""
    is_head = unit.kind is UnitKind.HEAD and unit.seen is Seen.NEWEST and len(unit.tensors) == 1
    return is_head and not unit.rearranged_bytes and unit.memory_bytes > NUM_WINDOWS * nbytes


def held_bytes(unit: Unit, tokens: int) -> int:
    """What must be held of a unit that does not go through slots: rows of a table, slices of a head, or both.

    Args:
        unit: looked up by rows, or read in slices.
        tokens: the most in a pass.
    """
    if not unit.slice_bytes:
        return rows_bytes(unit, tokens)
    rows = unit.memory_bytes * min(tokens, unit.table_rows) // unit.table_rows + 1 if unit.table_rows else 0
    return unit.window_bytes + rows
