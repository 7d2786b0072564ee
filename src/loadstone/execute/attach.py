"""Which parameters of a module are streamed, and the hooks that have them there when their unit computes."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from loadstone.architecture.keymap import KeyMap, Target
from loadstone.architecture.skeleton import find_owner
from loadstone.checkpoint.values import Checkpoint
from loadstone.events import Observer, ignore
from loadstone.execute.experts import Experts, attach_experts, choose_experts
from loadstone.execute.outside_graphs import outside_graphs
from loadstone.execute.placeholder import StreamedParameter
from loadstone.execute.residency import Member, Residency
from loadstone.execute.values import Streaming
from loadstone.plan.values import HOST
from loadstone.stream.destination import Destination
from loadstone.stream.materialize import torch_dtype
from loadstone.stream.refill import Wanted, can_refill
from loadstone.stream.sources import FileSource, Keep, Source, Way, host_way
from loadstone.stream.transfer import torch_device


@dataclass(slots=True)
class Streamed:
    """The parameters that are not kept in memory.

    Attributes:
        units: the name of the unit of each, by fqn.
        wanted: what fills them, by fqn.
        stand_ins: tensors of their shapes and dtypes that take no memory, for as long as the module is put together.
        placed: the parameters that were made of them: a tie may give one of these new memory and keep it.
        notes: what was to be streamed and is not, and why.
        device: where the module computes.
        experts: those whose entries come one by one.
    """

    units: dict[str, str] = field(default_factory=dict)
    wanted: dict[str, Wanted] = field(default_factory=dict)
    stand_ins: dict[str, torch.Tensor] = field(default_factory=dict)
    placed: dict[str, nn.Parameter] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    experts: Experts = field(default_factory=Experts)

    def note_placed(self, module: nn.Module) -> None:
        """Remember which parameters the stand-ins became; for before the module is finished."""
        found = module.named_parameters(remove_duplicate=False)
        self.placed = {fqn: parameter for fqn, parameter in found if fqn in self.stand_ins}

    def add(self, unit: str, wanted: Wanted) -> None:
        """Stream one more parameter."""
        self.wanted[wanted.fqn] = wanted
        self.stand_in(unit, wanted.fqn, wanted.target)

    def stand_in(self, unit: str, fqn: str, target: Target) -> torch.Tensor:
        """Stream a parameter that may come from anywhere; gives what stands for it meanwhile."""
        self.units[fqn] = unit
        nothing = torch.zeros(1, dtype=torch_dtype(target.dtype), device=self.device)
        self.stand_ins[fqn] = nothing.expand(target.shape)
        return self.stand_ins[fqn]


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
    experts = Experts()
    if streaming.device == HOST:
        experts = choose_experts(keymap, targets, checkpoint.tensors, streaming)
    chosen = Streamed(device=torch_device(streaming.device), experts=experts)
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
        entries: the paths of the modules whose forward needs them.
        fqns: their names.
    """

    entries: tuple[str, ...]
    fqns: list[str] = field(default_factory=list)


def attach(
    module: nn.Module, streamed: Streamed, checkpoint: Checkpoint, streaming: Streaming, observer: Observer
) -> Residency:
    """The same as `attach_to`, for units that come from files.

    Args:
        module: the module, with stand-ins and ties in place.
        streamed: what is streamed.
        checkpoint: where it comes from.
        streaming: where to, how many at a time, and which of them by way of host memory.
        observer: is told of bytes, and of the progress of each forward.
    """

    def keep(fqn: str) -> Keep:
        sources = {part.source for part in streamed.wanted[fqn].assignment.parts}
        # Blocks of an encoding would be kept decoded, which takes more than the plan has counted.
        plain = all(checkpoint.tensors[name].encoding is None for name in sources)
        return Keep.HOST if plain and sources <= streaming.in_memory else Keep.DISK

    way = host_way() if streaming.device == HOST else Way(destination=Destination(streamed.device), keep=keep)
    source = FileSource(streamed.wanted, checkpoint, way, observer)
    return attach_to(module, streamed, source, streaming.num_slots, observer)


def attach_to(
    module: nn.Module, streamed: Streamed, source: Source, num_slots: int, observer: Observer = ignore
) -> Residency:
    """Make a module that is complete but for its streamed parameters usable.

    Args:
        module: the module, with stand-ins and ties in place.
        streamed: what is streamed.
        source: where it comes from, and how it travels.
        num_slots: how many units are in memory at a time; more where units lie within one another.
        observer: is told of the progress of each forward.

    Returns:
        What keeps the module running; it ends when the module does.
    """
    places = _places(module, streamed)
    by_rows = {
        fqn for fqn, found in places.items() if any(_looks_up(place) for place in found) and source.has_rows(fqn)
    }
    one_by_one = {fqn: places.pop(fqn) for fqn in streamed.experts.tables if fqn in places}
    groups = _groups(module, streamed, places, by_rows)
    filler = source.filler({name: group.fqns for name, group in groups.items()})
    members = {fqn: _member(fqn, streamed.units[fqn], found) for fqn, found in places.items()}
    units = {name: [members[place.fqn] for place in filler.layout(name).places] for name in groups}
    residency = Residency(units, filler, max(num_slots, _deepest(groups)), observer)
    group_of = {fqn: name for name, group in groups.items() for fqn in group.fqns}
    for fqn, member in members.items():
        member.placeholder.holder = member.owners[0]
        if fqn in group_of:
            member.placeholder.group, member.placeholder.lender = group_of[fqn], residency
        if fqn in by_rows:
            rows, table = source.rows(fqn)
            member.placeholder.lookup = partial(residency.look_up, rows, table, fqn)
        for owner, name in member.owners:
            owner[name] = member.placeholder
    if source.refill is not None:
        residency.hooks += attach_experts(_stand_in(one_by_one), streamed.experts, source.refill, residency)
    residency.hooks += _hook(module, groups, residency)
    weakref.finalize(module, residency.close)
    return residency


