"""Where the units of a model come from: their files, or memory; and the chain of fillers that follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

import torch

from loadstone.architecture.keymap import Target
from loadstone.checkpoint.values import Checkpoint
from loadstone.dtypes import DTYPES
from loadstone.events import Observer, ignore
from loadstone.stream.combined import Combined
from loadstone.stream.destination import Destination
from loadstone.stream.filler import Filler, Layout, laid_out
from loadstone.stream.from_files import FromFiles
from loadstone.stream.from_memory import FromMemory, Home, Rehomed, packed
from loadstone.stream.materialize import as_tensor
from loadstone.stream.onward import Onward
from loadstone.stream.rearrange import is_rearranged
from loadstone.stream.refill import Place, Refill, Tensors, Wanted
from loadstone.stream.rows import Rows, Table, WholeTable, has_rows
from loadstone.stream.staying import ALL_GOES
from loadstone.stream.stored import is_castable, stored_form
from loadstone.stream.transfer import NoLink
from loadstone.stream.way import Keep, Rounding, Way

Groups = Mapping[str, Sequence[str]]
NONE: Groups = MappingProxyType({})


class Source(Protocol):
    """Where units come from."""

    def filler(self, groups: Groups, tables: Groups = NONE) -> Filler:
        """What fills memory with units; called once.

        Args:
            groups: the names of the parameters of each.
            tables: the same for units of which rows are looked up; what can bring back whole units knows them too.
        """

    @property
    def refill(self) -> Refill | None:
        """What reads the files, once `filler` was called; None where there are none."""

    def has_rows(self, fqn: str) -> bool:
        """Whether rows of a table can be had one by one."""

    def rows(self, fqn: str) -> tuple[Table, torch.Tensor]:
        """What brings them in, and the table on the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chained:
    """What further units go through: `rounding`, where there is one, then `onward`, of which `combined` knows."""

    combined: Combined
    onward: Onward
    rounding: Onward | None


