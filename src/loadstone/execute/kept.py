"""Units that stay in memory until they are asked to go, and come back as they were."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from loadstone.execute.placeholder import StreamedParameter, Take
from loadstone.execute.slots import Ring, Slot
from loadstone.execute.spread import Piece
from loadstone.hardware.pages import give_back, unmap_clean, whole_pages
from loadstone.stream.filler import Filler, Filling, Layout
from loadstone.stream.rows import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One parameter of a unit.

    Attributes:
        placeholder: what stands for it.
        owners: the parameter dicts of the modules that hold it, with its name there.
    """

    placeholder: StreamedParameter
    owners: tuple[tuple[dict[str, Any], str], ...]

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self.placeholder.numel() * self.placeholder.element_size()

    def can_be_stored(self) -> bool:
        """Whether what stands in its places is one parameter like it, with nothing that a copy would lose."""
        there = {id(found): found for found in (owner.get(name) for owner, name in self.owners)}
        found, *others = there.values()
        if others or not isinstance(found, nn.Parameter):
            return False
        return found.grad is None and (found.shape, found.dtype) == (self.placeholder.shape, self.placeholder.dtype)


@dataclass(frozen=True, slots=True)
class Home:
    """A parameter as it was put in its place, to tell later whether it is the same still.

    Attributes:
        parameter: it, for as long as somebody else holds it.
        address: of its elements.
        version: torch's count of changes in place.
    """

    parameter: weakref.ref[nn.Parameter]
    address: int
    version: int

    @classmethod
    def of(cls, parameter: nn.Parameter) -> Home:
        """What there is to know of a parameter now."""
        return cls(weakref.ref(parameter), parameter.data_ptr(), parameter._version)

    def is_unchanged(self, found: Any) -> bool:
        """Whether what is found in its place holds what it held, and nothing that would be lost with it."""
        put = self.parameter()
        if put is None or found is not put:
            return False
        return put.grad is None and (put.data_ptr(), put._version) == (self.address, self.version)


class Lookup:
    """A parameter of which rows are looked up while it is not kept.

    Args:
        fqn: its name.
        make: gives what brings rows in, and the tensor on the host that they are in then.
    """

    def __init__(self, fqn: str, make: Callable[[], tuple[Table, torch.Tensor]]) -> None:
        self.memory_bytes = self.pass_bytes = 0
        self._fqn = fqn
        self._make = make
        self._made: tuple[Table, torch.Tensor] | None = None

    def rows(self) -> tuple[Table, torch.Tensor]:
        """What brings rows in, and the tensor that they are in then."""
        if self._made is None:
            with torch.inference_mode(False):
                self._made = self._make()
        return self._made

    def look_up(self, ids: torch.Tensor, take: Take, ring: Ring) -> torch.Tensor:
        """Read rows, and take what is wanted of them.

        Args:
            ids: the numbers of the rows.
            take: called with the table; what it returns must not lie in it.
            ring: counts what was read and waited for.
        """
        rows, table = self.rows()
        before, begin = rows.read_bytes, time.perf_counter()
        rows.bring(ids.numpy(force=True))
        ring.waited(self._fqn, begin, rows.read_bytes - before)
        taken = take(table)
        rows.trim()
        return taken

    def drop(self) -> None:
        """Keep no row."""
        self._made = None

    def doubt(self) -> None:
        """Rows are used as soon as they are there."""


class InParts(Protocol):
    """A parameter that comes in parts while it is not kept: rows, or slices.

    Attributes:
        memory_bytes: what it takes for as long as it is used so, beside what is dropped after each use.
        pass_bytes: what one use of all of it reads; 0 where only what is asked for is read.
    """

    memory_bytes: int
    pass_bytes: int

    def drop(self) -> None:
        """Keep nothing of it."""

    def doubt(self) -> None:
        """Use nothing of what was read and not used yet: a file was another one meanwhile."""


class Shelf(Protocol):
    """Where units are while they are not kept, if no file holds them; what fills slots finds them there."""

    def store(self, unit: str, tensors: Sequence[torch.Tensor]) -> None:
        """Take a copy of a unit's parameters, as they are now."""

    def drop(self, unit: str) -> None:
        """The unit came back, or never went."""


