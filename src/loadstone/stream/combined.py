"""Units of one model that come from several homes into the slots of one destination."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from loadstone.stream.destination import AtDestination, Destination
from loadstone.stream.filler import Filler, Filling, Known, Layout, unknown
from loadstone.stream.read import Reader


class Combined(AtDestination):
    """Fills slots from wherever each unit lives.

    Args:
        fillers: by unit; closed with this.
        destination: where the slots are; closed with this.
        others: closed with this too.
    """

    def __init__(self, fillers: Mapping[str, Filler], destination: Destination, *others: Filler) -> None:
        super().__init__(destination)
        self._fillers = dict(fillers)
        self._others = others

    def add(self, units: Iterable[str], filler: Filler) -> None:
        """Have more units filled by a filler, which is one of those there are."""
        self._fillers |= dict.fromkeys(units, filler)

    def knows(self, unit: str) -> bool:
        """Whether one of the fillers does."""
        return unit in self._fillers

    def layout(self, unit: str) -> Layout:
        """How a unit lies in a slot."""
        return self._fillers[unit].layout(unit)

    def moved_bytes(self, unit: str) -> int:
        """What travels to fill it."""
        return self._fillers[unit].moved_bytes(unit)

    def fill(self, unit: str, slot: torch.Tensor, *, priority: int = 0, known: Known = unknown) -> Filling:
        """Begin to fill a slot."""
        return self._fillers[unit].fill(unit, slot, priority=priority, known=known)

    def check(self, unit: str) -> None:
        """Check that what a unit was filled from is still the same."""
        self._fillers[unit].check(unit)

    def check_all(self) -> None:
        """Check whatever the fillers check."""
        for filler in self._each():
            filler.check_all()

    def readers(self) -> tuple[Reader, ...]:
        """Those of the fillers."""
        return tuple(dict.fromkeys(reader for filler in self._each() for reader in filler.readers()))

    def rest(self, *, leaves_memory: bool = False) -> None:
        """Have the fillers rest."""
        for filler in self._each():
            filler.rest(leaves_memory=leaves_memory)
        self._destination.rest()

    def close(self) -> None:
        """End the fillers, then the link."""
        for filler in self._each():
            filler.close()
        self._destination.close()

    def _each(self) -> Iterator[Filler]:
        yield from {id(filler): filler for filler in (*self._fillers.values(), *self._others)}.values()
