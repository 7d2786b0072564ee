"""Slots of host memory that are filled from files, by threads, past the page cache."""

from __future__ import annotations

import torch

from loadstone.stream.filler import Known, Layout, unknown
from loadstone.stream.memory import anonymous
from loadstone.stream.read import Batch, Reader
from loadstone.stream.refill import Refill


class FromFiles:
    """Files -> host memory.

    Args:
        refill: knows what is read for each unit, of which it may learn more; it is closed with this.
    """

    on_host = True

    def __init__(self, refill: Refill) -> None:
        self._refill = refill
        self._layouts: dict[str, Layout] = {}

    def knows(self, unit: str) -> bool:
        """Whether it was told what to read for a unit."""
        return unit in self._refill.recipes

    def layout(self, unit: str) -> Layout:
        """How a unit lies in a slot: in the order of its files."""
        if unit not in self._layouts:
            recipe = self._refill.recipes[unit]
            self._layouts[unit] = Layout(places=tuple(recipe.places), nbytes=recipe.nbytes)
        return self._layouts[unit]

    def moved_bytes(self, unit: str) -> int:
        """What is read for it."""
        return self._refill.recipes[unit].moved_bytes

    def slot(self, nbytes: int) -> torch.Tensor:
        """Page-aligned host memory; a normal tensor also where it is made in inference mode."""
        with torch.inference_mode(False):
            return torch.from_numpy(anonymous(nbytes))

    def fill(self, unit: str, slot: torch.Tensor, *, priority: int = 0, known: Known = unknown) -> Batch:
        """Begin to read a unit into a slot."""
        batch = self._refill.batch(unit, slot.numpy())
        known(batch)
        return self._refill.reader.begin(batch, priority)

    def attend(self, slot: torch.Tensor) -> None:
        """What was waited for is there."""

    def release(self, slot: torch.Tensor) -> None:
        """The host has computed when a forward returns."""

    def forget(self, slot: torch.Tensor) -> None:
        """Hold on to nothing that was prepared for a slot."""
        self._refill.forget(slot.numpy())

    def check(self, unit: str) -> None:
        """Check that the files of a unit are those whose headers were read."""
        self._refill.check(unit)

    def check_all(self) -> None:
        """Check that all files are those whose headers were read."""
        self._refill.check_all()

    def readers(self) -> tuple[Reader, ...]:
        """The one there is."""
        return (self._refill.reader,)

    def rest(self, *, leaves_memory: bool = False) -> None:
        """End the threads and close the files, until something is read again; nothing is at home in memory."""
        del leaves_memory
        self._refill.close()

    def close(self) -> None:
        """The same."""
        self.rest()
