"""What comes and goes together: parameters of one unit, as far as the same modules need them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from loadstone.execute.kept import InParts, Lookup, Member, Unit
from loadstone.execute.placeholder import StreamedParameter, Take
from loadstone.execute.residency import Residency
from loadstone.execute.sliced import Sliced
from loadstone.execute.streamed import Streamed
from loadstone.stream.filler import Filler
from loadstone.stream.slices import Slices
from loadstone.stream.sources import Source

FqnOf = Callable[[nn.Parameter], str | None]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a parameter stands in the module: in a module that may be registered under several paths."""

    owner: nn.Module
    name: str
    paths: tuple[str, ...]


Places = dict[str, list[_Place]]


@dataclass(slots=True)
class _Group:
    """Parameters that come together.

    Attributes:
        entries: the paths of the modules whose forward needs them; none for what only comes in parts.
        order: the number of the module that needs them first.
        fqns: their names.
    """

    entries: tuple[str, ...]
    order: int
    fqns: list[str] = field(default_factory=list)


class Grouping:
    """The groups of one module's parameters.

    Args:
        module: the module.
        streamed: what is, or may be, streamed.
        fqn_of: tells the name of what may be streamed, and None for the rest.
        source: of it.
        taken: names that groups have already.
    """

    def __init__(
        self, module: nn.Module, streamed: Streamed, fqn_of: FqnOf, source: Source, taken: Collection[str] = ()
    ) -> None:
        self._streamed = streamed
        self._source = source
        self._places = _places(module, fqn_of)
        self._one_by_one = {fqn: self._places.pop(fqn) for fqn in streamed.experts.tables if fqn in self._places}
        self._by_rows = {
            fqn
            for fqn, found in self._places.items()
            if any(_looks_up(place) for place in found) and source.has_rows(fqn)
        }
        self._slices = {fqn: nbytes for fqn, nbytes in streamed.slices.items() if fqn in self._places}
        number = {path: number for number, (path, _) in enumerate(module.named_modules(remove_duplicate=False))}
        self._groups = self._named(number, taken)

    @property
    def walked(self) -> dict[str, list[str]]:
        """The names of the parameters of each group that modules need."""
        return {name: group.fqns for name, group in self._groups.items() if group.entries}

    @property
    def tables(self) -> dict[str, list[str]]:
        """The same for groups that only come in parts: rows of tables, slices of heads."""
        return {name: group.fqns for name, group in self._groups.items() if not group.entries}

    def units(self, filler: Filler, residency: Residency) -> list[Unit]:
        """Units of the groups; the module is as it was.

        Args:
            filler: fills memory with the groups.
            residency: lends their elements.
        """
        return [self._unit(name, group, filler, residency) for name, group in self._groups.items()]

    def put_experts(self) -> dict[str, list[tuple[nn.Module, StreamedParameter]]]:
        """Put placeholders where experts come one by one; gives them by fqn, with the modules that they stand in."""
        found: dict[str, list[tuple[nn.Module, StreamedParameter]]] = {}
        for fqn, places in self._one_by_one.items():
            member = _member(fqn, fqn.rpartition(".")[0], places)
            found[fqn] = [(place.owner, member.placeholder) for place in places]
            for owner, name in member.owners:
                owner[name] = member.placeholder
        return found

    def _unit(self, name: str, group: _Group, filler: Filler, residency: Residency) -> Unit:
        fqns = group.fqns
        if filler.knows(name):
            fqns = [place.fqn for place in filler.layout(name).places]
        unit = Unit(
            name=name,
            members=tuple(_member(fqn, self._streamed.units[fqn], self._places[fqn]) for fqn in fqns),
            entries=group.entries,
            order=group.order,
        )
        for member in unit.members:
            placeholder = member.placeholder
            placeholder.holder, placeholder.group, placeholder.lender = member.owners[0], name, residency
            unit.in_parts += tuple(self._in_parts(name, member, residency))
        return unit

    def _in_parts(self, unit: str, member: Member, residency: Residency) -> Iterator[InParts]:
        """What a parameter comes in parts for; its placeholder answers with them."""
        fqn, placeholder = member.placeholder.fqn, member.placeholder
        if fqn in self._by_rows:
            rows = Lookup(fqn, partial(self._source.rows, fqn))
            placeholder.lookup = partial(_look_up, residency, unit, fqn, rows)
            yield rows
        if fqn in self._slices:
            slices = Sliced(placeholder, self._slices[fqn], partial(self._slices_of, fqn, unit))
            placeholder.product = partial(_multiply, residency, unit, fqn, slices)
            yield slices

    def _slices_of(self, fqn: str, unit: str) -> Slices:
        if self._source.refill is None:
            raise RuntimeError(f"{fqn}: slices are read from files, and it is in memory")
        return Slices(self._streamed.wanted[fqn], unit, self._source.refill, self._slices[fqn])

    def _named(self, number: Mapping[str, int], taken: Collection[str]) -> dict[str, _Group]:
        """The groups by name, in the order in which the modules that need them are defined."""
        groups: dict[tuple[str, tuple[str, ...], str], _Group] = {}
        for fqn, found in self._places.items():
            unit = self._streamed.units[fqn]
            whole = [place for place in found if not (fqn in self._by_rows and _looks_up(place))]
            whole = [] if fqn in self._slices else whole
            entries = tuple(dict.fromkeys(_entry(place, unit) for place in whole))
            order = number[entries[0] if entries else found[0].paths[0]]
            alone = fqn if fqn in self._slices else ""  # slices are of one matrix
            groups.setdefault((unit, entries, alone), _Group(entries, order)).fqns.append(fqn)
        named: dict[str, _Group] = {}
        for (unit, *_), group in sorted(groups.items(), key=lambda item: item[1].order):
            named[unit if unit not in named and unit not in taken else group.fqns[0]] = group
        return named


