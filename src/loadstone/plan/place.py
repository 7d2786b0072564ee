"""One device and the units that compute on it: which stay, which are streamed through a ring, and from where.

The walk over units is cyclic, so a fixed resident set is best, and which of several like units it holds does not matter
for the bytes that travel, only for when they do. So like units are counted as one group; a choice says how many of each
group stay; those that do not are then spread evenly over the walk.

Every choice fills the memory in one fixed order and stops at the first unit that does not fit. More memory therefore
holds all that less memory held, and the plan is never slower for having more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from loadstone.plan.cost import MAX_HOST_SLOTS, alone_s, compared_s, overlapped_s, transfer_s, work
from loadstone.plan.experts import ring_bytes
from loadstone.plan.fronts import divided, is_divisible, splits
from loadstone.plan.groups import Choice, Group, grouped, is_slotted, streamed_groups
from loadstone.plan.reserve import NUM_BUFFERS
from loadstone.plan.segment import Assignment, Missing, Placed, Segment
from loadstone.plan.slices import with_slices
from loadstone.plan.values import DISK, HOST, Unit, UnitKind

# How many sizes of a slot are tried: each makes all larger units resident.
_MAX_SLOT_SIZES = 12
_SLOT_COUNTS = (2, 1)
_HOST_SLOT_COUNTS = (MAX_HOST_SLOTS, 2, 1)


def buffer_bytes(assignments: Sequence[Assignment]) -> int:
    """What units need of the host on their way from the disk to accelerators."""
    sent = {one.compute for one in assignments if _is_expert(one) and one.home != one.compute != HOST}
    largest: dict[str, int] = {}
    for one in assignments:
        # An expert that stays has to go when others are chosen more often, and comes again.
        comes_again = _is_expert(one) and one.home == one.compute in sent and not one.spare_bytes
        if comes_again or (one.home == DISK and one.compute != HOST and one.unit.is_slotted):
            largest[one.compute] = max(largest.get(one.compute, 0), one.unit.buffer_bytes)
    return NUM_BUFFERS * sum(largest.values())


def _is_expert(one: Assignment) -> bool:
    return one.unit.kind is UnitKind.EXPERT


def place(segment: Segment) -> Placed | Missing:
    """Choose what stays on the device.

    Args:
        segment: the units and the room.

    Returns:
        The placement whose run is the shortest, or what is missing for any.
    """
    whole = grouped(segment, segment.units)
    missing, best = _best(segment, whole, None)
    if segment.offload and (best is None or any(map(is_slotted, streamed_groups(best)))):
        finer = tuple(part for unit in segment.units for part in segment.parts(unit))
        # What is seen at several addresses can be divided further; accelerators have no such memory.
        shows_pages = segment.device == HOST and segment.fronts
        for units in (finer, *with_slices(finer)) if shows_pages else (finer,):
            if len(units) > len(segment.units) or units is not finer:
                fewer, best = _best(segment, grouped(segment, units), best)
                missing = min(missing, fewer)
            if best is not None and shows_pages:
                best = _with_fronts(segment, units, best)
    return Missing(nbytes=missing) if best is None else _placed(segment, best)


def _best(segment: Segment, groups: list[Group], best: Choice | None) -> tuple[int, Choice | None]:
    """The best of all choices, and the least that those which do not fit are short of."""
    missing = -1
    for slot_bytes, num_slots in _rings(segment, groups):
        choice = _filled(segment, groups, slot_bytes, num_slots)
        if isinstance(choice, int):
            missing = choice if missing < 0 else min(missing, choice)
            continue
        choice.pass_s, choice.moving_s = _pass_s(segment, choice)
        if best is None or _cost(segment, choice) < _cost(segment, best):
            best = choice
    return (missing if missing >= 0 else 0), best


def _with_fronts(segment: Segment, units: Sequence[Unit], best: Choice) -> Choice:
    """A choice in which the fronts of streamed units stay, where that is better."""
    if not any(is_divisible(group.units[0]) for group in streamed_groups(best)):
        return best
    divisible = [unit for unit in units if is_divisible(unit)]
    groups = grouped(segment, [unit for unit in units if not is_divisible(unit)])
    others = sum(len(group.units) * (group.size if group.held_bytes is None else group.held_bytes) for group in groups)
    for choice in _fronted(segment, units, divisible, segment.room_bytes - others, best.groups):
        choice.pass_s, choice.moving_s = _pass_s(segment, choice)
        if _cost(segment, choice) < _cost(segment, best):
            best = choice
    return best


def _fronted(
    segment: Segment, units: Sequence[Unit], divisible: Sequence[Unit], room_bytes: int, groups: Sequence[Group]
) -> Iterator[Choice]:
    """Choices in which the fronts of some units stay.

    Args:
        segment: the units and the room.
        units: all of them.
        divisible: those that can have a front.
        room_bytes: for them and the slots.
        groups: all units, of which computing takes a time.
    """
    compute_s = [_compute_s(segment, groups, index) for index in range(len(segment.tokens))]
    for num_slots in _HOST_SLOT_COUNTS[:-1]:
        run = partial(_divided_run_s, segment, compute_s, num_slots) if segment.compresses else None
        for split in splits(divisible, room_bytes, num_slots, run):
            choice = _filled(segment, grouped(segment, divided(units, split)), split.slot_bytes, num_slots)
            if isinstance(choice, Choice):
                choice.split = split
                yield choice


def _rings(segment: Segment, groups: list[Group]) -> Iterator[tuple[int, int]]:
    """Slot sizes and counts to try. No slot at all means that everything which needs one stays."""
    yield 0, 0
    if segment.offload:
        sizes = sorted({group.slot for group in groups if is_slotted(group)}, reverse=True)
        # The largest ones differ most; the smallest is what fits when nothing else does.
        for size in sizes[: _MAX_SLOT_SIZES - 1] + sizes[_MAX_SLOT_SIZES - 1 :][-1:]:
            for num_slots in _slot_counts(segment):
                yield size, num_slots


def _slot_counts(segment: Segment) -> tuple[int, ...]:
    return _HOST_SLOT_COUNTS if segment.device == HOST else _SLOT_COUNTS


def _filled(segment: Segment, groups: list[Group], slot_bytes: int, num_slots: int) -> Choice | int:
    """Fill the room beside a ring; the bytes that are missing if not even what must stay fits."""
    choice = _filled_beside(segment, groups, (slot_bytes, num_slots), 0)
    if isinstance(choice, Choice):
        kinds = {group.units[0].kind is UnitKind.EXPERT for group in streamed_groups(choice) if is_slotted(group)}
        if len(kinds) < 2:
            return choice
    # Experts have a room apart from the ring.
    return _filled_beside(segment, groups, (slot_bytes, num_slots), _expert_bytes(groups, slot_bytes, num_slots))


def _filled_beside(segment: Segment, groups: list[Group], ring: tuple[int, int], expert_bytes: int) -> Choice | int:
    slot_bytes, num_slots = ring
    required = [is_slotted(group) and group.slot > slot_bytes for group in groups]
    left = segment.room_bytes - num_slots * slot_bytes - expert_bytes
    left -= segment.expanding_bytes if num_slots else 0
    left -= sum((group.kept + (group.held_bytes or 0)) * len(group.units) for group in groups)
    left -= sum(
        (group.size - group.kept) * len(group.units) for group, must in zip(groups, required, strict=True) if must
    )
    if left < 0:
        return -left
    kept = [len(group.units) if must else 0 for group, must in zip(groups, required, strict=True)]
    choice = Choice(groups=groups, kept=kept, num_slots=num_slots, slot_bytes=slot_bytes, left_bytes=left)
    for index, group in enumerate(groups):
        if required[index]:
            continue
        price = group.size - group.kept - (group.held_bytes or 0)
        fitting = len(group.units) if price <= 0 else min(len(group.units), choice.left_bytes // price)
        kept[index] = fitting
        choice.left_bytes -= fitting * price
        if fitting < len(group.units):
            _split_one(segment, choice, index)
            break
    return choice


def _expert_bytes(groups: Sequence[Group], slot_bytes: int, num_slots: int) -> int:
    """The most that is needed beside the ring where experts and others may be streamed; see `ring_bytes`."""
    largest: dict[bool, int] = {}
    for group in groups:
        if is_slotted(group) and group.slot <= slot_bytes:
            is_expert = group.units[0].kind is UnitKind.EXPERT
            largest[is_expert] = max(group.slot, largest.get(is_expert, 0))
    apart = num_slots * largest[False] + largest[True] if len(largest) == 2 else 0
    return max(0, apart - num_slots * slot_bytes)


def _split_one(segment: Segment, choice: Choice, index: int) -> None:
    """Keep parts of one of the units that do not fit whole."""
    group = choice.groups[index]
    streamed = spread(len(group.units), choice.kept[index])
    unit = group.units[streamed[len(streamed) // 2]]
    parts = sorted(segment.parts(unit), key=lambda part: (part.memory_bytes, part.name))
    stay: list[Unit] = []
    for part in parts:
        if len(parts) < 2 or part.memory_bytes > choice.left_bytes:
            break
        choice.left_bytes -= part.memory_bytes
        stay.append(part)
    if stay:
        choice.torn = (group, unit, tuple(stay), tuple(parts[len(stay) :]))


def spread(count: int, kept: int) -> list[int]:
    """The places of those that are streamed, as far from each other as can be: in the middle of equal shares."""
    streamed = count - kept
    return [(2 * index + 1) * count // (2 * streamed) for index in range(streamed)]


def _streamed(choice: Choice) -> Iterator[tuple[Unit, int]]:
    """Streamed units in the order in which host memory is filled, each with how many there are alike."""
    for group, kept in zip(choice.groups, choice.kept, strict=True):
        count = len(group.units) - kept
        if choice.torn is not None and choice.torn[0] is group:
            for part in choice.torn[3]:
                yield part, 1
            count -= 1
        if count:
            yield group.units[0], count


@dataclass(frozen=True, slots=True, kw_only=True)
class _Homes:
    """Where streamed units live.

    Attributes:
        counts: each kind of unit, with how many there are alike, and how many of these live in host memory.
        spares: what experts take there that stay on an accelerator: they do so until others are chosen more often, and
            then come from there. 0 where there is no room for all of them, or nothing is to take their place.
    """

    counts: tuple[tuple[Unit, int, int], ...]
    spares: int


def _homes(segment: Segment, choice: Choice) -> _Homes:
    if segment.device == HOST:
        return _Homes(counts=tuple((unit, count, 0) for unit, count in _streamed(choice)), spares=0)
    room = segment.host_room_bytes
    counts = []
    for unit, count in _streamed(choice):
        fitting = min(count, room // max(1, unit.carried_bytes))
        room = room - fitting * unit.carried_bytes if fitting == count else 0
        counts.append((unit, count, fitting))
    experts = [count == near for unit, count, near in counts if unit.kind is UnitKind.EXPERT]
    spares = sum(kept * group.units[0].carried_bytes for group, kept in _experts_that_stay(choice))
    spares = spares if experts and all(experts) and spares <= room else 0
    return _Homes(counts=tuple(counts), spares=spares)


def _experts_that_stay(choice: Choice) -> Iterator[tuple[Group, int]]:
    for group, kept in zip(choice.groups, choice.kept, strict=True):
        if group.units[0].kind is UnitKind.EXPERT:
            yield group, kept


def _from_memory(choice: Choice, homes: _Homes) -> Iterator[tuple[Unit, int, float]]:
    """How many of each kind come from host memory: any expert may have to come, also those that have no home there."""
    staying = {group.units[0].name: kept for group, kept in _experts_that_stay(choice)}
    for unit, count, near in homes.counts:
        others = 0 if homes.spares else staying.get(unit.name, 0)
        yield unit, count, near * count / (count + others)


def _pass_s(segment: Segment, choice: Choice) -> tuple[tuple[float, float], tuple[float, float]]:
    """Both kinds of pass, and what moving alone would take."""
    homes = list(_from_memory(choice, _homes(segment, choice)))
    near_way, far_way = (segment.speeds.way(home, segment.device) for home in (HOST, DISK))
    rate = segment.speeds.compute[segment.device]
    far_rate = None if segment.device == HOST else rate
    comparing = sum(count * compared_s(unit, rate, segment.tokens[0]) for unit, count, _ in homes)
    expanding = sum(count * unit.compressed_bytes for unit, count, _ in homes) / segment.speeds.expand
    seconds, alone = [], []
    for index, tokens in enumerate(segment.tokens):
        compute = _compute_s(segment, choice.groups, index) + expanding + (comparing if index else 0.0)
        moving = waiting = 0.0
        for unit, count, near in homes:
            for one, way in ((near, near_way), (count - near, far_way)):
                moving += one * transfer_s(unit, tokens, way, far_rate)
                waiting += one * alone_s(unit, tokens, way, far_rate)
        seconds.append(overlapped_s(compute, moving - waiting, choice.num_slots, segment.device) + waiting)
        alone.append(moving)
    return (seconds[0], seconds[1]), (alone[0], alone[1])


def _compute_s(segment: Segment, groups: Iterable[Group], index: int) -> float:
    """Computing with all units in one kind of pass."""
    rate = segment.speeds.compute[segment.device]
    compute = segment.beside[index].seconds(rate)
    for group in groups:
        given = group.units[0].num_tokens(segment.tokens, index)
        compute += len(group.units) * work(group.units[0], rate, given).seconds
    return compute


def _divided_run_s(
    segment: Segment, compute_s: Sequence[float], num_slots: int, expanded: float, moved: float
) -> float:
    """A whole run in which so many bytes are expanded and read in each pass, beside computing."""
    expanding, moving = expanded / segment.speeds.expand, moved / segment.speeds.way(DISK, segment.device)[0]
    passes = [overlapped_s(one + expanding, moving, num_slots, segment.device) for one in compute_s]
    return run_s((passes[0], passes[1]), segment.num_passes)


def _cost(segment: Segment, choice: Choice) -> tuple[float, float]:
    """A run's seconds; of equal ones, what moves less is better: rates are never quite what was measured."""
    return run_s(choice.pass_s, segment.num_passes), run_s(choice.moving_s, segment.num_passes)


