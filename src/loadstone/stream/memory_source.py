"""Where the units of a model come from that is in memory already: that memory, or another kind of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from loadstone.architecture.keymap import Target
from loadstone.stream.combined import Combined
from loadstone.stream.filler import Filler, Layout, arriving, laid_out
from loadstone.stream.from_memory import FromMemory, Home, Rehomed, packed
from loadstone.stream.rows import Table, WholeTable
from loadstone.stream.sources import NONE, Groups
from loadstone.stream.way import Keep, Way


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
            self._layouts[name] = arriving(kept, [self._targets[fqn] for fqn in fqns])
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
