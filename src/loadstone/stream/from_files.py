"""Slots of host memory that are filled from files, by threads, past the page cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch

from loadstone.errors import LoadstoneError
from loadstone.hardware.pages import adjoining, anonymous
from loadstone.stream.filler import Known, Layout, unknown
from loadstone.stream.fronts import FrontedUnit, SharedSlot
from loadstone.stream.read import Batch, Reader
from loadstone.stream.refill import Refill
from loadstone.stream.spans import prepare
from loadstone.stream.staying import ALL_GOES, Staying, Stays


class FromFiles:
    """Files -> host memory.

    Args:
        refill: knows what is read for each unit, of which it may learn more; it is closed with this.
        lasting: the units of which something stays, as far as they only move; none that is learnt of later.
        stays: what it is.
    """

    on_host = True

    def __init__(self, refill: Refill, lasting: Iterable[str] = (), stays: Stays = ALL_GOES) -> None:
        self._refill = refill
        self._layouts: dict[str, Layout] = {}
        staying = {unit: Staying(refill.recipes[unit], stays) for unit in lasting}
        self._staying = {unit: one for unit, one in staying.items() if not one.is_nothing}
        self._slots: dict[int, SharedSlot | None] = {}
        self._seen: dict[int, FrontedUnit] = {}
        self._filling: dict[int, str] = {}

    def knows(self, unit: str) -> bool:
        """Whether it was told what to read for a unit."""
        return unit in self._refill.recipes

    def layout(self, unit: str) -> Layout:
        """How a unit lies in memory: in the order of its files."""
        if unit not in self._layouts:
            recipe, staying = self._refill.recipes[unit], self._staying.get(unit)
            self._layouts[unit] = Layout(
                places=tuple(recipe.places),
                nbytes=recipe.nbytes,
                front_bytes=staying.front_bytes if staying is not None else 0,
                compressed_bytes=staying.compressed_bytes if staying is not None else 0,
            )
        return self._layouts[unit]

    def moved_bytes(self, unit: str) -> int:
        """What is read for it each time."""
        staying = self._staying.get(unit)
        return self._refill.recipes[unit].moved_bytes if staying is None else staying.moved_bytes

    def slot(self, nbytes: int) -> torch.Tensor:
        """Host memory whose pages adjoin; a normal tensor also where it is made in inference mode."""
        shared = SharedSlot(nbytes) if any(one.front_bytes for one in self._staying.values()) else None
        with torch.inference_mode(False):
            slot = torch.from_numpy(adjoining(nbytes) if shared is None else shared.data)
        self._slots[slot.data_ptr()] = shared
        return slot

    def memory(self, nbytes: int) -> torch.Tensor:
        """Page-aligned memory for a unit that is to stay."""
        with torch.inference_mode(False):
            return torch.from_numpy(anonymous(nbytes))

    def fill(self, unit: str, slot: torch.Tensor, *, priority: int = 0, known: Known = unknown) -> Batch:
        """Begin to read a unit into a slot."""
        self.release(slot)
        fronted = self._fronted(unit, slot)
        if fronted is not None:
            # Read to where it will be seen, the pages are found by the threads that read, not by the one that computes.
            self._show(fronted, slot)
        memory = slot.numpy() if fronted is None else fronted.data
        begin = fronted.front_bytes if fronted is not None and fronted.is_there else 0
        staying = self._staying.get(unit)
        goes_again = slot.data_ptr() in self._slots  # else it is to stay in that memory, all of it
        if goes_again and staying is not None and staying.is_expanded:
            batch = self._refill.batch_of(unit, staying.prepare(memory, begin))
        elif fronted is not None:
            batch = self._refill.batch_of_part(unit, begin, memory.size, memory)
        else:
            batch = self._refill.batch(unit, memory)
        self._filling[slot.data_ptr()] = unit
        known(batch)
        return self._refill.reader.begin(batch, priority)

    def bring_kept(self) -> None:
        """Read what stays and is neither there nor on its way with its unit."""
        batches: dict[str, Batch] = {}
        coming = set(self._filling.values())
        try:
            for unit, staying in self._staying.items():
                missing = staying.missing() if unit not in coming else []
                if missing:
                    batches[unit] = self._refill.batch_of(unit, prepare(missing))
                    self._refill.reader.begin(batches[unit])
            for batch in batches.values():
                batch.wait()
        finally:
            for batch in batches.values():
                batch.cancel()
        for unit in batches:
            self._refill.check(unit)
            if self._staying[unit].front_bytes:
                self._staying[unit].fronted.is_there = True

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
        self._filling.pop(slot.data_ptr(), None)
        fronted = self._seen.pop(slot.data_ptr(), None)
        if fronted is not None and fronted.slot is self._slots[slot.data_ptr()]:
            fronted.hide()

    def forget(self, slot: torch.Tensor) -> None:
        """Hold on to nothing that was prepared for a slot; with the last of them goes what stayed."""
        self._refill.forget(slot.numpy())
        self.release(slot)
        shared = self._slots.pop(slot.data_ptr(), None)
        if shared is not None:
            shared.close()
        if not self._slots:
            for staying in self._staying.values():
                self._refill.forget(staying.memory)
                staying.drop()
        for staying in self._staying.values():
            staying.forget(slot.numpy())

    def check(self, unit: str) -> None:
        """Check that the files of a unit are those whose headers were read."""
        with self._dropped_if_changed():
            self._refill.check(unit)

    def check_all(self) -> None:
        """Check that all files are those whose headers were read."""
        with self._dropped_if_changed():
            self._refill.check_all()

    @contextlib.contextmanager
    def _dropped_if_changed(self) -> Iterator[None]:
        """What was kept while a file was another one is not used, should the right one come back."""
        try:
            yield
        except LoadstoneError:
            for staying in self._staying.values():
                staying.drop_compressed()
            raise

    def readers(self) -> tuple[Reader, ...]:
        """The one there is."""
        return (self._refill.reader,)

    def fill_whole(self) -> None:
        """Read all of each unit from now on."""
        self._staying.clear()
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
        staying, nbytes = self._staying.get(unit), self._refill.recipes[unit].nbytes
        if staying is None or not staying.front_bytes or slot.numel() >= nbytes:
            return None
        return staying.fronted

    def _show(self, fronted: FrontedUnit, slot: torch.Tensor) -> None:
        shared = self._slots[slot.data_ptr()]
        if shared is None:
            raise RuntimeError("a slot that was made when nothing had a front is seen in itself only")
        fronted.show(shared)
        self._seen[slot.data_ptr()] = fronted
