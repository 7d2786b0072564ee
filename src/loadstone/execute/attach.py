"""Which parameters of a module are streamed, and the hooks that have them there when their unit computes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod

import torch
from torch import nn

from loadstone.architecture.keymap import KeyMap, Target
from loadstone.architecture.skeleton import find_owner
from loadstone.checkpoint.values import Checkpoint
from loadstone.events import Observer
from loadstone.execute.experts import Experts, attach_experts, choose_experts
from loadstone.execute.hooks import Hooks
from loadstone.execute.kept import Member, Table, Unit
from loadstone.execute.placeholder import StreamedParameter
from loadstone.execute.residency import Adopt, Residency
from loadstone.execute.values import Streaming
from loadstone.stream.materialize import torch_dtype
from loadstone.stream.refill import Refill, Wanted, can_refill
from loadstone.stream.rows import has_rows

FqnOf = Callable[[nn.Parameter], str | None]


@dataclass(slots=True)
class Streamed:
    """The parameters that are not kept in memory.

    Attributes:
        units: the name of the unit of each, by fqn.
        wanted: what fills them, by fqn.
        stand_ins: tensors of their shapes and dtypes that take no memory, for as long as the module is put together.
        placed: the parameters that were made of them: a tie may give one of these new memory and keep it.
        notes: what was to be streamed and is not, and why.
        experts: those whose entries come one by one.
    """

    units: dict[str, str] = field(default_factory=dict)
    wanted: dict[str, Wanted] = field(default_factory=dict)
    stand_ins: dict[str, torch.Tensor] = field(default_factory=dict)
    placed: dict[str, nn.Parameter] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    experts: Experts = field(default_factory=Experts)

    def note_placed(self, module: nn.Module) -> None:
        """Remember which parameters the stand-ins became; for before the module is finished."""
        found = module.named_parameters(remove_duplicate=False)
        self.placed = {fqn: parameter for fqn, parameter in found if fqn in self.stand_ins}

    def add(self, unit: str, wanted: Wanted) -> None:
        """Stream one more parameter."""
        fqn, target = wanted.fqn, wanted.target
        self.units[fqn], self.wanted[fqn] = unit, wanted
        self.stand_ins[fqn] = torch.zeros(1, dtype=torch_dtype(target.dtype)).expand(target.shape)


def choose_streamed(
    module: nn.Module, keymap: KeyMap, targets: Mapping[str, Target], checkpoint: Checkpoint, streaming: Streaming
) -> Streamed:
    """Find the parameters of the units that are to be streamed.

    Args:
        module: the module on meta.
        keymap: what fills what.
        targets: shape and dtype by fqn.
        checkpoint: where it comes from.
        streaming: the units.

    Returns:
        Those that can be read anew in each pass; the notes name the others, which are loaded as ever.
    """
    chosen = Streamed(experts=choose_experts(keymap, targets, checkpoint.tensors, streaming))
    computed = {unit for conversion in keymap.conversions if (unit := _unit_of(conversion.name, streaming))}
    chosen.notes += [f"{unit} is kept in memory as far as transformers has to compute it" for unit in sorted(computed)]
    parameters = {fqn for fqn, _ in module.named_parameters(remove_duplicate=False)}
    kept = {unit: reason for unit in streaming.units if (reason := _reason_to_keep(module, unit))}
    chosen.notes += [f"{unit} is kept in memory: {reason}" for unit, reason in kept.items()]
    for assignment in keymap.assignments:
        fqn = assignment.target
        unit = _unit_of(fqn, streaming)
        if fqn in chosen.experts.tables:
            chosen.add(fqn.rpartition(".")[0], chosen.experts.tables[fqn].wanted)
            continue
        if (
            fqn in chosen.experts.kept
            or unit is None
            or unit in kept
            or fqn not in parameters
            or not prod(targets[fqn].shape)
        ):
            continue
        if streaming.unit_of and not any(part.source in streaming.unit_of for part in assignment.parts):
            continue
        wanted = Wanted(assignment=assignment, target=targets[fqn])
        if isinstance(find_owner(module, fqn)[0], nn.RNNBase):
            chosen.notes.append(f"{fqn} is kept in memory: its class holds on to it")
        elif not can_refill(wanted, checkpoint.tensors):
            chosen.notes.append(f"{fqn} is kept in memory: only torch can convert it")
        else:
            chosen.add(unit, wanted)
    return chosen


def by_modules(keymap: KeyMap, streaming: Streaming) -> Streaming:
    """The same, told by modules: a unit is the module that the plan names, or else the owner of each parameter.

    Args:
        keymap: what fills what.
        streaming: tensors by their names in the checkpoint.
    """
    units: dict[str, None] = {}
    for assignment in keymap.assignments:
        unit = next((unit for part in assignment.parts if (unit := streaming.unit_of.get(part.source))), None)
        if unit is not None:
            units[_module_of(assignment.target, unit)] = None
    return replace(streaming, units=tuple(units))


def _module_of(fqn: str, unit: str) -> str:
    """The path that ends as the unit is called: a checkpoint of a base model names its blocks without the prefix."""
    *owners, _ = fqn.split(".")
    paths = [".".join(owners[:end]) for end in range(1, len(owners) + 1)]
    return next((path for path in paths if path == unit or path.endswith(f".{unit}")), paths[-1] if paths else "")


def _unit_of(fqn: str, streaming: Streaming) -> str | None:
    """The innermost unit that a name belongs to."""
    return max((unit for unit in streaming.units if fqn.startswith(f"{unit}.")), key=len, default=None)


def _reason_to_keep(module: nn.Module, unit: str) -> str | None:
    try:
        found = module.get_submodule(unit)
    except AttributeError:
        return "it is no module"
    # Containers are not called, so that nothing tells when their parameters are needed.
    is_container = isinstance(found, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)
    return "it is a container of modules" if is_container else None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a parameter stands in the module: in a module that may be registered under several paths."""

    owner: nn.Module
    name: str
    paths: tuple[str, ...]


