"""What `offload` is asked for, checked, and what follows: which parts of a module stay, and where the others are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from loadstone.dtypes import DTYPES
from loadstone.errors import DoesNotFit
from loadstone.execute.values import NUM_SLOTS, States
from loadstone.hardware.probe import probe
from loadstone.hardware.spec import Machine
from loadstone.plan.budget import device_id
from loadstone.plan.cost import Beside, speeds_of
from loadstone.plan.place import place, spread
from loadstone.plan.segment import Missing, Segment
from loadstone.plan.values import DISK, HOST, Unit, UnitKind
from loadstone.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from torch import nn

    from loadstone.execute.adopt import Origin
    from loadstone.execute.divide import Part
    from loadstone.stream.way import Keep

# Of what is free on the device, where nobody says how much; caches and activations need some too.
_USUAL_SHARE = 0.8
# What the choice is made for: a text of this many tokens goes in, and as many come out.
_TOKENS = 512
_UNBOUNDED = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What goes where.

    Attributes:
        device: the id of the device that computes.
        reason: why that one.
        computing_dtype: of floating-point parameters; None as they are.
        away: what comes and goes.
        keep: where a parameter is kept that does, by fqn.
        rounding: the dtype that a parameter is rounded to where it is kept, by fqn.
        on_disk: whether what comes and goes is on the disk, at home or where it is parked.
        parking: where the module can be parked, the usual place first.
        num_slots: how many units are at hand at a time.
        text: all of it in a line.
    """

    device: str
    reason: str
    computing_dtype: str | None
    away: tuple[Part, ...]
    keep: Callable[[str], Keep]
    rounding: Callable[[str], str | None]
    on_disk: bool
    parking: tuple[str, ...]
    num_slots: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """The parts of a module in bytes.

    Attributes:
        parts: all of them.
        units: the same for the planner.
        other_bytes: what belongs to no part, buffers included.
    """

    parts: tuple[Part, ...]
    units: tuple[Unit, ...]
    other_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What `offload` is asked for; see there."""

    device: str | None = None
    max_memory: str | int | None = None
    home: str = HOST
    dtype: str | None = None
    states: States | None = None


def chosen(model: nn.Module, asked: Asked, origin: Origin | None = None) -> Chosen:
    """Work out what `offload` does; see there for errors.

    Args:
        model: the module.
        asked: what it is asked for.
        origin: where the module was loaded from, if it was.
    """
    machine, home, dtype, states = probe(), asked.home, asked.dtype, asked.states
    if home not in (HOST, DISK):
        raise ValueError(f'home="{home}": expected "cpu" or "disk".')
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(
            f"{type(model).__name__}: expected a module that is loaded, found parameters on meta; load it first."
        )
    if states is None:
        place_id = device_id(asked.device, machine) if asked.device is not None else machine.devices[0].id
        states = States(ready=(home, dtype), staged=(place_id, dtype), computing=(place_id, None))
    elif replace(asked, states=None) != Asked():
        raise ValueError("states= says everything; leave device=, max_memory=, home= and dtype= out.")
    _check(states, machine)
    on_the_way = _on_the_way(origin) if origin is not None and states.on_disk else _OnTheWay()
    return _chosen(model, states, machine, asked.max_memory, on_the_way)


def _check(states: States, machine: Machine) -> None:
    computing = device_id(states.computing[0], machine)
    if states.ready[0] not in (HOST, DISK):
        raise ValueError(f'states: ready on "{states.ready[0]}"; expected "disk" or "cpu".')
    if states.resting[0] not in (HOST, DISK):
        raise ValueError(f'states: parked on "{states.resting[0]}"; expected "disk" or "cpu".')
    near = states.staged[0] if states.staged[0] in (HOST, DISK) else device_id(states.staged[0], machine)
    if near not in (states.ready[0], HOST, computing):
        raise ValueError(
            f'states: staged on "{near}"; expected the home "{states.ready[0]}", "cpu" or the computing "{computing}".'
        )
    for state in (states.resting, states.ready, states.staged, states.computing):
        if state[1] is not None and (state[1] not in DTYPES or not DTYPES[state[1]].floating):
            raise ValueError(f'states: "{state[1]}" is no floating-point dtype that torch has.')


@dataclass(frozen=True, slots=True, kw_only=True)
class _OnTheWay:
    """What the parameters of a model need on their way from its files.

    Attributes:
        rearranged_bytes: what putting each in order takes at most, as plans count it: decoded to float32, and then
            moved.
        expanding_bytes: what a device needs to make the most demanding of what is stored.
    """

    rearranged_bytes: Mapping[str, int] = field(default_factory=dict)
    expanding_bytes: int = 0


def _on_the_way(origin: Origin) -> _OnTheWay:
    from loadstone.stream.rearrange import is_rearranged
    from loadstone.stream.stored import stored_form

    rearranged: dict[str, int] = {}
    expanding = 0
    for fqn, one in origin.wanted.items():
        parts = [(part, origin.checkpoint.tensors[part.source]) for part in one.assignment.parts]
        rearranged[fqn] = sum(4 * info.numel for part, info in parts if is_rearranged(part, info))
        form = stored_form(one.assignment, one.target, origin.checkpoint.tensors)
        expanding = max(expanding, form.expanding_bytes if form is not None else 0)
    return _OnTheWay(rearranged_bytes=rearranged, expanding_bytes=expanding)


def _chosen(
    model: nn.Module, states: States, machine: Machine, max_memory: str | int | None, on_the_way: _OnTheWay
) -> Chosen:
    from loadstone.execute.divide import divided
    from loadstone.stream.way import Keep

    device = device_id(states.computing[0], machine)
    rounding = _rounding(model, states)
    sizes = _sizes(model, divided(model), states, rounding, on_the_way.rearranged_bytes)
    expanding = 0 if device == HOST else on_the_way.expanding_bytes
    home = Keep.DISK if states.ready[0] == DISK else Keep.HOST
    near = states.staged[0] if states.staged[0] in (HOST, DISK) else device_id(states.staged[0], machine)
    if near == device and not any(map(rounding, _fqns(sizes.parts))) and states.staged_bytes is None:
        room = _room(machine, device, max_memory) - expanding
        away, num_slots = _streamed(sizes, machine, device, room)
        staged: set[str] = set()
    else:
        blocks = [unit for unit in sizes.units if unit.kind is UnitKind.BLOCK]
        num_slots, limit = NUM_SLOTS, states.staged_bytes
        if near == device != states.ready[0] and limit is None:
            limit = _left_for_staged(sizes, num_slots, _room(machine, device, max_memory) - expanding, device)
        staged = _staged(blocks, _UNBOUNDED if limit is None else limit) if near != states.ready[0] else set()
        rounds = any(map(rounding, _fqns(sizes.parts)))
        away = {unit.name for unit in blocks if rounds or near != device or unit.name not in staged}
    beside = Keep.NEAR if near == device else Keep.HOST
    kept_near = set(_fqns([part for part in sizes.parts if part.unit in staged]))
    parts = tuple(part for part in sizes.parts if part.unit in away)
    stays = sum(unit.memory_bytes for unit in sizes.units if unit.name not in away) + sizes.other_bytes
    return Chosen(
        device=device,
        reason="asked for" if len(machine.devices) > 1 else "no accelerator here",
        computing_dtype=states.computing[1],
        away=parts,
        keep=lambda fqn: beside if fqn in kept_near else home,
        rounding=rounding,
        on_disk=states.on_disk,
        parking=_parking(device, states),
        num_slots=num_slots,
        text=f"{format_bytes(stays)} stay on {device}, {len(parts)} units come and go"
        + (f", {len(staged)} of them kept near" if staged else ""),
    )


def _parking(device: str, states: States) -> tuple[str, ...]:
    """Where the module can be parked: not where it computes, and not on a disk that holds nothing of it."""
    places = dict.fromkeys((states.resting[0], states.ready[0], HOST))
    return tuple("ram" if place == HOST else place for place in places if place != device)


def _fqns(parts: Sequence[Part]) -> list[str]:
    return [fqn for part in parts for fqn in part.fqns]


def _rounding(model: nn.Module, states: States) -> Callable[[str], str | None]:
    """Matrices of blocks are rounded to the narrowest of what they are kept in."""
    from loadstone.execute.divide import divided

    asked = [dtype for _, dtype in (states.resting, states.ready, states.staged) if dtype is not None]
    found: dict[str, str] = {}
    parameters = dict(model.named_parameters())
    for part in divided(model):
        for fqn in part.fqns if part.kind is UnitKind.BLOCK and asked else ():
            narrow = min(asked, key=lambda dtype: DTYPES[dtype].bits)
            parameter = parameters[fqn]
            own = 8 * parameter.element_size()
            if parameter.dim() > 1 and parameter.is_floating_point() and DTYPES[narrow].bits < own:
                found[fqn] = narrow
    return found.get


def _sizes(
    model: nn.Module,
    parts: tuple[Part, ...],
    states: States,
    rounding: Callable[[str], str | None],
    rearranged: Mapping[str, int],
) -> _Sizes:
    from loadstone.execute.divide import as_units

    parameters = dict(model.named_parameters())
    kept = {
        fqn: one.numel() * (DTYPES[dtype].bits // 8 if (dtype := rounding(fqn)) else one.element_size())
        for fqn, one in parameters.items()
    }
    width = DTYPES[states.computing[1]].bits // 8 if states.computing[1] else None
    computed = {
        fqn: one.numel() * (width if width and one.is_floating_point() else one.element_size())
        for fqn, one in parameters.items()
    }
    inside = set(_fqns(parts))
    other_bytes = sum(nbytes for fqn, nbytes in computed.items() if fqn not in inside)
    other_bytes += sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    return _Sizes(parts=parts, units=as_units(parts, model, kept, computed, rearranged), other_bytes=other_bytes)


def _room(machine: Machine, device: str, max_memory: str | int | None) -> int:
    if max_memory is not None:
        return parse_bytes(max_memory, option="max_memory")
    return int(_USUAL_SHARE * next(one.free_bytes for one in machine.devices if one.id == device))


def _streamed(sizes: _Sizes, machine: Machine, device: str, room: int) -> tuple[set[str], int]:
    """What does not stay on the device, by the planner's rules, and the slots that it goes through."""
    segment = Segment(
        device=device,
        units=sizes.units,
        parts=lambda unit: (unit,),
        room_bytes=room - sizes.other_bytes,
        host_room_bytes=_UNBOUNDED,
        tokens=(1, _TOKENS),
        num_passes=_TOKENS,
        beside=(Beside(), Beside()),
        speeds=speeds_of(machine, "bfloat16"),
    )
    placed = place(segment)
    if isinstance(placed, Missing):
        raise _too_little(device, room, placed.nbytes)
    away = {one.unit.name for one in placed.assignments if one.home != one.compute}
    return away, placed.num_slots or NUM_SLOTS