def run_s(pass_s: tuple[float, float], num_passes: int) -> float:
    """A whole run: the pass over the prompt, and the decoding passes after it."""
    return num_passes * pass_s[0] + pass_s[1]


def _without_parts(one: Assignment) -> Assignment:
    """What stays whole, without what would have stayed of it otherwise."""
    unit = one.unit
    if one.home != one.compute or not (unit.kept_bytes or unit.slice_bytes):
        return one
    return replace(one, unit=replace(unit, front_bytes=0, compressed_bytes=0, slice_bytes=0))


def _with_spare(one: Assignment) -> Assignment:
    """An expert that stays has a home in host memory too."""
    if not _is_expert(one) or one.home != one.compute:
        return one
    return replace(one, spare_bytes=one.unit.carried_bytes)


def _placed(segment: Segment, choice: Choice) -> Placed:
    homes = _homes(segment, choice)
    near = {id(unit): fitting for unit, _, fitting in homes.counts}
    found: list[Assignment] = []
    rows = 0
    for group, kept in zip(choice.groups, choice.kept, strict=True):
        torn = choice.torn if choice.torn is not None and choice.torn[0] is group else None
        away = [group.units[index] for index in spread(len(group.units), kept)]
        rows += (group.held_bytes or 0) * len(away)
        if torn is not None:
            away.remove(torn[1])
            found += [Assignment(unit=part, home=segment.device, compute=segment.device) for part in torn[2]]
            found += [
                Assignment(unit=part, home=HOST if near[id(part)] else DISK, compute=segment.device) for part in torn[3]
            ]
        on_disk = set(spread(len(away), near.get(id(group.units[0]), 0)))
        home_of = {unit.name: DISK if index in on_disk else HOST for index, unit in enumerate(away)}
        if torn is not None:
            home_of[torn[1].name] = ""
        found += [
            Assignment(unit=unit, home=home_of.get(unit.name, segment.device), compute=segment.device)
            for unit in group.units
            if home_of.get(unit.name) != ""
        ]
    away = [one.unit for one in found if one.home != one.compute and one.unit.is_slotted]
    found = [_without_parts(one) for one in found]
    if homes.spares:
        found = [_with_spare(one) for one in found]
    return Placed(
        assignments=tuple(sorted(found, key=lambda one: one.unit.order)),
        num_slots=choice.num_slots if away else 0,
        slot_bytes=choice.slot_bytes if choice.split and any(unit.kept_bytes for unit in away) else 0,
        read_bytes=choice.split.read_bytes if choice.split and any(unit.compressed_bytes for unit in away) else None,
        ring_bytes=ring_bytes(away, choice.num_slots, segment.device) + (segment.expanding_bytes if away else 0) + rows,
        host_bytes=sum(one.unit.carried_bytes for one in found if one.home == HOST != one.compute) + homes.spares,
        pass_s=choice.pass_s,
    )