@dataclass(slots=True)
class _Group:
    """Parameters that come together: one unit's, as far as the same modules need them.

    Attributes:
        entries: the paths of the modules whose forward needs them; none for what is only looked up by rows.
        order: the number of the module that needs them first.
        fqns: their names.
    """

    entries: tuple[str, ...]
    order: int
    fqns: list[str] = field(default_factory=list)


def attach(
    module: nn.Module,
    streamed: Streamed,
    checkpoint: Checkpoint,
    num_slots: int,
    observer: Observer,
    adopt: Adopt | None = None,
) -> Residency:
    """Make a module that is complete but for its streamed parameters usable; `start` what comes back.

    Args:
        module: the module, with stand-ins and ties in place.
        streamed: what is streamed.
        checkpoint: where it comes from.
        num_slots: how many units are in memory at a time; more where units lie within one another.
        observer: is told of bytes.
        adopt: finds what was loaded to stay, once it is to go.

    Returns:
        What keeps the module running; it ends when the module does.
    """
    refill = Refill({}, checkpoint, observer)
    residency = Residency(refill, num_slots, Hooks(module), adopt, observer)
    fqn_of = _stood_in(streamed)
    _attach_experts(module, streamed, fqn_of, residency)
    units = make_units(module, streamed, fqn_of, residency)
    for unit in units:
        unit.put_placeholders()
    residency.take_on(units)
    weakref.finalize(module, residency.close)
    return residency


def make_units(
    module: nn.Module,
    streamed: Streamed,
    fqn_of: FqnOf,
    residency: Residency,
    taken: Collection[str] = (),
) -> list[Unit]:
    """What comes and goes together.

    Args:
        module: the module.
        streamed: what is, or may be, streamed.
        fqn_of: tells the name of what may be streamed, and None for the rest.
        residency: lends their elements.
        taken: names that units have already.

    Returns:
        The units, which `residency.refill` knows; the module is as it was.
    """
    refill = residency.refill
    places = _places(module, fqn_of)
    by_rows = {
        fqn
        for fqn, found in places.items()
        if any(_looks_up(place) for place in found) and has_rows(streamed.wanted[fqn], refill.tensors)
    }
    groups = _groups(module, streamed, places, by_rows, taken)
    refill.add({name: [streamed.wanted[fqn] for fqn in group.fqns] for name, group in groups.items()})
    return [_unit(name, group, streamed, places, residency, by_rows) for name, group in groups.items()]


def _stood_in(streamed: Streamed) -> FqnOf:
    """Tells which streamed parameter something stands for, while the module is put together."""
    by_address = {tensor.data_ptr(): fqn for fqn, tensor in streamed.stand_ins.items()}
    by_identity = {id(parameter): fqn for fqn, parameter in streamed.placed.items()}

    def fqn_of(parameter: nn.Parameter) -> str | None:
        fqn = by_identity.get(id(parameter))
        return by_address.get(parameter.data_ptr()) if fqn is None else fqn

    return fqn_of