def stood_in(streamed: Streamed) -> FqnOf:
    """Tells which streamed parameter something stands for, while the module is put together."""
    by_address = {tensor.data_ptr(): fqn for fqn, tensor in streamed.stand_ins.items()}
    by_identity = {id(parameter): fqn for fqn, parameter in streamed.placed.items()}

    def fqn_of(parameter: nn.Parameter) -> str | None:
        fqn = by_identity.get(id(parameter))
        return by_address.get(parameter.data_ptr()) if fqn is None else fqn

    return fqn_of


def _places(module: nn.Module, fqn_of: FqnOf) -> Places:
    """Where each streamed parameter stands, ties included; those that a tie has replaced stand nowhere."""
    paths: dict[int, list[str]] = {}
    owners: dict[int, nn.Module] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        paths.setdefault(id(owner), []).append(path)
        owners[id(owner)] = owner
    places: Places = {}
    for ident, owner in owners.items():
        for name, parameter in owner._parameters.items():
            if parameter is None or isinstance(parameter, StreamedParameter):
                continue
            fqn = fqn_of(parameter)
            if fqn is not None:
                places.setdefault(fqn, []).append(_Place(owner, name, tuple(paths[ident])))
    return places


def _look_up(residency: Residency, unit: str, fqn: str, rows: Lookup, ids: torch.Tensor, take: Take) -> torch.Tensor:
    return residency.use(unit, fqn, take, partial(rows.look_up, ids, take))


def _multiply(
    residency: Residency, unit: str, fqn: str, slices: Sliced, values: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    def whole(matrix: torch.Tensor) -> torch.Tensor:
        return functional.linear(values, matrix, bias)

    return residency.use(unit, fqn, whole, partial(slices.multiply, values, bias))


def _looks_up(place: _Place) -> bool:
    return isinstance(place.owner, nn.Embedding) and place.name == "weight"


def _entry(place: _Place, unit: str) -> str:
    """The module whose forward needs the parameter there: its unit, or what is tied to it from elsewhere."""
    inside = any(f"{path}.".startswith(f"{unit}.") for path in place.paths)
    return unit if inside else place.paths[0]


def _member(fqn: str, unit: str, places: Sequence[_Place]) -> Member:
    like = places[0].owner._parameters[places[0].name]
    if like is None:
        raise KeyError(fqn)
    return Member(
        placeholder=StreamedParameter(like, fqn=fqn, unit=unit),
        owners=tuple((place.owner._parameters, place.name) for place in places),
    )