class FileSource:
    """Files that hold the parameters.

    Args:
        wanted: what fills each parameter, by fqn.
        checkpoint: where it comes from.
        way: how it travels.
        observer: is told of bytes.
    """

    def __init__(
        self, wanted: Mapping[str, Wanted], checkpoint: Checkpoint, way: Way, observer: Observer = ignore
    ) -> None:
        self._wanted = dict(wanted)
        self._checkpoint = checkpoint
        self._way = way
        self._observer = observer
        self._refill: Refill | None = None
        self._files: FromFiles | None = None
        self._chained: _Chained | None = None

    @property
    def device(self) -> torch.device:
        """Where units are computed with."""
        return self._way.destination.device

    @property
    def is_direct(self) -> bool:
        """Whether all of it is read from files to where the host computes, as it must be there."""
        way = self._way
        return way.destination.is_host and not any(
            way.rounding(fqn) or way.keep(fqn) is not Keep.DISK for fqn in self._wanted
        )

    def know(self, checkpoint: Checkpoint) -> None:
        """Know the tensors of one more checkpoint, whose names are its own; for when there is a filler.

        Raises:
            RuntimeError: there is none.
        """
        if self._refill is None:
            raise RuntimeError("files can be added only to what reads files already")
        self._refill.know(checkpoint)
        files = (*self._checkpoint.files, *checkpoint.files)
        self._checkpoint = replace(self._checkpoint, files=files, tensors=self._refill.tensors)

    def add(self, wanted: Mapping[str, Wanted]) -> None:
        """Know more parameters, which are read from their files whenever they are wanted."""
        self._wanted |= wanted

    def more(self, groups: Groups) -> Filler:
        """What fills memory with further units: what was made before.

        Raises:
            RuntimeError: nothing was.
        """
        if self._files is None or self._refill is None:
            raise RuntimeError("units can be added only to what fills memory already")
        self._refill.add(self._read(groups))
        if self._chained is None:
            return self._files
        layouts = {name: self._files.layout(name) for name in groups}
        if self._chained.rounding is not None:  # what was loaded to stay is not rounded, but takes the same way
            self._chained.rounding.add(layouts)
        self._chained.onward.add({name: self._arriving(layout) for name, layout in layouts.items()})
        self._chained.combined.add(groups, self._chained.onward)
        return self._chained.combined

    def filler(self, groups: Groups, tables: Groups = NONE) -> Filler:
        """The shortest chain that ends in the destination."""
        direct = self.is_direct
        self._refill = Refill(self._read({**groups, **tables}), self._checkpoint, self._observer)
        self._files = FromFiles(self._refill, groups, self._way.stays if direct else ALL_GOES)
        return self._files if direct else self._chain(self._files, groups, tables)

    def _read(self, groups: Groups) -> dict[str, list[Wanted]]:
        """What is read of each unit, in the dtypes in which it travels."""
        rounds = any(map(self._way.rounding, self._wanted))
        if self._way.destination.is_host and not rounds:
            return {name: [self._wanted[fqn] for fqn in fqns] for name, fqns in groups.items()}
        return {
            name: [self._on_the_way(self._wanted[fqn], rounds=rounds) for fqn in fqns] for name, fqns in groups.items()
        }

    def _chain(self, files: FromFiles, groups: Groups, tables: Groups) -> Combined:
        way = self._way
        rounded = {name: _rounded(files.layout(name), way.rounding) for name in (*groups, *tables)}
        slots = {name: self._arriving(layout) for name, layout in rounded.items()}
        rounds = any(rounded[name] is not files.layout(name) for name in rounded)
        rounding = Onward(files, rounded, Destination(torch.device("cpu"), NoLink())) if rounds else None
        inner: Filler = files if rounding is None else rounding
        kept = {name: keep for name in groups if (keep := way.keep(slots[name].places[0].fqn)) is not Keep.DISK}

        read = inner.slot(
            max((inner.layout(name).nbytes for name, keep in kept.items() if keep is Keep.NEAR), default=1)
        )
        homes = {name: _brought_home(inner, name, keep, way.destination, read) for name, keep in kept.items()}
        way.destination.link.fork()  # homes on the device are made before anything is sent from there
        onward = Onward(inner, {name: slots[name] for name in groups if name not in kept}, way.destination)

        def again(name: str) -> Home:
            return _brought_home(inner, name, kept[name], way.destination)

        memory = FromMemory(homes, {name: slots[name] for name in kept}, way.destination, again=again)
        onward.add({name: slots[name] for name in tables})
        fillers: dict[str, Filler] = {name: memory if name in kept else onward for name in slots}
        combined = Combined(fillers, way.destination, onward)
        self._chained = _Chained(combined=combined, onward=onward, rounding=rounding)
        return combined

    def _arriving(self, layout: Layout) -> Layout:
        """How a unit lies in its slot, where it lies so on the way."""
        return _arriving(layout, [self._wanted[place.fqn].target for place in layout.places])

    @property
    def refill(self) -> Refill | None:
        """What reads the files, once `filler` was called."""
        return self._refill

    def has_rows(self, fqn: str) -> bool:
        """Whether rows can be read one by one."""
        return has_rows(self._wanted[fqn], self._checkpoint.tensors)

    def rows(self, fqn: str) -> tuple[Table, torch.Tensor]:
        """Rows that are read when they are looked up."""
        if self._refill is None:
            raise RuntimeError("rows are read by what fills the slots, which was not made yet")
        wanted = self._wanted[fqn]
        if (
            self._way.keep(fqn) is Keep.HOST
            and _plainly_stored(wanted, self._checkpoint.tensors) == wanted.target.dtype
        ):
            return WholeTable(), self._whole(wanted)
        rows = Rows(wanted, self._checkpoint.tensors[wanted.assignment.parts[0].source], self._refill)
        return rows, as_tensor(rows.data, rows.target.dtype, rows.target.shape)

    def _whole(self, wanted: Wanted) -> torch.Tensor:
        """A table that is read once."""
        files = FromFiles(Refill({wanted.fqn: [wanted]}, self._checkpoint, self._observer))
        layout = files.layout(wanted.fqn)
        memory = files.slot(layout.nbytes)
        try:
            files.fill(wanted.fqn, memory).wait()
            files.check(wanted.fqn)
        finally:
            files.close()
        return layout.views(memory)[0]

    def _on_the_way(self, wanted: Wanted, *, rounds: bool) -> Wanted:
        """The same as it travels: as stored, where that is narrower and the device can make of it what is wanted.

        Args:
            wanted: the parameter.
            rounds: some are rounded on the way, by the host, which has to have numbers for that.
        """
        stored = _plainly_stored(wanted, self._checkpoint.tensors)
        if stored is None:
            form = None if rounds else stored_form(wanted.assignment, wanted.target, self._checkpoint.tensors)
            return wanted if form is None else replace(wanted, target=form.target, stored=form)
        if self._way.rounding(wanted.fqn) is None and DTYPES[stored].bits > DTYPES[wanted.target.dtype].bits:
            return wanted
        return replace(wanted, target=replace(wanted.target, dtype=stored))


