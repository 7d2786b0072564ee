"""The experts that are in memory, of all layers together: a room of fixed size.

A router's choice is told before the experts compute. What is missing of it is read at once, in the order in which it
will be used; each entry is waited for when it is used, so that computing with the first goes on while the last is on
its way. Chosen entries may be more than the room holds: those that were used make room for those to come.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from loadstone.execute.expert_memory import EntryMemory, Slot
from loadstone.execute.frequency import Frequencies, Item, Shelf
from loadstone.stream.entries import Entries


@dataclass(slots=True, eq=False)
class _Rack:
    """The slots of one size, and what of the layer that computes still waits for one."""

    shelf: Shelf
    slots: list[Slot]
    waiting: deque[Item] = field(default_factory=deque)
    expendable: Iterator[int] = field(default_factory=lambda: iter(()))


@dataclass(slots=True, kw_only=True)
class ExpertCounts:
    """What was done so far.

    Attributes:
        uses: entries that routers chose.
        hits: those that were in memory already.
        read_bytes: from the files.
        stall_s: how long was waited.
        room_bytes: the memory of all slots.
    """

    uses: int = 0
    hits: int = 0
    read_bytes: int = 0
    stall_s: float = 0.0
    room_bytes: int = 0


class ExpertRoom:
    """Brings in what routers choose. Its owner sees to it that one thread uses it at a time.

    Args:
        layers: the fused parameters of each layer.
        memory: where their entries go; knows them by the same numbers.
        nbytes: how much memory the entries may take; it is exceeded only where not even one expert fits.

    Attributes:
        counts: what was done so far.
    """

    def __init__(self, layers: Sequence[Sequence[Entries]], memory: EntryMemory, nbytes: int) -> None:
        self._memory = memory
        self._tables = [table for layer in layers for table in layer]
        self._layer_of = np.repeat(np.arange(len(layers)), [len(layer) for layer in layers])
        self._tables_of = [np.flatnonzero(self._layer_of == layer).tolist() for layer in range(len(layers))]
        self._frequencies = Frequencies(len(layers), max(table.count for table in self._tables))
        self._wanted: dict[Item, None] = {}
        self._foreseen: dict[Item, None] = {}
        sizes = [memory.slot_bytes(number) for number in range(len(self._tables))]
        racks = {size: self._rack(size, sizes, nbytes) for size in set(sizes)}
        self._rack_of = [racks[size] for size in sizes]
        self._racks = list(racks.values())
        self.counts = ExpertCounts(room_bytes=sum(slot.size for rack in self._racks for slot in rack.slots))

    def count(self, table: int) -> int:
        """How many entries a table has."""
        return self._tables[table].count

    def rest(self) -> None:
        """Forget every entry and give the memory back; what is chosen afterwards is read again."""
        self._wanted.clear()
        self._foreseen.clear()
        for rack in self._racks:
            rack.waiting.clear()
            rack.expendable = iter(())
            for place, slot in enumerate(rack.slots):
                rack.shelf.drop(place)
                if slot.batch is not None:
                    slot.batch.cancel()
                slot.vacate()

    def announce(self, layer: int, chosen: NDArray[np.int64], num_tokens: int, *, by_expert: bool) -> None:
        """Begin to read what a layer will use.

        Args:
            layer: its number.
            chosen: the numbers of the experts, once for each token that chose them.
            num_tokens: how many tokens chose.
            by_expert: it uses all of one expert before the next, rather than one parameter before the next.
        """
        tables = self._tables_of[layer]
        counts = np.bincount(chosen, minlength=self.count(tables[0]))
        self._frequencies.note(layer, counts, num_tokens)
        experts = np.flatnonzero(counts).tolist()
        if by_expert:
            items = [(table, expert) for expert in experts for table in tables]
        else:
            items = [(table, expert) for table in tables for expert in experts]
        self._wanted = dict.fromkeys(items)
        self._give_up_foreseen()
        for rack in self._racks:
            rack.waiting.clear()
            rack.expendable = iter(())
        for item in items:
            slot = self._slot(item)
            self.counts.hits += slot is not None and (slot.batch is None or slot.batch.is_over)
            if slot is None:
                self._rack_of[item[0]].waiting.append(item)
        self.counts.uses += len(items)
        self._read_on()

    def missing(self, layer: int, experts: NDArray[np.int64]) -> list[int]:
        """Which of some experts of a layer are neither there nor on their way."""
        tables = self._tables_of[layer]
        return [one for one in experts.tolist() if any(self._slot((table, one)) is None for table in tables)]

    def foresee(self, layer: int, experts: Iterable[int]) -> None:
        """Begin to read what a layer to come will likely use, as far as there is room that nobody needs.

        Args:
            layer: its number.
            experts: their numbers.
        """
        for item in [(table, expert) for expert in experts for table in self._tables_of[layer]]:
            rack = self._rack_of[item[0]]
            if self._slot(item) is None and not rack.waiting and self._begun(item, needed=False, priority=1):
                self._foreseen[item] = None

    def take(self, table: int, expert: int) -> torch.Tensor:
        """One entry, which stays as it is for as long as the tensor lives.

        Raises:
            LoadstoneError: its file cannot be read, or is not the one whose header was read.
        """
        item = (table, expert)
        self._read_on()
        slot = self._slot(item) or self._begun(item, needed=True) or self._memory.passing(item)
        if slot.batch is not None:
            self._wait(item, slot)
        self._wanted.pop(item, None)
        return self._memory.view(item, slot)

    def _wait(self, item: Item, slot: Slot) -> None:
        batch, begin = slot.batch, time.perf_counter()
        try:
            if batch is not None:
                batch.wait()
                self.counts.read_bytes += batch.total_bytes
            self._memory.check(item)
        except BaseException:
            self._forget(item)
            raise
        finally:
            self.counts.stall_s += time.perf_counter() - begin
        slot.batch = None

    def _read_on(self) -> None:
        """Begin to read what waits, as far as there is room."""
        for rack in self._racks:
            while rack.waiting:
                item = rack.waiting[0]
                is_due = item in self._wanted and self._slot(item) is None
                if is_due and self._begun(item, needed=False) is None:
                    break
                rack.waiting.popleft()

    def _give_up_foreseen(self) -> None:
        """What was foreseen and is not wanted after all does not come, unless it is there."""
        for item in self._foreseen:
            slot = self._slot(item)
            if item not in self._wanted and slot is not None and slot.batch is not None and not slot.batch.is_over:
                slot.batch.cancel()
                self._forget(item)
        self._foreseen.clear()

    def _begun(self, item: Item, *, needed: bool, priority: int = -1) -> Slot | None:
        """A slot into which an entry is being read; None where all are in use.

        Args:
            item: the entry.
            needed: it is needed now, so that what is needed later gives way.
            priority: lower numbers come first.
        """
        rack = self._rack_of[item[0]]
        place = self._free_place(rack)
        if place is None and (needed or item in self._wanted):
            later = [*reversed(self._foreseen), *(reversed(self._wanted) if needed else ())]
            places = (rack.shelf.place_of(other) for other in later)
            place = next((one for one in places if one is not None and not rack.slots[one].is_lent), None)
        if place is None or not self._memory.fits(item, rack.slots[place]):
            return None
        slot = rack.slots[place]
        if slot.batch is not None:
            self.counts.read_bytes += slot.batch.total_bytes if slot.batch.is_over else 0
            slot.batch.cancel()
        rack.shelf.put(place, item)
        self._memory.fill(item, slot, priority=priority)
        return slot

    def _free_place(self, rack: _Rack) -> int | None:
        """The place of what is wanted least of what is not in use."""
        for _ in range(2):
            for place in rack.expendable:
                item = rack.shelf.item_at(place)
                if item not in self._wanted and item not in self._foreseen and not rack.slots[place].is_lent:
                    return place
            rack.expendable = rack.shelf.expendable()
        return None

    def _slot(self, item: Item) -> Slot | None:
        rack = self._rack_of[item[0]]
        place = rack.shelf.place_of(item)
        return None if place is None else rack.slots[place]

    def _forget(self, item: Item) -> None:
        shelf = self._rack_of[item[0]].shelf
        place = shelf.place_of(item)
        if place is not None:
            self._rack_of[item[0]].slots[place].batch = None
            shelf.drop(place)

    def _rack(self, size: int, sizes: Sequence[int], nbytes: int) -> _Rack:
        """Slots of one size, as many as its part of all entries is of the room."""
        alike = [number for number, one in enumerate(sizes) if one == size]
        most = sum(self.count(number) for number in alike)
        total = sum(one * self.count(number) for number, one in enumerate(sizes))
        together = int(np.bincount(self._layer_of[alike]).max())
        count = min(most, max(together, nbytes * most // total))
        shelf = Shelf(count, self._frequencies, self._layer_of)
        return _Rack(shelf=shelf, slots=self._memory.slots(size, count))
