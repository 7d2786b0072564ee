"""Memory for entries of experts, and what brings them there: read into host memory, or sent to an accelerator."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from loadstone.checkpoint.files import check_unchanged
from loadstone.execute.frequency import Item
from loadstone.hardware.pages import Bytes, adjoining, anonymous, give_back
from loadstone.stream.entries import Entries
from loadstone.stream.filler import Filler, Filling
from loadstone.stream.materialize import torch_dtype
from loadstone.stream.rearrange import target_nbytes
from loadstone.stream.refill import Recipe, Refill
from loadstone.stream.source import ALIGNMENT
from loadstone.units import round_up

# Of slots that are allocated together. A tensor that somebody holds on to keeps all of it.
_TOGETHER_BYTES = 32 << 20


class Slot(Protocol):
    """Memory for one entry at a time.

    Attributes:
        size: its bytes.
        batch: what is on its way into it.
    """

    size: int
    batch: Filling | None

    @property
    def is_lent(self) -> bool:
        """Whether somebody still has a tensor over it."""

    def vacate(self) -> None:
        """Give its memory back until it is filled again; whoever has a tensor over it keeps the elements."""


class EntryMemory(Protocol):
    """Where entries go. An item is the number of a table and that of an entry."""

    def slot_bytes(self, table: int) -> int:
        """Room for any entry of a table."""

    def slots(self, size: int, count: int) -> list[Any]:
        """New slots."""

    def fits(self, item: Item, slot: Any) -> bool:
        """Whether an entry finds room in a slot."""

    def fill(self, item: Item, slot: Any, *, priority: int = -1) -> None:
        """Begin to bring an entry into a slot; lower numbers come first."""

    def passing(self, item: Item) -> Any:
        """A slot of its own for an entry, which is on its way there."""

    def view(self, item: Item, slot: Any) -> torch.Tensor:
        """An entry that has arrived in a slot, which is lent for as long as the tensor lives."""

    def check(self, item: Item) -> None:
        """Check the files that an entry was read from.

        Raises:
            LoadstoneError: one is not that whose header was read.
        """


def _anywhere(nbytes: int) -> int:
    """Room for so many bytes wherever in a block of the disk they begin."""
    return round_up(nbytes, ALIGNMENT) + ALIGNMENT


@dataclass(slots=True, eq=False)
class _HostSlot:
    """Memory of the host.

    Attributes:
        data: it.
        batch: what is being read.
        lent: the array that tensors over the memory keep alive; gone when they are.
    """

    data: Bytes
    batch: Filling | None = None
    lent: weakref.ref[Any] | None = None

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def is_lent(self) -> bool:
        return self.lent is not None and self.lent() is not None

    def vacate(self) -> None:
        if self.is_lent:
            self.data = anonymous(self.data.size)
        else:
            give_back(self.data)
        self.batch = self.lent = None


class HostMemory:
    """Entries that are read to where the host computes with them.

    Args:
        tables: the fused parameters.
        refill: what reads.
    """

    def __init__(self, tables: Sequence[Entries], refill: Refill) -> None:
        self._tables = tables
        self._refill = refill
        self._versions = [refill.versions([table.wanted]) for table in tables]
        self._recipes: dict[Item, Recipe] = {}

    def slot_bytes(self, table: int) -> int:
        """Entries begin anywhere in a block of the disk."""
        recipe = self._recipe((table, 0))
        return _anywhere(recipe.nbytes - recipe.places[0].begin)

    def slots(self, size: int, count: int) -> list[_HostSlot]:
        """Some of them side by side, so that small ones lie in huge pages too."""
        return [_HostSlot(data) for data in _side_by_side(size, count)]

    def fits(self, item: Item, slot: _HostSlot) -> bool:
        """Whether all that is read finds room."""
        return self._recipe(item).nbytes <= slot.size

    def fill(self, item: Item, slot: _HostSlot, *, priority: int = -1) -> None:
        """Begin to read."""
        prepared, _ = self._recipe(item).prepare(slot.data)
        slot.batch = self._refill.reader.repeat(prepared, self._refill.files, priority=priority)

    def passing(self, item: Item) -> _HostSlot:
        """Memory that goes with the last tensor over it."""
        slot = _HostSlot(anonymous(self._recipe(item).nbytes))
        self.fill(item, slot)
        return slot

    def view(self, item: Item, slot: _HostSlot) -> torch.Tensor:
        """Of an array that is lent."""
        target, place = self._tables[item[0]].target, self._recipe(item).places[0]
        array = slot.lent() if slot.lent is not None else None
        if array is None:
            array = slot.data[place.begin : place.begin + target_nbytes(target)]
            slot.lent = weakref.ref(array)
        return torch.from_numpy(array).view(torch_dtype(target.dtype)).view(target.shape[1:])

    def check(self, item: Item) -> None:
        """Those of its table."""
        check_unchanged(self._versions[item[0]])

    def _recipe(self, item: Item) -> Recipe:
        if item not in self._recipes:
            self._recipes[item] = self._tables[item[0]].recipe(item[1])
        return self._recipes[item]


def _side_by_side(size: int, count: int) -> Iterator[Bytes]:
    most = max(1, _TOGETHER_BYTES // size)
    for begin in range(0, count, most):
        together = min(most, count - begin)
        yield from np.split(adjoining(together * size, touch=False), together)


@dataclass(slots=True, eq=False)
class _FarSlot:
    """Memory of an accelerator.

    Attributes:
        size: its bytes.
        filler: what it is filled by, and what waits for whoever computes with it.
        data: the memory; None until it is filled.
        own_uses: how often its storage is used by this slot alone.
        batch: what is on its way into it.
    """

    size: int
    filler: Filler
    data: torch.Tensor | None = None
    own_uses: int = 0
    batch: Filling | None = None

    @property
    def is_lent(self) -> bool:
        return self.data is not None and _num_uses(self.data) > self.own_uses

    def memory(self) -> torch.Tensor:
        """The memory, made anew where it was given back."""
        if self.data is None:
            self.data = self.filler.slot(self.size)
            self.own_uses = _num_uses(self.data)
        return self.data

    def vacate(self) -> None:
        if self.data is not None:
            self.filler.forget(self.data)
        self.data = self.batch = None


def _num_uses(tensor: torch.Tensor) -> int:
    """How many tensors, also those that Python has no object of, lie in the same memory; torch tells nowhere else."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