def _plainly_stored(wanted: Wanted, tensors: Tensors) -> str | None:
    """The dtype in which a parameter lies in its files as it lies in memory; None where there is no one such."""
    infos = [tensors[part.source] for part in wanted.assignment.parts]
    dtypes = {info.dtype for info in infos}
    plain = all(
        info.encoding is None and info.strides is None and not is_rearranged(part, info)
        for part, info in zip(wanted.assignment.parts, infos, strict=True)
    )
    dtype = dtypes.pop()
    return dtype if plain and not dtypes and is_castable(dtype, wanted.target.dtype) else None


def _rounded(layout: Layout, rounding: Rounding) -> Layout:
    """The same in the dtypes that were asked for; the very same where nothing is rounded."""
    targets = {place.fqn: replace(place.target, dtype=_dtype(place, rounding)) for place in layout.places}
    return layout if all(targets[place.fqn] == place.target for place in layout.places) else laid_out(targets)


def _dtype(place: Place, rounding: Rounding) -> str:
    return rounding(place.fqn) or place.target.dtype


def _arriving(layout: Layout, targets: Sequence[Target]) -> Layout:
    """How a unit lies in its slot: as on the way, where nothing is cast, so that it is sent in one piece."""
    if [place.target for place in layout.places] == list(targets):
        return Layout(places=layout.places, nbytes=layout.end)
    return laid_out({place.fqn: target for place, target in zip(layout.places, targets, strict=True)})


def _brought_home(
    inner: Filler, unit: str, keep: Keep, destination: Destination, read: torch.Tensor | None = None
) -> Home:
    """Read a unit to where it is kept: at once, or through memory of the host, one that is given or its own."""
    layout = inner.layout(unit)
    if keep is Keep.HOST:
        memory = torch.from_numpy(destination.link.locked(layout.nbytes))
    else:
        memory = inner.slot(layout.nbytes) if read is None else read
    try:
        inner.fill(unit, memory).wait()
        inner.check(unit)
    except BaseException:
        if keep is Keep.HOST:
            destination.link.unlock(memory.numpy())
        raise
    finally:
        inner.forget(memory)
    tensors = {place.fqn: view for place, view in zip(layout.places, layout.views(memory), strict=True)}
    if keep is Keep.HOST:
        return Home(tensors=tensors, whole=memory, places=layout.places)
    return packed(tensors, layout, destination.slot(layout.nbytes), is_near=True)


