"""Slots of host memory that are filled from files, by threads, past the page cache."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from loadstone.hardware.memory import can_show_pages
from loadstone.stream.filler import Known, Layout, unknown
from loadstone.stream.fronts import FrontedUnit, SharedSlot, front_bytes
from loadstone.stream.memory import anonymous, populate
from loadstone.stream.read import Batch, Reader
from loadstone.stream.refill import Refill


class FromFiles:
    """Files -> host memory.

    Args:
        refill: knows what is read for each unit, of which it may learn more; it is closed with this.
        fronted: the units of which a front is read once and stays, as far as they only move; none that is learnt of
            later.
        slot_bytes: the most that is read of those again and again; 0 for all of it.
    """

    on_host = True

    def __init__(self, refill: Refill, fronted: Iterable[str] = (), slot_bytes: int = 0) -> None:
        self._refill = refill
        self._layouts: dict[str, Layout] = {}
        recipes = {unit: refill.recipes[unit] for unit in fronted if slot_bytes and can_show_pages()}
        fronts = {unit: front_bytes(one.nbytes, slot_bytes) for unit, one in recipes.items() if one.is_moved}
        self._fronts = {unit: nbytes for unit, nbytes in fronts.items() if nbytes}
        self._slots: dict[int, SharedSlot] = {}
        self._units: dict[str, FrontedUnit] = {}
        self._seen: dict[int, FrontedUnit] = {}

    def knows(self, unit: str) -> bool:
        """Whether it was told what to read for a unit."""
        return unit in self._refill.recipes

    def layout(self, unit: str) -> Layout:
        """How a unit lies in memory: in the order of its files."""
        if unit not in self._layouts:
            recipe, front = self._refill.recipes[unit], self._fronts.get(unit, 0)
            self._layouts[unit] = Layout(places=tuple(recipe.places), nbytes=recipe.nbytes, front_bytes=front)
        return self._layouts[unit]

    def moved_bytes(self, unit: str) -> int:
        """What is read for it each time."""
        recipe, front = self._refill.recipes[unit], self._fronts.get(unit)
        return recipe.moved_bytes if front is None else recipe.moved_bytes_behind(front)

    def slot(self, nbytes: int) -> torch.Tensor:
        """Page-aligned host memory; a normal tensor also where it is made in inference mode.

        Its pages are found in one go. Where the threads that read find them, each in its own stretch, neighbours come
        from all over memory, and the disk has to be asked for more and smaller pieces.
        """
        if not self._fronts:
            slot = self.memory(nbytes)
            populate(slot.numpy(), write=True)
            return slot
        shared = SharedSlot(nbytes)
        with torch.inference_mode(False):
            slot = torch.from_numpy(shared.data)
        self._slots[slot.data_ptr()] = shared
        return slot

    def memory(self, nbytes: int) -> torch.Tensor:
        """The same, which nothing but one unit is seen in."""
        with torch.inference_mode(False):
            return torch.from_numpy(anonymous(nbytes))

    def fill(self, unit: str, slot: torch.Tensor, *, priority: int = 0, known: Known = unknown) -> Batch:
        """Begin to read a unit into a slot."""
        self.release(slot)
        fronted = self._fronted(unit, slot)
        if fronted is None:
            batch = self._refill.batch(unit, slot.numpy())
        else:
            # Read to where it will be seen, the pages are found by the threads that read, not by the one that computes.
            self._show(fronted, slot)
            begin = fronted.front_bytes if fronted.is_there else 0
            batch = self._refill.batch_of_part(unit, begin, fronted.data.size, fronted.data)
        known(batch)
        return self._refill.reader.begin(batch, priority)

    def bring_fronts(self) -> None:
        """Read the fronts that are neither there nor on their way with their unit."""
        coming = list(self._seen.values())
        fronted = {unit: self._memory_of(unit) for unit in self._fronts}
        missing = {unit: found for unit, found in fronted.items() if not found.is_there and found not in coming}
        batches = []
        try:
            for unit, found in missing.items():
                batches.append(self._refill.batch_of_part(unit, 0, found.front_bytes, found.data))
                self._refill.reader.begin(batches[-1])
            for batch in batches:
                batch.wait()
        finally:
            for found, batch in zip(missing.values(), batches, strict=False):
                batch.cancel()
                self._refill.forget(found.data)
        for unit, found in missing.items():
            self._refill.check(unit)
            found.is_there = True

    def attend(self, slot: torch.Tensor) -> None:
        """What was waited for is there."""

    def seen(self, unit: str, slot: torch.Tensor) -> torch.Tensor:
        """The slot, or the unit's own memory with the slot behind its front."""
        fronted = self._fronted(unit, slot)
        if fronted is None:
            return slot
        fronted.is_there = True
        if fronted.slot is not self._slots[slot.data_ptr()]:  # it was used before and is still there
            self._show(fronted, slot)
        with torch.inference_mode(False):
            return torch.from_numpy(fronted.data)

    def release(self, slot: torch.Tensor) -> None:
        """The host has computed when a forward returns; the slot is seen behind no front any more."""
        fronted = self._seen.pop(slot.data_ptr(), None)
        if fronted is not None and fronted.slot is self._slots[slot.data_ptr()]:
            fronted.hide()

    def forget(self, slot: torch.Tensor) -> None:
        """Hold on to nothing that was prepared for a slot; with the last of them fronts go."""
        self._refill.forget(slot.numpy())
        self.release(slot)
        shared = self._slots.pop(slot.data_ptr(), None)
        if shared is not None:
            shared.close()
        if not self._slots:
            for fronted in self._units.values():
                self._refill.forget(fronted.data)
            self._units.clear()

    def check(self, unit: str) -> None:
        """Check that the files of a unit are those whose headers were read."""
        self._refill.check(unit)

    def check_all(self) -> None:
        """Check that all files are those whose headers were read."""
        self._refill.check_all()

    def readers(self) -> tuple[Reader, ...]:
        """The one there is."""
        return (self._refill.reader,)

    def fill_whole(self) -> None:
        """Read all of each unit from now on."""
        self._fronts.clear()
        self._layouts.clear()

    def rest(self, *, leaves_memory: bool = False) -> None:
        """End the threads and close the files, until something is read again; nothing is at home in memory."""
        del leaves_memory
        self._refill.close()

    def close(self) -> None:
        """The same."""
        self.rest()

    def _fronted(self, unit: str, slot: torch.Tensor) -> FrontedUnit | None:
        """The memory of a unit whose front is beside this slot; None where all of it is in there."""
        if unit not in self._fronts or slot.numel() >= self._refill.recipes[unit].nbytes:
            return None
        return self._memory_of(unit)

    def _show(self, fronted: FrontedUnit, slot: torch.Tensor) -> None:
        fronted.show(self._slots[slot.data_ptr()])
        self._seen[slot.data_ptr()] = fronted

    def _memory_of(self, unit: str) -> FrontedUnit:
        if unit not in self._units:
            self._units[unit] = FrontedUnit(self._refill.recipes[unit].nbytes, self._fronts[unit])
        return self._units[unit]
