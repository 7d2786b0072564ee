"""The whole machine: which devices compute which part of the walk, and what each of them must keep free.

Three ways are compared: everything on the host; the accelerators one after another, with what they cannot keep brought
to them from host memory or the disk; and the same with what they cannot keep computed where it lies, on the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from loadstone.hardware.spec import Device
from loadstone.plan.budget import SHARED_MEMORY
from loadstone.plan.cost import Beside, Speeds
from loadstone.plan.place import buffer_bytes, place, run_s
from loadstone.plan.reserve import NUM_BUFFERS, PINNED_RING_BYTES, Loading
from loadstone.plan.segment import Assignment, Missing, Placed, Segment
from loadstone.plan.units import Inventory
from loadstone.plan.values import HOST, Unit, UnitKind

_BISECTIONS = 12
# Trying other ways to share units between devices ends after so many were placed: about a tenth of a second.
_MOST_TRIED_UNITS = 700

# What stays together on the walk, with its bytes.
_Step = tuple[int, list[Unit]]
# What a device computes.
_Share = tuple[Device, list[Unit]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Everything that a placement depends on.

    Attributes:
        inventory: the units.
        devices: that may compute, the host last.
        budgets: of every device, in bytes.
        level_bytes: of the host's budget, what the process takes after its imports.
        cache_bytes: by place in execution, what the layer there keeps between passes.
        beside: by place in execution, what the layer there does in either pass beside products with weights.
        pass_bytes: activations and logits of the largest pass, on each device that computes.
        device_workspace_bytes: of an accelerator.
        expanding_bytes: what one needs beside its slots where something travels to it as stored.
        heap_bytes: what the host's allocator keeps beside them and the cache, where it computes.
        loading: what loading needs on the host.
        tokens: of a decoding pass, and of the pass over the prompt.
        num_passes: decoding passes for each pass over a prompt.
        speeds: of the machine.
        offload: whether anything may be streamed.
        fronts: whether the front of a unit may stay while the rest of it is streamed, where the host computes.
        compresses: whether some of that rest may stay compressed.
        host_computes: whether the host may compute beside accelerators.
    """

    inventory: Inventory
    devices: tuple[Device, ...]
    budgets: Mapping[str, int]
    level_bytes: int
    cache_bytes: Mapping[int, int]
    beside: Mapping[int, tuple[Beside, Beside]]
    pass_bytes: int
    device_workspace_bytes: int
    expanding_bytes: int
    heap_bytes: int
    loading: Loading
    tokens: tuple[int, int]
    num_passes: int
    speeds: Speeds
    offload: bool = True
    fronts: bool = True
    compresses: bool = False
    host_computes: bool = True

    def host_workspace(self, computing: Sequence[Unit], num_accelerators: int) -> int:
        """What loading needs on the host beside weights, cache and activations."""
        other = self.cache_of(computing) + self.pass_bytes if computing else 0
        pinned = PINNED_RING_BYTES if num_accelerators else 0
        return self.loading.workspace_bytes(other, self.heap_bytes if computing else 0) + pinned

    def cache_of(self, units: Iterable[Unit]) -> int:
        """What the layers of these units keep between passes."""
        return sum(self.cache_bytes.get(order, 0) for order in _orders(units))

    def beside_of(self, units: Iterable[Unit]) -> tuple[Beside, Beside]:
        """What these units do beside products with their weights: in a decoding pass, then over the prompt."""
        found = [self.beside[order] for order in _orders(units) if order in self.beside]
        return sum((one[0] for one in found), Beside()), sum((one[1] for one in found), Beside())

    def host_room(self, computing: Sequence[Unit], num_accelerators: int) -> int:
        """The host's bytes for weights and slots; below zero where even the rest does not fit."""
        room = self.budgets[HOST] - self.level_bytes - self.host_workspace(computing, num_accelerators)
        return room - (self.cache_of(computing) + self.pass_bytes if computing else 0)

    def device_room(self, device: str) -> int:
        """An accelerator's bytes for weights, slots and cache."""
        return self.budgets[device] - self.pass_bytes - self.device_workspace_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where everything lies.

    Attributes:
        assignments: every unit once, or its parts, in execution order.
        num_slots: of the rings.
        slot_bytes: the most that goes through a slot of a unit that has a front, on the host; 0 where none has.
        read_bytes: the most that is read of a unit of which some stays compressed there; None where none does.
        ring_bytes: by device: the slots of what computes there, and on the host what is on its way to accelerators.
        pass_s: a decoding pass, then the pass over the prompt, to compare layouts; zero where a map leaves no choice.
    """

    assignments: tuple[Assignment, ...]
    num_slots: int
    ring_bytes: Mapping[str, int]
    slot_bytes: int = 0
    read_bytes: int | None = None
    pass_s: tuple[float, float] = (0.0, 0.0)


def best_layout(problem: Problem) -> Layout | Missing:
    """The fastest of all ways that fit.

    Args:
        problem: units, budgets, rates.

    Returns:
        Where everything lies, or the least that is missing.
    """
    found: list[Layout] = []
    missing: list[int] = []
    for layout in _ways(problem):
        if isinstance(layout, Missing):
            missing.append(layout.nbytes)
        else:
            found.append(layout)
    if not found:
        return Missing(nbytes=min(missing))
    return min(found, key=lambda layout: _run_s(problem, layout))  # the first of equals


def _ways(problem: Problem) -> Iterator[Layout | Missing]:
    units = problem.inventory.units
    accelerators = [device for device in problem.devices if device.kind != "cpu"]
    usable = [device for device in accelerators if problem.device_room(device.id) > 0]
    steps = _steps(problem)
    for count in range(1, len(usable) + 1):
        segments = _balanced(problem, steps, usable[:count])
        if segments is not None:
            whole = _on_accelerators(problem, segments)
            yield whole
            if isinstance(whole, Layout):
                return  # all of it is resident; more devices would only pass activations on
            break
    if problem.offload and usable:
        yield _streamed_to(problem, steps, usable)
    discrete = [device for device in usable if device.kind not in SHARED_MEMORY]
    for count in range(len(discrete), 0, -1) if problem.host_computes else ():
        # Each accelerator takes a little of the host, too, so fewer of them can be better.
        beside = _beside_the_host(problem, discrete[:count])
        yield beside
        if isinstance(beside, Layout) and count * len(units) > _MOST_TRIED_UNITS:
            break
    if accelerators and not (problem.offload and usable):
        yield Missing(nbytes=_shortfall(problem, accelerators))
    if problem.host_computes or not accelerators:
        yield _on_the_host(problem, units)


def _shortfall(problem: Problem, devices: Sequence[Device]) -> int:
    needed = sum(unit.memory_bytes for unit in problem.inventory.units) + problem.cache_of(problem.inventory.units)
    return max(1, needed - sum(problem.device_room(device.id) for device in devices))


def _segment(problem: Problem, device: str, units: Sequence[Unit], host_room: int) -> Segment:
    return Segment(
        device=device,
        units=tuple(units),
        parts=problem.inventory.parts,
        room_bytes=host_room if device == HOST else problem.device_room(device) - problem.cache_of(units),
        host_room_bytes=max(0, host_room),
        tokens=problem.tokens,
        num_passes=problem.num_passes,
        beside=problem.beside_of(units),
        speeds=problem.speeds,
        offload=problem.offload,
        fronts=problem.fronts,
        compresses=problem.compresses,
        expanding_bytes=0 if device == HOST else problem.expanding_bytes,
    )


def _on_the_host(problem: Problem, units: Sequence[Unit], num_accelerators: int = 0) -> Layout | Missing:
    placed = place(_segment(problem, HOST, units, problem.host_room(units, num_accelerators)))
    return placed if isinstance(placed, Missing) else _joined({HOST: placed})


def _on_accelerators(
    problem: Problem, segments: Sequence[tuple[Device, Sequence[Unit]]], *, served: Device | None = None
) -> Layout | Missing:
    """Every segment on its device; one of them may be served from host memory and the disk."""
    host_room = problem.host_room((), len(segments))
    placed: dict[str, Placed] = {}
    for device, units in segments:
        if device is served:  # whatever of them will come from the disk
            host_room -= NUM_BUFFERS * max((unit.buffer_bytes for unit in units if unit.is_slotted), default=0)
        if host_room < 0:
            return Missing(nbytes=-host_room)
        # A device that shares the host's memory gains nothing from units that live there.
        room = host_room if device is served and device.kind not in SHARED_MEMORY else 0
        one = place(_segment(problem, device.id, units, room))
        if isinstance(one, Missing):
            return one
        placed[device.id] = one
    return _joined(placed)


def _streamed_to(problem: Problem, steps: Sequence[_Step], devices: Sequence[Device]) -> Layout | Missing:
    """One accelerator is brought what no memory can keep, the first or the last of the walk; the others keep their own.

    Passes go through the devices one after another, so that two links are no faster than one, and each ring takes
    memory that could hold a block.
    """
    missing: list[int] = []
    best: Layout | None = None
    for device, is_first in _servable(problem, devices):
        others = [one for one in devices if one is not device]
        shares = _shares(problem, steps, device, others, is_first=is_first)
        for one in _by_layers_or_experts(problem, shares, device):
            layout = _on_accelerators(problem, one, served=device)
            if isinstance(layout, Missing):
                missing.append(layout.nbytes)
            elif best is None or _run_s(problem, layout) < _run_s(problem, best):
                best = layout
        if best is not None and len(devices) * len(problem.inventory.units) > _MOST_TRIED_UNITS:
            break
    return Missing(nbytes=min(missing)) if best is None else best


def _by_layers_or_experts(problem: Problem, shares: Sequence[_Share], served: Device) -> Iterator[Sequence[_Share]]:
    """What goes to one device comes layer by layer, with all experts, or these come as routers choose them."""
    whole = [(device, problem.inventory.whole_layers(units) if device is served else units) for device, units in shares]
    yield whole
    if whole != list(shares):
        yield shares


def _servable(problem: Problem, devices: Sequence[Device]) -> Iterator[tuple[Device, bool]]:
    """Accelerators to be served, as the first or the last of several; of those that are alike, one."""
    kinds: dict[object, Device] = {}
    for device in devices:
        rate = problem.speeds.compute[device.id]
        kinds.setdefault((problem.device_room(device.id), rate, problem.speeds.link.get(device.id)), device)
    # The largest room first: it is the most likely to be the best.
    for device in sorted(kinds.values(), key=lambda one: -problem.device_room(one.id)):
        yield device, False
        if len(devices) > 1:
            yield device, True


def _shares(
    problem: Problem, steps: Sequence[_Step], served: Device, others: Sequence[Device], *, is_first: bool
) -> list[_Share]:
    """What each device computes: the others as much as they can keep, the one that is served what is left."""
    turn = -1 if is_first else 1
    walk, queue = steps[::turn], others[::turn]
    kept, count = _filled(walk, [problem.device_room(device.id) for device in queue])
    left = [unit for _, units in walk[count:] for unit in units]
    shares = [*zip(queue, kept, strict=True), (served, left)]
    return [(device, sorted(units, key=lambda unit: unit.order)) for device, units in shares if units]


def _run_s(problem: Problem, layout: Layout) -> float:
    return run_s(layout.pass_s, problem.num_passes)


def _beside_the_host(problem: Problem, devices: Sequence[Device]) -> Layout | Missing:
    """The accelerators keep what they can, experts last; the host computes the others where they lie.

    The experts of a layer stay together: classes hold them in one parameter.
    """
    kept: dict[str, list[Unit]] = {}
    queue = list(devices)
    left = problem.device_room(queue[0].id)
    rest: list[Unit] = []
    for size, units in _by_worth(problem):
        while queue and size > left:
            queue.pop(0)
            left = problem.device_room(queue[0].id) if queue else 0
        if queue:
            kept.setdefault(queue[0].id, []).extend(units)
            left -= size
        else:
            rest += units
    host = _on_the_host(problem, rest, len(kept)) if rest else None
    if isinstance(host, Missing):
        return host
    if not rest and problem.host_room((), len(kept)) < 0:
        return Missing(nbytes=-problem.host_room((), len(kept)))
    placed = {}
    for device, members in kept.items():
        one = place(_segment(problem, device, members, 0))
        if isinstance(one, Missing):
            return one
        placed[device] = one
    return _joined(placed, host)


def _by_worth(problem: Problem) -> Iterator[_Step]:
    """What accelerators keep, the most wanted first: what a token needs all of, experts, tables."""
    together: dict[tuple[int, object], list[Unit]] = {}
    for unit in problem.inventory.units:
        is_expert = unit.kind is UnitKind.EXPERT
        rank = 1 if is_expert else 2 if unit.kind is UnitKind.EMBEDDING else 0
        together.setdefault((rank, unit.order if is_expert else unit.name), []).append(unit)
    for (rank, _), units in sorted(together.items(), key=lambda item: item[0][0]):
        cached = 0 if rank == 1 else problem.cache_of(units)
        yield sum(unit.memory_bytes for unit in units) + cached, units


def _joined(placed: Mapping[str, Placed], host: Layout | None = None) -> Layout:
    parts = [one.assignments for one in placed.values()] + ([host.assignments] if host else [])
    together = [assignment for part in parts for assignment in part]
    slots = [one.num_slots for one in placed.values() if one.num_slots] + ([host.num_slots] if host else [])
    seconds = [one.pass_s for one in placed.values()] + ([host.pass_s] if host else [])
    rings = {name: one.ring_bytes for name, one in placed.items()} | (dict(host.ring_bytes) if host else {})
    if buffers := buffer_bytes(together):
        rings[HOST] = rings.get(HOST, 0) + buffers
    return Layout(
        assignments=tuple(sorted(together, key=lambda one: one.unit.order)),
        num_slots=min((count for count in slots if count), default=0),
        slot_bytes=max([one.slot_bytes for one in placed.values()] + ([host.slot_bytes] if host else [])),
        read_bytes=next(
            (one.read_bytes for one in (*placed.values(), host) if one and one.read_bytes is not None), None
        ),
        ring_bytes=rings,
        pass_s=(sum(one[0] for one in seconds), sum(one[1] for one in seconds)),
    )


def _balanced(
    problem: Problem, steps: Sequence[_Step], devices: Sequence[Device]
) -> list[tuple[Device, list[Unit]]] | None:
    """Consecutive shares that are resident whole, each about as full as the others; None where they do not fit."""
    rooms = [problem.device_room(device.id) for device in devices]
    best = _packed(steps, rooms)
    if best is None:
        return None
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS if len(devices) > 1 else 0):
        middle = (low + high) / 2
        packed = _packed(steps, [int(room * middle) for room in rooms])
        low, high, best = (middle, high, best) if packed is None else (low, middle, packed)
    return [(device, units) for device, units in zip(devices, best, strict=True) if units]


def _steps(problem: Problem) -> list[_Step]:
    """The walk in steps that stay together, a block with its experts, each with its bytes."""
    steps: dict[int, list[Unit]] = {}
    for unit in problem.inventory.units:
        steps.setdefault(unit.order, []).append(unit)
    return [(sum(unit.memory_bytes for unit in units) + problem.cache_of(units), units) for units in steps.values()]


def _packed(steps: Sequence[_Step], rooms: Sequence[int]) -> list[list[Unit]] | None:
    """Fill one device after another; None where the last is full too early."""
    shares, count = _filled(steps, rooms)
    return shares if count == len(steps) else None


def _filled(steps: Sequence[_Step], rooms: Sequence[int]) -> tuple[list[list[Unit]], int]:
    """Fill one device after another; gives the share of each, and how many steps found room."""
    shares: list[list[Unit]] = [[] for _ in rooms]
    index, left = -1, -1
    for count, (size, units) in enumerate(steps):
        while size > left:
            index += 1
            if index == len(rooms):
                return shares, count
            left = rooms[index]
        shares[index].extend(units)
        left -= size
    return shares, len(steps)


def _orders(units: Iterable[Unit]) -> set[int]:
    """The places in execution of blocks; experts have none of their own."""
    expert = UnitKind.EXPERT
    return {unit.order for unit in units if unit.kind is not expert}