class MemorySource:
    """Parameters that are in memory already, which stay the master copy.

    Args:
        tensors: by fqn.
        targets: what each must be where it is computed, by fqn.
        way: how they travel; a unit that is kept on the disk is none of this source.
        moved: is told of each parameter that was moved to memory of another kind or dtype, with its new tensor.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        targets: Mapping[str, Target],
        way: Way,
        moved: Rehomed,
    ) -> None:
        self._tensors = tensors
        self._targets = dict(targets)
        self._way = way
        self._moved = moved
        self._homes: dict[str, Home] = {}
        self._layouts: dict[str, Layout] = {}
        self._memory = FromMemory(self._homes, self._layouts, way.destination, moved)
        self._combined = Combined({}, way.destination)

    @property
    def device(self) -> torch.device:
        """Where units are computed with."""
        return self._way.destination.device

    def filler(self, groups: Groups, tables: Groups = NONE) -> Filler:
        """Put each unit where it is kept, and fill slots from there."""
        for name, fqns in groups.items():
            kept = laid_out({fqn: self._kept(fqn) for fqn in fqns})
            self._layouts[name] = _arriving(kept, [self._targets[fqn] for fqn in fqns])
            self._homes[name] = self._home(kept)
        self._way.destination.link.fork()  # homes on the device are made before anything is sent from there
        self._combined.add(groups, self._memory)
        return self._combined

    def know(self, targets: Mapping[str, Target]) -> None:
        """Know parameters that are where they are computed, by fqn."""
        self._targets |= targets

    def more(self, groups: Groups) -> Filler:
        """What fills memory with units of such parameters; `store` one before it is filled."""
        self._layouts |= {name: laid_out({fqn: self._targets[fqn] for fqn in fqns}) for name, fqns in groups.items()}
        self._combined.add(groups, self._memory)
        return self._combined

    def store(self, unit: str, tensors: Sequence[torch.Tensor]) -> None:
        """Keep a copy of a unit in host memory, from where it is filled until `drop`.

        Args:
            unit: one of those that came later.
            tensors: its parameters, in the order of its layout.
        """
        layout = self._layouts[unit]
        memory = torch.from_numpy(self._way.destination.link.locked(layout.nbytes))
        fqns = [place.fqn for place in layout.places]
        self._homes[unit] = packed(dict(zip(fqns, tensors, strict=True)), layout, memory)

    def drop(self, unit: str) -> None:
        """The unit is where it is computed; the copy goes, if there is one."""
        home = self._homes.pop(unit, None)
        if home is not None and home.whole is not None:
            self._way.destination.link.unlock(home.whole.numpy())

    @property
    def refill(self) -> None:
        """No file is read."""

    def has_rows(self, fqn: str) -> bool:
        """Every table that is computed with as it is kept has rows; what comes later is kept so."""
        target, tensor = self._targets[fqn], self._tensors.get(fqn)
        return len(target.shape) == 2 and (tensor is None or f"torch.{target.dtype}" == str(tensor.dtype))

    def rows(self, fqn: str) -> tuple[Table, torch.Tensor]:
        """The table itself, from which the host takes rows."""
        for home in self._homes.values():
            if fqn in home.tensors:
                return WholeTable(), home.tensors[fqn]
        return WholeTable(), self._tensors[fqn].detach()

    def _kept(self, fqn: str) -> Target:
        stored = str(self._tensors[fqn].dtype).removeprefix("torch.")
        return replace(self._targets[fqn], dtype=self._way.rounding(fqn) or stored)

    def _home(self, layout: Layout) -> Home:
        near, destination = self._way.keep(layout.places[0].fqn) is Keep.NEAR, self._way.destination
        tensors = {place.fqn: self._tensors[place.fqn].detach() for place in layout.places}
        as_it_is = all(
            str(tensors[place.fqn].dtype) == f"torch.{place.target.dtype}" and tensors[place.fqn].is_contiguous()
            for place in layout.places
        )
        if as_it_is and not near and not destination.is_late and destination.device.type == "cpu":
            return Home(tensors=tensors)
        locked = None if near else destination.link.locked(layout.nbytes)
        memory = destination.slot(layout.nbytes) if locked is None else torch.from_numpy(locked)
        home = packed(tensors, layout, memory, is_near=near)
        for fqn, tensor in home.tensors.items():
            self._moved(fqn, tensor)
        return home