def _stand_in(places: Mapping[str, Sequence[_Place]]) -> dict[str, list[tuple[nn.Module, StreamedParameter]]]:
    """Put placeholders where experts come one by one; gives them by fqn, with the modules that they stand in."""
    found: dict[str, list[tuple[nn.Module, StreamedParameter]]] = {}
    for fqn, several in places.items():
        member = _member(fqn, fqn.rpartition(".")[0], several)
        found[fqn] = [(place.owner, member.placeholder) for place in several]
        for owner, name in member.owners:
            owner[name] = member.placeholder
    return found


def _places(module: nn.Module, streamed: Streamed) -> dict[str, list[_Place]]:
    """Where each streamed parameter stands, ties included; those that a tie has replaced stand nowhere."""
    paths: dict[int, list[str]] = {}
    owners: dict[int, nn.Module] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        paths.setdefault(id(owner), []).append(path)
        owners[id(owner)] = owner
    by_address = {tensor.data_ptr(): fqn for fqn, tensor in streamed.stand_ins.items()}
    by_identity = {id(parameter): fqn for fqn, parameter in streamed.placed.items()}
    places: dict[str, list[_Place]] = {}
    for ident, owner in owners.items():
        for name, parameter in owner._parameters.items():
            fqn = by_identity.get(id(parameter))
            if fqn is None and parameter is not None:
                fqn = by_address.get(parameter.data_ptr())
            if fqn is not None:
                places.setdefault(fqn, []).append(_Place(owner, name, tuple(paths[ident])))
    return places


def _looks_up(place: _Place) -> bool:
    return isinstance(place.owner, nn.Embedding) and place.name == "weight"


def _groups(
    module: nn.Module, streamed: Streamed, places: Mapping[str, Sequence[_Place]], by_rows: Collection[str]
) -> dict[str, _Group]:
    """What comes together, by name, in the order in which the modules that need it are defined."""
    groups: dict[tuple[str, tuple[str, ...]], _Group] = {}
    for fqn, found in places.items():
        unit = streamed.units[fqn]
        whole = [place for place in found if not (fqn in by_rows and _looks_up(place))]
        entries = tuple(dict.fromkeys(_entry(place, unit) for place in whole))
        if entries:
            groups.setdefault((unit, entries), _Group(entries)).fqns.append(fqn)
    number = {path: number for number, (path, _) in enumerate(module.named_modules(remove_duplicate=False))}
    named: dict[str, _Group] = {}
    for (unit, _), group in sorted(groups.items(), key=lambda item: number[item[1].entries[0]]):
        named[unit if unit not in named else group.fqns[0]] = group
    return named


def _entry(place: _Place, unit: str) -> str:
    """The module whose forward needs the parameter there: its unit, or what is tied to it from elsewhere."""
    inside = any(f"{path}.".startswith(f"{unit}.") for path in place.paths)
    return unit if inside else place.paths[0]


def _deepest(groups: Mapping[str, _Group]) -> int:
    """How many groups can be needed at once, because their modules lie within one another."""
    entries = [entry for group in groups.values() for entry in group.entries]
    return max((sum(f"{inner}.".startswith(f"{outer}.") for outer in entries) for inner in entries), default=0)


def _member(fqn: str, unit: str, places: Sequence[_Place]) -> Member:
    like = places[0].owner._parameters[places[0].name]
    if like is None:
        raise KeyError(fqn)
    return Member(
        placeholder=StreamedParameter(like, fqn=fqn, unit=unit),
        owners=tuple((place.owner._parameters, place.name) for place in places),
    )


def _hook(module: nn.Module, groups: Mapping[str, _Group], residency: Residency) -> Iterator[RemovableHandle]:
    for name, group in groups.items():
        for entry in group.entries:
            found = module.get_submodule(entry)
            yield found.register_forward_pre_hook(outside_graphs(partial(residency.enter, name)), prepend=True)
            yield found.register_forward_hook(outside_graphs(partial(residency.leave, name)), always_call=True)
    yield module.register_forward_pre_hook(outside_graphs(residency.begin_pass), prepend=True)
    yield module.register_forward_hook(outside_graphs(residency.end_pass), always_call=True)
