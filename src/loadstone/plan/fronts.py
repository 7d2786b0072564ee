"""Units of which the front stays and only the rest is streamed, so that slots are small and no room is left over.

A slot is memory that keeps nothing, and what is less than the next unit would keep nothing either. If every unit that
is larger than a slot keeps what it has more, what is streamed is all the weights less all the room but the slots; the
smaller the slots, the less it is. They cannot be smaller than the room allows: smaller slots are longer fronts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from loadstone.plan.values import Unit, UnitKind

# Smaller reads do not keep a disk busy while two of them wait for it: what is not larger stays whole. Measured, 8.7 GB
# in 5.0: 3.27 GB in 125 pieces took as long as 3.30 GB in 71.
_LEAST_SLOT_BYTES = 16 << 20
_PAGE_BYTES = 4096
# How many sizes are tried below which units stay whole.
_MAX_TRIED = 12


def is_divisible(unit: Unit) -> bool:
    """Whether a part of a unit can be read by itself: all of it lies in memory as it does in its file."""
    plain = unit.mappable_bytes == unit.memory_bytes == unit.stored_bytes and not unit.rearranged_bytes
    return plain and unit.kind not in (UnitKind.EMBEDDING, UnitKind.EXPERT)


def fronted(units: Iterable[Unit], slot_bytes: int) -> tuple[Unit, ...]:
    """The same units, each with the front that it has beyond a slot."""
    return tuple(
        replace(unit, front_bytes=min(unit.memory_bytes, max(0, unit.slot_bytes - slot_bytes)))
        if is_divisible(unit)
        else unit
        for unit in units
    )


def slot_sizes(units: Sequence[Unit], room_bytes: int, num_slots: int) -> Iterator[int]:
    """Sizes of slots that are worth a try, whole pages; none where fronts do not help.

    For every size of a unit: the smallest slots with which those that are not larger stay whole, and the others fit.

    Args:
        units: those that can be divided.
        room_bytes: for them and the slots.
        num_slots: of the ring.
    """
    sizes = sorted(unit.slot_bytes for unit in units)
    limits = [_LEAST_SLOT_BYTES, *(size for size in dict.fromkeys(sizes) if size > _LEAST_SLOT_BYTES)]
    for limit in limits[: _MAX_TRIED - 1] + limits[_MAX_TRIED - 1 :][-1:]:
        larger = [size for size in sizes if size > limit]
        if len(larger) <= num_slots:
            return
        left = room_bytes - sum(unit.memory_bytes for unit in units if unit.slot_bytes <= limit)

        def needed(slot: int, larger: Sequence[int] = larger) -> int:
            return num_slots * slot + sum(size - slot for size in larger if size > slot)

        # Larger slots save memory as long as more units have a front than there are slots.
        low, high = limit, larger[-num_slots - 1]
        if low < high and needed(high) <= left:
            yield -(-_least(low, high, needed, left) // _PAGE_BYTES) * _PAGE_BYTES


def _least(low: int, high: int, needed: Callable[[int], int], left: int) -> int:
    """The least slot between two sizes for which there is room, where there is for the larger."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if needed(middle) <= left else (middle + 1, high)
    return high