class FarMemory:
    """Entries that are sent to an accelerator, from host memory or from their files.

    Args:
        names: of each entry, by table and number, as the filler knows it.
        filler: sends them.
    """

    def __init__(self, names: Sequence[Sequence[str]], filler: Filler) -> None:
        self._names = names
        self._filler = filler

    def slot_bytes(self, table: int) -> int:
        """What is sent in one piece begins where it does in a block of the disk."""
        layout = self._filler.layout(self._names[table][0])
        return _anywhere(layout.end - layout.places[0].begin)

    def slots(self, size: int, count: int) -> list[_FarSlot]:
        """Memory is taken when they are filled."""
        return [_FarSlot(size, self._filler) for _ in range(count)]

    def fits(self, item: Item, slot: _FarSlot) -> bool:
        """Whether its layout does."""
        return self._filler.layout(self._name(item)).slot_bytes <= slot.size

    def fill(self, item: Item, slot: _FarSlot, *, priority: int = -1) -> None:
        """Begin to send; what was asked to compute with the slot until now comes before."""
        memory = slot.memory()
        self._filler.release(memory)
        slot.batch = self._filler.fill(self._name(item), memory, priority=priority)

    def passing(self, item: Item) -> _FarSlot:
        """Memory that goes with the last tensor over it."""
        slot = _FarSlot(self._filler.layout(self._name(item)).slot_bytes, self._filler)
        self.fill(item, slot)
        return slot

    def view(self, item: Item, slot: _FarSlot) -> torch.Tensor:
        """What is computed with it from now on waits until it is there."""
        memory = slot.memory()
        self._filler.attend(memory)
        return self._filler.layout(self._name(item)).views(memory)[0][0]

    def check(self, item: Item) -> None:
        """As the filler does."""
        self._filler.check(self._name(item))

    def _name(self, item: Item) -> str:
        return self._names[item[0]][item[1]]