@dataclass(slots=True, eq=False, kw_only=True)
class Unit:
    """What comes and goes together.

    Attributes:
        name: of it.
        members: its parameters, in the order in which they lie in a slot.
        entries: the paths of the modules whose forward needs it; none for what is only looked up by rows.
        order: its place in the walk.
        in_parts: those of its parameters that come in parts.
        maps: gives its parameters where they lie in their files, where they are used there when they are kept.
        shelf: takes its parameters when it goes, where no file holds them.
        is_kept: it is in memory for good.
        homes: its parameters, where it is kept.
        attributes: what others have attached to them.
        copies: its parameters in host memory, where the model was parked there.
    """

    name: str
    members: tuple[Member, ...]
    entries: tuple[str, ...]
    order: int
    in_parts: tuple[InParts, ...] = ()
    maps: Callable[[], list[torch.Tensor]] | None = None
    shelf: Shelf | None = None
    is_kept: bool = False
    homes: tuple[Home, ...] = ()
    attributes: tuple[dict[str, Any], ...] = ()
    copies: list[torch.Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """What it takes where it is kept."""
        return sum(member.nbytes for member in self.members)

    def there(self) -> list[nn.Parameter]:
        """Its parameters as they stand in their modules."""
        return [owner[name] for owner, name in (member.owners[0] for member in self.members)]

    def changed(self) -> str:
        """The first of its parameters that would not come back as it is; "" for none."""
        if self.shelf is not None:
            return next((member.placeholder.fqn for member in self.members if not member.can_be_stored()), "")
        for member, home in zip(self.members, self.homes, strict=False):
            if not all(home.is_unchanged(owner.get(name)) for owner, name in member.owners):
                return member.placeholder.fqn
        return ""

    def put(self, parameters: Sequence[nn.Parameter]) -> None:
        """Have parameters in their modules."""
        for member, parameter in zip(self.members, parameters, strict=True):
            for owner, name in member.owners:
                owner[name] = parameter

    def put_views(self, slot: Slot, layout: Layout) -> None:
        """Have there what is in a slot."""
        if self.name not in slot.parameters:
            slot.parameters[self.name] = parameters(self, layout.views(slot.seen))
        self.put(slot.parameters[self.name])

    def put_placeholders(self) -> None:
        """Have the placeholders there."""
        for member in self.members:
            for owner, name in member.owners:
                owner[name] = member.placeholder


def parameters(unit: Unit, tensors: Iterable[torch.Tensor]) -> list[nn.Parameter]:
    """The parameters of a unit, of the tensors that hold their elements."""
    with torch.inference_mode(False):
        return [
            nn.Parameter(tensor, requires_grad=member.placeholder.requires_grad)
            for tensor, member in zip(tensors, unit.members, strict=True)
        ]


def _copied_back(copies: Sequence[torch.Tensor], places: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        for copied, place in zip(copies, places, strict=True):
            place.copy_(copied)
    return places


class Kept:
    """Lets units go, and brings them back; whoever uses it has the model's turn.

    Args:
        units: of the model, by name; may grow.
        filler: fills memory with them.
    """

    def __init__(self, units: Mapping[str, Unit], filler: Filler) -> None:
        self._units = units
        self._filler = filler

    def pieces(self) -> list[Piece]:
        """All units in the order of the walk, less those that must stay because they were changed."""
        return [
            Piece(
                name=unit.name,
                nbytes=unit.nbytes,
                slot_bytes=self._filler.layout(unit.name).nbytes if unit.entries else 0,
                is_kept=unit.is_kept,
            )
            for unit in sorted(self._units.values(), key=lambda unit: unit.order)
            if not unit.changed()
        ]

    def demote(self, names: Iterable[str], *, copied: bool = False) -> int:
        """Let units go.

        Args:
            names: of them.
            copied: to host memory, from where they come back until `drop_copies`; else they come from their files or
                from their shelf.

        Returns:
            The bytes that they took.
        """
        nbytes = 0
        units = [self._units[name] for name in names]
        self._take_copies(units, copied=copied)
        for unit in units:
            there = unit.there()
            unit.attributes = tuple(dict(vars(parameter)) for parameter in there)
            for member, parameter in zip(unit.members, there, strict=True):
                member.placeholder.requires_grad_(parameter.requires_grad)
                if unit.maps is not None:
                    unmap_clean(parameter.data_ptr(), member.nbytes)
            unit.put_placeholders()
            unit.homes, unit.is_kept = (), False
            nbytes += unit.nbytes
        return nbytes

    def promote(self, names: Iterable[str]) -> None:
        """Bring units back, all of them or none.

        Raises:
            LoadstoneError: their files cannot be read, or are not those whose headers were read.
        """
        units = [self._units[name] for name in names]
        tensors: dict[str, list[torch.Tensor]] = {}
        coming: list[tuple[Unit, torch.Tensor, Filling]] = []
        try:
            for unit in units:
                if unit.maps is not None:
                    self._filler.check(unit.name)
                    tensors[unit.name] = unit.maps()
                    continue
                memory = self._filler.memory(self._filler.layout(unit.name).nbytes)
                if unit.copies is not None:
                    tensors[unit.name] = _copied_back(unit.copies, self._cut(unit, memory))
                    self._filler.forget(memory)
                    continue
                coming.append((unit, memory, self._filler.fill(unit.name, memory, priority=-1)))
            for unit, memory, filling in coming:
                filling.wait()
                tensors[unit.name] = self._cut(unit, memory)
            for unit in units:
                if unit.copies is None:
                    self._filler.check(unit.name)
        finally:
            for _, memory, filling in coming:
                filling.cancel()
                self._filler.forget(memory)
        for unit in units:
            self._settle(unit, parameters(unit, tensors[unit.name]))
            if unit.shelf is not None:
                unit.shelf.drop(unit.name)

    @staticmethod
    def _take_copies(units: Sequence[Unit], *, copied: bool) -> None:
        """Of all that is to be copied, before the first is gone: host memory may be too small."""
        try:
            for unit in units:
                if unit.shelf is not None:
                    unit.shelf.store(unit.name, [parameter.detach() for parameter in unit.there()])
                elif copied:
                    unit.copies = [parameter.detach().to("cpu", copy=True) for parameter in unit.there()]
        except BaseException:
            for unit in units:
                unit.copies = None
                if unit.shelf is not None:
                    unit.shelf.drop(unit.name)
            raise

    def drop_copies(self) -> None:
        """Have everything come from its files again."""
        for unit in self._units.values():
            unit.copies = None

    def _cut(self, unit: Unit, memory: torch.Tensor) -> list[torch.Tensor]:
        """Each parameter; what was needed to put them there is given back."""
        layout = self._filler.layout(unit.name)
        end = whole_pages(layout.end)
        if end < memory.numel() and self._filler.on_host:
            give_back(memory[end:].numpy())
        return layout.views(memory)

    @staticmethod
    def _settle(unit: Unit, found: list[nn.Parameter]) -> None:
        for parameter, attributes in zip(found, unit.attributes, strict=False):
            vars(parameter).update(attributes)
        unit.put(found)
        unit.homes = tuple(Home.of(parameter) for parameter in found)
        unit.is_kept = True
        for part in unit.in_parts:
            part.drop()
