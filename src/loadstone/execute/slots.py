"""Memory in which the units of a streamed model take turns: what is in it, and which of it comes next.

Slots are memory that was allocated once, wherever the model computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import nn

from loadstone.errors import StreamedModel
from loadstone.execute.prefetch import Order
from loadstone.stream.filler import Filler, Filling, slot_sizes


class State(Enum):
    """What is in a slot."""

    EMPTY = "nothing"
    COMING = "a unit that is being read"
    READY = "a unit that waits to be used"
    USED = "a unit that computes"


@dataclass(slots=True, eq=False)
class Slot:
    """Memory for one unit at a time.

    Attributes:
        data: the memory.
        state: what is in it.
        unit: which one; "" for none.
        batch: what is on its way into it.
        depth: how many forwards that use it are under way, one within the other.
        parameters: the parameters of each unit as views of this slot, made when they are first needed.
    """

    data: torch.Tensor
    state: State = State.EMPTY
    unit: str = ""
    batch: Filling | None = None
    depth: int = 0
    parameters: dict[str, list[nn.Parameter]] = field(default_factory=dict)


class Slots:
    """The slots of one model, and where each unit is; for whoever has the turn.

    Args:
        filler: fills them.
        units: what comes and goes.
        count: how many are wanted; no more than there are units.
    """

    def __init__(self, filler: Filler, units: Iterable[str], count: int) -> None:
        self._filler = filler
        self._slots = [Slot(data=filler.slot(nbytes)) for nbytes in slot_sizes(filler, units, count)]
        self._where: dict[str, Slot] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots)

    @property
    def nbytes(self) -> int:
        """The memory of all of them."""
        return sum(slot.data.numel() for slot in self._slots)

    def find(self, unit: str) -> Slot | None:
        """Where a unit is, or is on its way to."""
        return self._where.get(unit)

    def for_unforeseen(self, unit: str, order: Order) -> Slot:
        """A slot for a unit that nobody foresaw: the one whose content is wanted last.

        Raises:
            StreamedModel: all of them compute.
        """
        soon = order.coming(len(self._slots))
        free = [slot for slot in self._slots if slot.state is not State.USED and self._has_room(slot, unit)]
        if not free:
            raise StreamedModel(
                f"{unit}: expected a free slot, found all {len(self._slots)} computing, one unit within the other; "
                "use more slots."
            )
        return max(free, key=lambda slot: soon.index(slot.unit) if slot.unit in soon else len(soon))

    def fill_ahead(self, order: Order) -> None:
        """Fill every slot that is not needed with what comes next, each unit into the smallest that it fits in."""
        free = [slot for slot in self._slots if slot.state is not State.USED]
        soon = order.coming(len(free))
        spare = [slot for slot in free if slot.unit not in soon or self._where.get(slot.unit) is not slot]
        for unit in soon:
            fitting = [slot for slot in spare if self._has_room(slot, unit)]
            if unit not in self._where and fitting:
                slot = min(fitting, key=lambda slot: slot.data.numel())
                spare.remove(slot)
                self.fill(unit, slot, priority=0)

    def fill(self, unit: str, slot: Slot, *, priority: int) -> None:
        """Begin to fill a slot that is not in use; lower numbers come first."""

        def known(filling: Filling) -> None:
            # Before it runs; the unit is found here only once it runs: an interrupt can come at any line.
            slot.batch = filling

        self.empty(slot)
        self._filler.fill(unit, slot.data, priority=priority, known=known)
        slot.state, slot.unit = State.COMING, unit
        self._where[unit] = slot

    def empty(self, slot: Slot) -> None:
        """Forget what is in a slot, or on its way there."""
        if self._where.get(slot.unit) is slot:
            del self._where[slot.unit]
        slot.state, slot.unit = State.EMPTY, ""
        if slot.batch is not None:
            slot.batch.cancel()
            slot.batch = None

    def empty_unused(self) -> None:
        """The same for all that nobody computes with."""
        for slot in self._slots:
            if slot.state is not State.USED:
                self.empty(slot)

    def _has_room(self, slot: Slot, unit: str) -> bool:
        return slot.data.numel() >= self._filler.layout(unit).nbytes


def kept(output: Any, slot: torch.Tensor) -> Any:
    """A unit's output with what lies in its slot copied out of it; None where nothing does."""
    if isinstance(output, torch.Tensor):
        begin = slot.data_ptr()
        return output.clone() if begin <= output.untyped_storage().data_ptr() < begin + slot.numel() else None
    if isinstance(output, list | tuple) and type(output) in (list, tuple):
        copied = [kept(one, slot) for one in output]
        if any(one is not None for one in copied):
            return type(output)(old if new is None else new for old, new in zip(output, copied, strict=True))
    if isinstance(output, dict):
        changed = {key: new for key, value in output.items() if (new := kept(value, slot)) is not None}
        for key, new in changed.items():
            output[key] = new
    return None
