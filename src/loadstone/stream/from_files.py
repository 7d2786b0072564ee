"""Slots of host memory that are filled from files, by threads, past the page cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from loadstone.compression import can_compress, kept_bytes, whole_grains
from loadstone.errors import LoadstoneError
from loadstone.hardware.memory import can_show_pages
from loadstone.stream.compressed import Compressed
from loadstone.stream.filler import Known, Layout, unknown
from loadstone.stream.fronts import FrontedUnit, SharedSlot, front_bytes
from loadstone.stream.memory import Bytes, anonymous, populate
from loadstone.stream.read import Batch, Reader
from loadstone.stream.refill import NOWHERE, Recipe, Refill
from loadstone.stream.spans import Fill, Prepared, prepare


@dataclass(frozen=True, slots=True, kw_only=True)
class Stays:
    """What stays of units that come and go, told by what does not.

    Attributes:
        slot_bytes: the most of a unit that goes through a slot; what it has before that stays. 0 for all of it.
        read_bytes: the most that is read of it; what a slot has before that stays compressed. None for all that goes
            through the slot.
    """

    slot_bytes: int = 0
    read_bytes: int | None = None

    def front_of(self, recipe: Recipe) -> int:
        """What stays of a unit as it is: its first bytes."""
        possible = self.slot_bytes and recipe.is_moved and can_show_pages()
        return front_bytes(recipe.nbytes, self.slot_bytes) if possible else 0

    def compressed_of(self, recipe: Recipe) -> range:
        """What stays of it compressed: bytes behind those."""
        front = self.front_of(recipe)
        if self.read_bytes is None or not recipe.is_compressible or not can_compress():
            return range(front, front)
        return range(front, front + whole_grains(recipe.nbytes - self.read_bytes - front))


ALL_GOES = Stays()


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
        recipes = {unit: refill.recipes[unit] for unit in lasting}
        self._fronts = {unit: front for unit, one in recipes.items() if (front := stays.front_of(one))}
        self._ranges = {unit: part for unit, one in recipes.items() if (part := stays.compressed_of(one))}
        self._slots: dict[int, SharedSlot | None] = {}
        self._units: dict[str, FrontedUnit] = {}
        self._compressed: dict[str, Compressed] = {}
        self._seen: dict[int, FrontedUnit] = {}
        self._filling: dict[int, str] = {}

    def knows(self, unit: str) -> bool:
        """Whether it was told what to read for a unit."""
        return unit in self._refill.recipes

    def layout(self, unit: str) -> Layout:
        """How a unit lies in memory: in the order of its files."""
        if unit not in self._layouts:
            recipe = self._refill.recipes[unit]
            self._layouts[unit] = Layout(
                places=tuple(recipe.places),
                nbytes=recipe.nbytes,
                front_bytes=self._fronts.get(unit, 0),
                compressed_bytes=kept_bytes(len(self._ranges.get(unit, ()))),
            )
        return self._layouts[unit]

    def moved_bytes(self, unit: str) -> int:
        """What is read for it each time."""
        recipe = self._refill.recipes[unit]
        if unit in self._ranges:
            compressed = self._compressed.get(unit)
            refused = compressed.read_bytes if compressed is not None else 0
            return refused + recipe.moved_bytes_behind(self._ranges[unit].stop)
        front = self._fronts.get(unit)
        return recipe.moved_bytes if front is None else recipe.moved_bytes_behind(front)

    def slot(self, nbytes: int) -> torch.Tensor:
        """Page-aligned host memory; a normal tensor also where it is made in inference mode.

        Its pages are found in one go. Where the threads that read find them, each in its own stretch, neighbours come
        from all over memory, and the disk has to be asked for more and smaller pieces.
        """
        shared = SharedSlot(nbytes) if self._fronts else None
        if shared is None:
            slot = self.memory(nbytes)
            populate(slot.numpy(), write=True)
        else:
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
        if fronted is not None:
            # Read to where it will be seen, the pages are found by the threads that read, not by the one that computes.
            self._show(fronted, slot)
        memory = slot.numpy() if fronted is None else fronted.data
        begin = fronted.front_bytes if fronted is not None and fronted.is_there else 0
        goes_again = slot.data_ptr() in self._slots  # else it is to stay in that memory, all of it
        if goes_again and unit in self._ranges:
            batch = self._refill.batch_of(unit, self._expanding(unit, memory, begin))
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
            for unit in dict.fromkeys((*self._fronts, *self._ranges)):
                missing = self._missing(unit) if unit not in coming else []
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
            if unit in self._fronts:
                self._memory_of(unit).is_there = True

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
            for fronted in self._units.values():
                self._refill.forget(fronted.data)
            self._units.clear()
            self._compressed.clear()
        for compressed in self._compressed.values():
            compressed.forget(slot.numpy())

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
            self._compressed.clear()
            raise

    def readers(self) -> tuple[Reader, ...]:
        """The one there is."""
        return (self._refill.reader,)

    def fill_whole(self) -> None:
        """Read all of each unit from now on."""
        self._fronts.clear()
        self._ranges.clear()
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

    def _missing(self, unit: str) -> list[Fill]:
        """What is to be read of what stays of a unit."""
        missing: list[Fill] = []
        if unit in self._fronts and not (fronted := self._memory_of(unit)).is_there:
            parts = self._refill.recipes[unit].parts(0, fronted.front_bytes, fronted.data)
            missing += [part for _, part in parts]
        return missing + self._compressed_of(unit).missing() if unit in self._ranges else missing

    def _expanding(self, unit: str, memory: Bytes, begin: int) -> Prepared:
        """What brings a unit whose middle is kept compressed, from byte `begin` on."""
        recipe, middle, compressed = self._refill.recipes[unit], self._ranges[unit], self._compressed_of(unit)
        before = recipe.parts(begin, middle.start, memory) if begin < middle.start else ()
        behind = recipe.parts(middle.stop, memory.size, memory)
        return compressed.prepare(memory, [part for _, part in (*before, *behind)])

    def _compressed_of(self, unit: str) -> Compressed:
        if unit not in self._compressed:
            middle = self._ranges[unit]
            self._compressed[unit] = Compressed(self._refill.recipes[unit].parts(middle.start, middle.stop, NOWHERE))
        return self._compressed[unit]

    def _show(self, fronted: FrontedUnit, slot: torch.Tensor) -> None:
        shared = self._slots[slot.data_ptr()]
        if shared is None:
            raise RuntimeError("a slot that was made when nothing had a front is seen in itself only")
        fronted.show(shared)
        self._seen[slot.data_ptr()] = fronted

    def _memory_of(self, unit: str) -> FrontedUnit:
        if unit not in self._units:
            self._units[unit] = FrontedUnit(self._refill.recipes[unit].nbytes, self._fronts[unit])
        return self._units[unit]