def _left_for_staged(sizes: _Sizes, num_slots: int, room: int, device: str) -> int:
    """What is left of the device for staged blocks, beside slots and all that is in no block."""
    slots = [unit.slot_bytes_on(device) for unit in sizes.units if unit.kind is UnitKind.BLOCK]
    others = sum(unit.memory_bytes for unit in sizes.units if unit.kind is not UnitKind.BLOCK)
    left = room - sizes.other_bytes - others - num_slots * max(slots, default=0)
    if left < 0:
        raise _too_little(device, room, -left)
    return left


def _too_little(device: str, room: int, missing: int) -> DoesNotFit:
    return DoesNotFit(
        f"offload: expected room on {device} for one block at a time and what always stays, found "
        f"{format_bytes(max(0, room))}, {format_bytes(missing)} less than that; raise max_memory=.",
        shortfall_bytes=missing,
    )


def _staged(blocks: Sequence[Unit], limit: int) -> set[str]:
    """As many blocks as the limit holds, what is left out spread evenly between them."""
    for count in range(len(blocks), 0, -1):
        left_out = set(spread(len(blocks), count))
        names = {unit.name for index, unit in enumerate(blocks) if index not in left_out}
        if sum(unit.stored_bytes for unit in blocks if unit.name in names) <= limit:
            return names
    return set()
