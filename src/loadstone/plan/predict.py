"""Layout -> what each device holds, and how long loading and each pass take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loadstone.plan.cost import alone_s, compared_s, likeness, moved_bytes, overlapped_s, transfer_s, work
from loadstone.plan.layout import Layout, Problem
from loadstone.plan.segment import Assignment
from loadstone.plan.values import DISK, HOST, DevicePlan, Pass, Placement, Prediction, Reservation, Unit, UnitKind

# By compute device: one of each kind of assignment, in execution order, and how many are like it.
_Tally = dict[str, list[tuple[Assignment, int]]]


def placements(problem: Problem, layout: Layout) -> tuple[Placement, ...]:
    """Every unit of a layout as the plan tells it."""
    inventory = problem.inventory
    return tuple(
        Placement(
            unit=one.unit.name,
            kind=one.unit.kind,
            order=one.unit.order,
            home=one.home,
            compute=one.compute,
            storage_dtype=inventory.dtype if one.home == one.compute else inventory.storage(one.unit),
            compute_dtype=inventory.dtype,
            home_bytes=_home_bytes(one),
            moved_bytes=0 if one.home == one.compute else moved_bytes(one.unit, problem.tokens[0]),
            mapped=one.home == one.compute == HOST and _is_mapped(one.unit),
            front_bytes=one.unit.front_bytes,
            compressed_bytes=one.unit.compressed_bytes,
            slice_bytes=one.unit.slice_bytes,
            spare_bytes=one.spare_bytes,
        )
        for one in layout.assignments
    )


def _home_bytes(one: Assignment) -> int:
    """What a unit takes where it is kept."""
    if one.home == one.compute:
        return one.unit.memory_bytes
    return one.unit.stored_bytes if one.home == DISK else one.unit.carried_bytes


def _is_mapped(unit: Unit) -> bool:
    return 0 < unit.mappable_bytes == unit.memory_bytes


def device_plans(problem: Problem, layout: Layout, logits_bytes: int) -> tuple[DevicePlan, ...]:
    """What each device holds, the host last.

    Args:
        problem: budgets and what must be kept free.
        layout: where everything lies.
        logits_bytes: the part of `problem.pass_bytes` that is scores.
    """
    plans = []
    num_accelerators = len({one.compute for one in layout.assignments} - {HOST})
    for device in problem.devices:
        computing = [one.unit for one in layout.assignments if one.compute == device.id]
        if device.id != HOST and not computing:
            continue
        weights, mapped = _held(device.id, layout.assignments)
        workspace = (
            problem.host_workspace(computing, num_accelerators) if device.id == HOST else problem.device_workspace_bytes
        )
        plans.append(
            DevicePlan(
                device=device.id,
                name=device.name,
                budget_bytes=problem.budgets[device.id],
                weight_bytes=weights,
                mapped_bytes=mapped,
                reservation=Reservation(
                    kv_cache_bytes=problem.cache_of(computing),
                    activation_bytes=problem.pass_bytes - logits_bytes if computing else 0,
                    logits_bytes=logits_bytes if computing else 0,
                    slot_bytes=layout.ring_bytes.get(device.id, 0),
                    workspace_bytes=workspace,
                ),
                level_bytes=problem.level_bytes if device.id == HOST else 0,
            )
        )
    return tuple(plans)


def _held(device: str, assignments: Sequence[Assignment]) -> tuple[int, int]:
    """Bytes of weights on a device: memory of its own, and files used where they lie."""
    weights = mapped = 0
    if device == HOST:
        weights += sum(one.spare_bytes for one in assignments)
    for one in assignments:
        if one.home != device:
            weights += one.unit.kept_bytes if one.compute == device else 0
            continue
        if device != HOST:
            weights += one.unit.memory_bytes
        elif one.compute == HOST:
            mapped += one.unit.mappable_bytes
            weights += one.unit.memory_bytes - one.unit.mappable_bytes
        else:  # a device fetches from page-locked memory only
            weights += one.unit.carried_bytes
    return weights, mapped


def prediction(problem: Problem, layout: Layout, *, generates: bool) -> Prediction:
    """How long everything takes.

    Args:
        problem: units and rates.
        layout: where everything lies.
        generates: whether the model goes on token by token.
    """
    load_s, load_bound_by = _load(problem, layout)
    tally = _tally(layout)
    return Prediction(
        load_s=load_s,
        load_bound_by=load_bound_by,
        prefill=_pass(problem, layout, tally, 1),
        decode=_pass(problem, layout, tally, 0),
        measured=problem.speeds.measured,
        generates=generates,
    )


def _load(problem: Problem, layout: Layout) -> tuple[float, str]:
    """What is kept in memory comes from the disk once, while memory is touched and links carry on."""
    speeds = problem.speeds
    seconds = {"disk": 0.0, "memory": 0.0, "link": 0.0}
    links: dict[str, float] = {}
    for one in layout.assignments:
        unit = one.unit
        seconds["disk"] += (unit.front_bytes + unit.compressed_bytes) / speeds.disk
        seconds["memory"] += unit.kept_bytes / speeds.touch + unit.compressed_bytes / speeds.compress
        if one.home not in speeds.compute:
            continue
        seconds["disk"] += unit.stored_bytes / speeds.disk
        if one.home != HOST:
            links[one.home] = links.get(one.home, 0.0) + unit.stored_bytes / speeds.link[one.home]
        elif one.compute == HOST:
            seconds["memory"] += (unit.memory_bytes - unit.mappable_bytes) / speeds.touch
        else:
            seconds["memory"] += unit.carried_bytes / speeds.touch
    seconds["link"] = max(links.values(), default=0.0)
    bound = max(seconds, key=lambda name: seconds[name])
    return seconds[bound], bound


def _pass(problem: Problem, layout: Layout, tally: _Tally, index: int) -> Pass:
    """A decoding pass (0) or the pass over the prompt (1), over all devices, one after another.

    On each, computing goes on over what is brought in.
    """
    speeds, tokens, first = problem.speeds, problem.tokens[index], index == 1
    total = {"compute": 0.0, "memory": 0.0, "disk": 0.0, "link": 0.0}
    seconds = compute_s = moving_s = fill_s = 0.0
    for device, alike in tally.items():
        rate = speeds.compute[device]
        far_rate = None if device == HOST else rate
        beside = problem.beside_of(one.unit for one in layout.assignments if one.compute == device)[index]
        computing, moving, waiting = beside.seconds(rate), 0.0, 0.0
        total["memory"] += computing
        for one, count in alike:
            done = work(one.unit, rate, one.unit.num_tokens(problem.tokens, index))
            expanding = count * one.unit.compressed_bytes / speeds.expand
            total["memory"] += expanding
            computing += count * done.seconds + expanding
            total["memory" if done.memory_s >= done.arithmetic_s else "compute"] += count * done.seconds
            if one.home != one.compute:
                way = speeds.way(one.home, device)
                brought = alone = 0.0
                for share, home in _comes_from(one, count, alike):
                    there = speeds.way(home, device)
                    brought += share * transfer_s(one.unit, tokens, there, far_rate)
                    alone += share * alone_s(one.unit, tokens, there, far_rate)
                if first and not moving and one.unit.is_slotted:
                    fill_s += brought  # nothing can be computed with the first before it is there
                moving += count * brought
                waiting += count * alone
                if first:
                    comparing = count * compared_s(one.unit, rate, problem.tokens[0])
                    total["memory"] += comparing
                    computing += comparing
                total[way[1]] += count * brought
        seconds += overlapped_s(computing, moving - waiting, layout.num_slots, device) + waiting
        compute_s, moving_s = compute_s + computing, moving_s + moving
    names = ("disk", "link") if moving_s > compute_s else ("compute", "memory")
    return Pass(
        tokens=tokens,
        compute_s=compute_s,
        transfer_s=moving_s,
        seconds=seconds + (fill_s if first and layout.num_slots != 1 else 0.0),
        bound_by=max(names, key=lambda name: total[name]),
    )


def _comes_from(one: Assignment, count: int, alike: Sequence[tuple[Assignment, int]]) -> Iterator[tuple[float, str]]:
    """From where a streamed unit comes, each with the part of its passes: mostly from its home.

    Experts that stay on an accelerator do so until others are chosen more often; those that have no home in host memory
    come from their files then.

    Args:
        one: the unit.
        count: how many there are like it.
        alike: all kinds of units that compute on its device.
    """
    others = 0
    if one.unit.kind is UnitKind.EXPERT and one.home == HOST != one.compute:
        kind = likeness(one.unit)
        others = sum(
            number
            for other, number in alike
            if other.home == other.compute and not other.spare_bytes and likeness(other.unit) == kind
        )
    yield count / (count + others), one.home
    if others:
        yield others / (count + others), DISK


def _tally(layout: Layout) -> _Tally:
    """By compute device: one of each kind of assignment, in execution order, and how many are like it."""
    first: dict[tuple[str, str, tuple[object, ...]], Assignment] = {}
    counts: dict[tuple[str, str, tuple[object, ...]], int] = {}
    for one in layout.assignments:
        key = (one.home, one.compute, likeness(one.unit))
        first.setdefault(key, one)
        counts[key] = counts.get(key, 0) + 1
    found: _Tally = {}
    for key, example in first.items():
        found.setdefault(example.compute, []).append((example, counts[key]))
    return found
