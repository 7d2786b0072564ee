"""Units that stay in memory until they are asked to go, and come back as they were."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from loadstone.events import ignore
from loadstone.execute.placeholder import StreamedParameter, Take
from loadstone.execute.slots import Ring, Slot
from loadstone.execute.spread import Piece
from loadstone.stream.host import FileMaps, stretches
from loadstone.stream.materialize import as_tensor
from loadstone.stream.memory import PAGE_BYTES, Bytes, anonymous, give_back, unmap_clean
from loadstone.stream.prefault import Prefault
from loadstone.stream.read import Batch
from loadstone.stream.refill import Place, Refill, Wanted
from loadstone.stream.rows import Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One parameter of a unit.

    Attributes:
        placeholder: what stands for it.
        owners: the parameter dicts of the modules that hold it, with its name there.
        wanted: what fills it.
    """

    placeholder: StreamedParameter
    owners: tuple[tuple[dict[str, Any], str], ...]
    wanted: Wanted

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self.placeholder.numel() * self.placeholder.element_size()


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


class Table:
    """A parameter of which rows are looked up while it is not kept.

    Args:
        wanted: the parameter; it `has_rows`.
        refill: what reads.
    """

    def __init__(self, wanted: Wanted, refill: Refill) -> None:
        self._source = (wanted, refill.info(wanted), refill)
        self._made: tuple[Rows, torch.Tensor] | None = None

    def rows(self) -> tuple[Rows, torch.Tensor]:
        """What reads rows, and the tensor that they are in then."""
        if self._made is None:
            rows = Rows(*self._source)
            with torch.inference_mode(False):
                self._made = rows, as_tensor(rows.data, rows.target.dtype, rows.target.shape)
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
        rows.bring(ids.numpy())
        nbytes = rows.read_bytes - before
        ring.stall_s += time.perf_counter() - begin
        ring.streamed_bytes += nbytes
        ring.tracer.span("wait", self._source[0].fqn, begin, nbytes)
        taken = take(table)
        rows.trim()
        return taken

    def drop(self) -> None:
        """Keep no row."""
        self._made = None


@dataclass(slots=True, eq=False, kw_only=True)
class Unit:
    """What comes and goes together.

    Attributes:
        name: of it.
        members: its parameters, in the order in which they lie in a slot.
        entries: the paths of the modules whose forward needs it; none for what is only looked up by rows.
        order: its place in the walk.
        tables: those of its parameters that are looked up by rows, by fqn.
        is_mapped: it is used where it lies in its files when it is kept.
        is_kept: it is in memory for good.
        homes: its parameters, where it is kept.
        attributes: what others have attached to them.
    """

    name: str
    members: tuple[Member, ...]
    entries: tuple[str, ...]
    order: int
    tables: dict[str, Table] = field(default_factory=dict)
    is_mapped: bool = False
    is_kept: bool = False
    homes: tuple[Home, ...] = ()
    attributes: tuple[dict[str, Any], ...] = ()

    @property
    def nbytes(self) -> int:
        """What it takes where it is kept."""
        return sum(member.nbytes for member in self.members)

    def changed(self) -> str:
        """The first of its parameters that is not what was put there; "" for none."""
        for member, home in zip(self.members, self.homes, strict=False):
            if not all(home.is_unchanged(owner.get(name)) for owner, name in member.owners):
                return member.placeholder.fqn
        return ""

    def put(self, parameters: Sequence[nn.Parameter]) -> None:
        """Have parameters in their modules."""
        for member, parameter in zip(self.members, parameters, strict=True):
            for owner, name in member.owners:
                owner[name] = parameter

    def put_views(self, slot: Slot, places: Iterable[Place]) -> None:
        """Have there what is in a slot."""
        if self.name not in slot.parameters:
            slot.parameters[self.name] = views(self, (slot.data[place.begin :] for place in places))
        self.put(slot.parameters[self.name])

    def put_placeholders(self) -> None:
        """Have the placeholders there."""
        for member in self.members:
            for owner, name in member.owners:
                owner[name] = member.placeholder