def _attach_experts(module: nn.Module, streamed: Streamed, fqn_of: FqnOf, residency: Residency) -> None:
    """Put placeholders where experts come one by one, and have them come."""
    places = _places(module, fqn_of)
    found: dict[str, list[tuple[nn.Module, StreamedParameter]]] = {}
    for fqn in streamed.experts.tables:
        if fqn not in places:
            continue
        member = _member(streamed, fqn, places[fqn])
        found[fqn] = [(place.owner, member.placeholder) for place in places[fqn]]
        for owner, name in member.owners:
            owner[name] = member.placeholder
    attach_experts(found, streamed.experts, residency.refill, residency)


def _unit(
    name: str,
    group: _Group,
    streamed: Streamed,
    places: Mapping[str, Sequence[_Place]],
    residency: Residency,
    by_rows: Collection[str],
) -> Unit:
    refill = residency.refill
    fqns = [place.fqn for place in refill.recipes[name].places]
    unit = Unit(
        name=name,
        members=tuple(_member(streamed, fqn, places[fqn]) for fqn in fqns),
        entries=group.entries,
        order=group.order,
        tables={fqn: Table(streamed.wanted[fqn], refill) for fqn in fqns if fqn in by_rows},
    )
    for member in unit.members:
        placeholder, fqn = member.placeholder, member.wanted.fqn
        placeholder.holder, placeholder.group, placeholder.lender = member.owners[0], name, residency
        if fqn in by_rows:
            placeholder.lookup = partial(residency.look_up, name, fqn)
    return unit


def _places(module: nn.Module, fqn_of: FqnOf) -> dict[str, list[_Place]]:
    """Where each parameter stands, ties included; those that a tie has replaced stand nowhere."""
    paths: dict[int, list[str]] = {}
    owners: dict[int, nn.Module] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        paths.setdefault(id(owner), []).append(path)
        owners[id(owner)] = owner
    places: dict[str, list[_Place]] = {}
    for ident, owner in owners.items():
        for name, parameter in owner._parameters.items():
            if parameter is None or isinstance(parameter, StreamedParameter):
                continue
            fqn = fqn_of(parameter)
            if fqn is not None:
                places.setdefault(fqn, []).append(_Place(owner, name, tuple(paths[ident])))
    return places


def _looks_up(place: _Place) -> bool:
    return isinstance(place.owner, nn.Embedding) and place.name == "weight"


def _groups(
    module: nn.Module,
    streamed: Streamed,
    places: Mapping[str, Sequence[_Place]],
    by_rows: Collection[str],
    taken: Collection[str],
) -> dict[str, _Group]:
    """What comes together, by name, in the order in which the modules that need it are defined."""
    number = {path: number for number, (path, _) in enumerate(module.named_modules(remove_duplicate=False))}
    groups: dict[tuple[str, tuple[str, ...]], _Group] = {}
    for fqn, found in places.items():
        unit = streamed.units[fqn]
        whole = [place for place in found if not (fqn in by_rows and _looks_up(place))]
        entries = tuple(dict.fromkeys(_entry(place, unit) for place in whole))
        order = number[entries[0] if entries else found[0].paths[0]]
        groups.setdefault((unit, entries), _Group(entries, order)).fqns.append(fqn)
    named: dict[str, _Group] = {}
    for (unit, _), group in sorted(groups.items(), key=lambda item: item[1].order):
        named[unit if unit not in named and unit not in taken else group.fqns[0]] = group
    return named


def _entry(place: _Place, unit: str) -> str:
    """The module whose forward needs the parameter there: its unit, or what is tied to it from elsewhere."""
    inside = any(f"{path}.".startswith(f"{unit}.") for path in place.paths)
    return unit if inside else place.paths[0]


def _member(streamed: Streamed, fqn: str, places: Sequence[_Place]) -> Member:
    like = places[0].owner._parameters[places[0].name]
    if like is None:
        raise KeyError(fqn)
    return Member(
        placeholder=StreamedParameter(like, fqn=fqn, unit=streamed.units[fqn]),
        owners=tuple((place.owner._parameters, place.name) for place in places),
        wanted=streamed.wanted[fqn],
    )
