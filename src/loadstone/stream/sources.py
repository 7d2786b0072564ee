"""Where the units of a model come from: their files, or memory; and the chain of fillers that follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

import torch

from loadstone.checkpoint.values import Checkpoint, TensorInfo
from loadstone.dtypes import DTYPES
from loadstone.events import Observer, ignore
from loadstone.stream.combined import Combined
from loadstone.stream.destination import Destination
from loadstone.stream.entries import Entries
from loadstone.stream.filler import Filler, Layout, arriving, laid_out
from loadstone.stream.from_files import FromFiles
from loadstone.stream.from_memory import FromMemory, Home
from loadstone.stream.homes import brought_home
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
    """What further units go through.

    Attributes:
        combined: knows of all.
        memory: sends what is kept in memory.
        onward: sends what comes from the disk.
        rounding: what it goes through before either; None for nothing.
    """

    combined: Combined
    memory: FromMemory
    onward: Onward
    rounding: Onward | None

    @property
    def inner(self) -> Filler:
        """What fills host memory with units, as they travel."""
        return self.rounding if self.rounding is not None else self.onward.inner


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
        self._kept: dict[str, Keep] = {}

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

    def more(self, groups: Groups, *, usual: bool = False) -> Filler:
        """What fills memory with further units: what was made before.

        Args:
            groups: the names of the parameters of each.
            usual: they come as often as others, from where they are kept; else from the disk, and buffers suit them
                only once one has come.

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
        slots = {name: self._arriving(layout) for name, layout in layouts.items()}
        self._send(groups, slots, self._chained, usual=usual)
        return self._chained.combined

    def entries(self, tables: Sequence[Entries]) -> tuple[list[list[str]], Filler]:
        """What fills memory with single entries of fused parameters, and the names of these, for each table.

        Raises:
            RuntimeError: there is nothing that fills memory yet.
        """
        names: list[list[str]] = []
        infos: dict[str, TensorInfo] = {}
        for table in tables:
            alone = [table.alone(number) for number in range(table.count)]
            names.append([wanted.fqn for wanted, _ in alone])
            for wanted, tensors in alone:
                self._wanted[wanted.fqn] = wanted
                infos |= tensors
        self.know(replace(self._checkpoint, files=(), tensors=infos))
        return names, self.more({name: [name] for one in names for name in one}, usual=True)

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
        onward = Onward(inner, {}, way.destination)
        memory = FromMemory({}, {}, way.destination, again=self._again)
        combined = Combined({}, way.destination, memory, onward)
        self._chained = _Chained(combined=combined, memory=memory, onward=onward, rounding=rounding)
        self._send(groups, slots, self._chained, usual=True)
        onward.add({name: slots[name] for name in tables})
        combined.add(tables, onward)
        return combined

    def _send(self, groups: Groups, slots: Mapping[str, Layout], chained: _Chained, *, usual: bool) -> None:
        """Have units sent from where they are kept; those that are kept in memory are brought there.

        Args:
            groups: the units.
            slots: how each lies in a slot.
            chained: what sends them.
            usual: see `more`.
        """
        keeps = {name: self._way.keep(slots[name].places[0].fqn) if usual else Keep.DISK for name in groups}
        kept = {name: keep for name, keep in keeps.items() if keep is not Keep.DISK}
        homes = brought_home(chained.inner, kept, self._way.destination)
        self._way.destination.link.fork()  # homes on the device are made before anything is sent from there
        self._kept |= kept
        chained.memory.add(homes, {name: slots[name] for name in kept})
        chained.onward.add({name: slots[name] for name in groups if name not in kept}, usual=usual)
        for name in groups:
            chained.combined.add([name], chained.memory if name in kept else chained.onward)

    def _again(self, name: str) -> Home:
        if self._chained is None:
            raise RuntimeError("homes are made anew only by what has made them")
        return brought_home(self._chained.inner, {name: self._kept[name]}, self._way.destination)[name]

    def _arriving(self, layout: Layout) -> Layout:
        """How a unit lies in its slot, where it lies so on the way."""
        return arriving(layout, [self._wanted[place.fqn].target for place in layout.places])

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