def views(unit: Unit, arrays: Iterable[Bytes]) -> list[nn.Parameter]:
    """The parameters of a unit over the bytes of each."""
    made = []
    with torch.inference_mode(False):
        for member, array in zip(unit.members, arrays, strict=True):
            target = member.wanted.target
            tensor = as_tensor(array[: member.nbytes], target.dtype, target.shape)
            made.append(nn.Parameter(tensor, requires_grad=member.placeholder.requires_grad))
    return made


class Kept:
    """Lets units go, and brings them back; whoever uses it has the model's turn.

    Args:
        units: of the model, by name; may grow.
        refill: reads them.
    """

    def __init__(self, units: Mapping[str, Unit], refill: Refill) -> None:
        self._units = units
        self._refill = refill

    def pieces(self) -> list[Piece]:
        """All units in the order of the walk, less those that must stay because they were changed."""
        return [
            Piece(
                name=unit.name,
                nbytes=unit.nbytes,
                slot_bytes=self._refill.recipes[unit.name].nbytes if unit.entries else 0,
                is_kept=unit.is_kept,
            )
            for unit in sorted(self._units.values(), key=lambda unit: unit.order)
            if not unit.changed()
        ]

    def demote(self, names: Iterable[str]) -> int:
        """Let units go.

        Returns:
            The bytes that they took.
        """
        nbytes = 0
        for unit in map(self._units.__getitem__, names):
            parameters = [owner[name] for owner, name in (member.owners[0] for member in unit.members)]
            unit.attributes = tuple(dict(vars(parameter)) for parameter in parameters)
            for member, parameter in zip(unit.members, parameters, strict=True):
                member.placeholder.requires_grad_(parameter.requires_grad)
                if unit.is_mapped:
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
        arrays = {unit.name: self._mapped(unit) for unit in units if unit.is_mapped}
        coming: list[tuple[Unit, Bytes, Batch]] = []
        try:
            for unit in units:
                if not unit.is_mapped:
                    data = anonymous(self._refill.recipes[unit.name].nbytes)
                    coming.append((unit, data, self._refill.fill(unit.name, data, priority=-1)))
            for unit, data, batch in coming:
                batch.wait()
                arrays[unit.name] = self._cut(unit, data)
            for unit in units:
                self._refill.check(unit.name)
        finally:
            for _, data, batch in coming:
                batch.cancel()
                self._refill.forget(data)
        for unit in units:
            self._settle(unit, views(unit, arrays[unit.name]))

    def _cut(self, unit: Unit, data: Bytes) -> list[Bytes]:
        """The bytes of each parameter; what was needed to put them there is given back."""
        places = self._refill.recipes[unit.name].places
        end = max(place.begin + member.nbytes for place, member in zip(places, unit.members, strict=True))
        end = -(-end // PAGE_BYTES) * PAGE_BYTES
        if end < data.size:
            give_back(data[end:])
        return [data[place.begin :] for place in places]

    def _mapped(self, unit: Unit) -> list[Bytes]:
        """The same where they lie in their files, brought in again."""
        self._refill.check(unit.name)
        infos = [self._refill.info(member.wanted) for member in unit.members]
        maps = FileMaps()
        arrays = [maps.bytes_of(info) for info in infos]
        ranges = [(path, maps.whole(path)[begin:end]) for path, begin, end in stretches(infos)]
        Prefault(ranges, beside_imports=False, observer=ignore).wait()
        return arrays

    @staticmethod
    def _settle(unit: Unit, parameters: list[nn.Parameter]) -> None:
        for parameter, attributes in zip(parameters, unit.attributes, strict=False):
            vars(parameter).update(attributes)
        unit.put(parameters)
        unit.homes = tuple(Home.of(parameter) for parameter in parameters)
        unit.is_kept = True
        for table in unit.tables.values():
            table.drop()
