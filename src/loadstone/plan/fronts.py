"""Units of which some stays and only the rest is streamed, so that slots are small and no room is left over.

A slot is memory that keeps nothing, and what is less than the next unit would keep nothing either. If every unit that
is larger than a slot keeps what it has more, its front, what is streamed is all the weights less all the room but the
slots; the smaller the slots, the less it is. They cannot be smaller than the room allows: that makes fronts longer.

Of what goes through a slot some may stay compressed and be expanded into it, so that less is read. A byte takes less
room so than as a part of a front, but time of the processor in each pass, so slots are large then, and only as much is
compressed as the disk takes longer than the processor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from loadstone.compression import SHARE, kept_bytes, whole_grains
from loadstone.plan.values import Unit, UnitKind
from loadstone.units import round_up

# Smaller reads do not keep a disk busy while two of them wait for it: what is not larger stays whole. Measured, 8.7 GB
# in 5.0: 3.27 GB in 125 pieces took as long as 3.30 GB in 71.
_LEAST_SLOT_BYTES = 16 << 20
_PAGE_BYTES = 4096
# How many sizes are tried below which units stay whole.
_MAX_TRIED = 12


def is_divisible(unit: Unit) -> bool:
    """Whether a part of a unit can be read by itself: all of it lies in memory as it does in its file."""
    plain = unit.mappable_bytes == unit.memory_bytes == unit.stored_bytes and not unit.rearranged_bytes
    return plain and unit.is_slotted and unit.kind is not UnitKind.EXPERT


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How units are divided.

    Attributes:
        slot_bytes: the most that goes through a slot; what a unit has before that is its front.
        read_bytes: the most that is read; what a slot has before that is compressed. None where all of it is read.
    """

    slot_bytes: int
    read_bytes: int | None = None


# The seconds of a run in which so many bytes are expanded, and so many read, in each pass.
RunSeconds = Callable[[float, float], float]


def divided(units: Iterable[Unit], split: Split) -> tuple[Unit, ...]:
    """The same units, each with what stays of it."""
    return tuple(_divided(unit, split) if is_divisible(unit) else unit for unit in units)


def _divided(unit: Unit, split: Split) -> Unit:
    front = min(unit.memory_bytes, max(0, unit.slot_bytes - split.slot_bytes))
    compressed = 0
    if split.read_bytes is not None:
        compressed = whole_grains(unit.slot_bytes - split.read_bytes - front)
    return replace(unit, front_bytes=front, compressed_bytes=compressed)


def splits(units: Sequence[Unit], room_bytes: int, num_slots: int, run: RunSeconds | None = None) -> Iterator[Split]:
    """Ways to divide units that are worth a try; none where that does not help.

    For every size of a unit, where those that are not larger stay whole, and the others fit: the smallest slots; and
    slots for all but the largest, of which as much is compressed as must be, or as is best.

    Args:
        units: those that can be divided.
        room_bytes: for them and the slots.
        num_slots: of the ring.
        run: how long it takes; None where nothing can be compressed.
    """
    sizes = sorted(unit.slot_bytes for unit in units)
    limits = [_LEAST_SLOT_BYTES, *(size for size in dict.fromkeys(sizes) if size > _LEAST_SLOT_BYTES)]
    for limit in limits[: _MAX_TRIED - 1] + limits[_MAX_TRIED - 1 :][-1:]:
        larger = [size for size in sizes if size > limit]
        if len(larger) <= num_slots:
            return
        left = room_bytes - sum(unit.memory_bytes for unit in units if unit.slot_bytes <= limit)
        yield from _splits(larger, limit, left, num_slots, run)


def _splits(
    larger: Sequence[int], limit: int, left_bytes: int, num_slots: int, run: RunSeconds | None
) -> Iterator[Split]:
    """The same for units that are all larger than a limit, and rise."""

    def fits(slot: int, read: int) -> bool:
        return num_slots * slot + sum(_kept(size, slot, read) for size in larger) <= left_bytes

    # Larger slots save memory as long as more units have a front than there are slots.
    high = larger[-num_slots - 1]
    if not fits(high, high):
        return
    yield Split(slot_bytes=round_up(_least(limit, high, lambda slot: fits(slot, slot)), _PAGE_BYTES))
    if run is not None:
        least = _least(0, high, lambda read: fits(high, read))
        through = [min(size, high) for size in larger]
        read = _best_read(through, left_bytes - num_slots * high - sum(larger) + sum(through), run, least)
        if read < high:
            yield Split(slot_bytes=high, read_bytes=read)
            slot = round_up(_least(read, high, lambda slot: fits(slot, read)), _PAGE_BYTES)
            if slot < high:  # what room is left makes fronts longer
                yield Split(slot_bytes=slot, read_bytes=read)


def _best_read(through: Sequence[int], room_bytes: int, run: RunSeconds, least: int) -> int:
    """The most that is read of a unit where a run is the shortest.

    Args:
        through: what goes through a slot of each unit.
        room_bytes: for what stays of that; what is left of it keeps some of the units whole.
        run: how long it takes.
        least: less does not fit.
    """
    counts, total = Counter(through), sum(through)

    def seconds(read: int) -> float:
        compressed = sum(count * max(0, size - read) for size, count in counts.items())
        kept = SHARE * compressed
        comes = 1 - min(1, max(0, room_bytes - kept) / max(1, total - kept))
        return run(comes * compressed, comes * (total - compressed))

    low, high = least, max(through)
    while low < high:  # it falls to the best, and rises behind it
        middle = (low + high) // 2
        low, high = (low, middle) if seconds(middle) <= seconds(middle + 1) else (middle + 1, high)
    return low


def _kept(size: int, slot_bytes: int, read_bytes: int) -> int:
    """The memory of what stays of a unit of this size."""
    through = min(size, slot_bytes)
    return size - through + kept_bytes(max(0, through - read_bytes))


def _least(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The least number between two that fits, as the larger does."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high
