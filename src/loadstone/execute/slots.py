"""The ring of a streamed model: memory that was allocated once, and which unit is in which part of it.

The slots are wherever the model computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import nn

from loadstone.errors import StreamedModel
from loadstone.events import NO_TRACE, Tracer
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
        seen: where the unit that computes lies: here, or behind a front of its own.
        depth: how many forwards that use it are under way, one within the other.
        parameters: the parameters of each unit as views of where it lies, made when they are first needed.
    """

    data: torch.Tensor
    seen: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    state: State = State.EMPTY
    unit: str = ""
    batch: Filling | None = None
    depth: int = 0
    parameters: dict[str, list[nn.Parameter]] = field(default_factory=dict)


class Ring:
    """The slots of one model, and what is in them; whoever uses it has the model's turn.

    Args:
        filler: fills them with units.

    Attributes:
        slots: the memory.
        where: the slot of each unit that is in one.
        units: what comes and goes, in the order in which it is likely used.
        uses: how often a unit was computed with.
        hits: uses whose unit was in memory already.
        unforeseen: uses whose unit was not even on its way.
        streamed_bytes: read for them, and of rows that were looked up.
        stall_s: how long that was waited for.
        tracer: keeps what is waited for.
    """

    def __init__(self, filler: Filler) -> None:
        self.slots: list[Slot] = []
        self.where: dict[str, Slot] = {}
        self.units: tuple[str, ...] = ()
        self.uses = self.hits = self.unforeseen = self.streamed_bytes = 0
        self.stall_s = 0.0
        self.tracer: Tracer = NO_TRACE
        self._filler = filler
        self._order = Order(())

    @property
    def pass_bytes(self) -> int:
        """What one use of every unit reads."""
        return sum(map(self._filler.moved_bytes, self.units))

    def stream(self, units: Sequence[str], num_slots: int) -> None:
        """Have slots for these units, and read ahead; none of them may be in use.

        Args:
            units: in the order in which they are likely used.
            num_slots: how many are in memory at a time.
        """
        sizes = slot_sizes(self._filler, units, num_slots)
        if tuple(units) != self.units:
            self.units, self._order = tuple(units), Order(tuple(units))
        for unit in self.where.keys() - set(units):
            self._empty(self.where[unit])
        kept: list[Slot] = []
        missing: list[int] = []
        for size in sizes:
            fitting = next((slot for slot in self.slots if slot.data.numel() == size and slot not in kept), None)
            if fitting is None:
                missing.append(size)
            else:
                kept.append(fitting)
        for slot in self.slots:
            if slot not in kept:
                self._empty(slot)
                self._filler.forget(slot.data)
        self.slots = kept  # what is too small or too large goes before its successor is allocated
        self.slots += [Slot(data=self._filler.slot(size)) for size in missing]
        self.read_ahead()

    def is_used(self) -> bool:
        """Whether a unit computes out of a slot."""
        return any(slot.state is State.USED for slot in self.slots)

    def arrive(self, unit: str) -> Slot:
        """The slot of a unit that is used now, once all of it is there.

        Raises:
            LoadstoneError: it cannot be read, or its files are not those whose headers were read.
        """
        self.uses += 1
        self._order.visit(unit)
        slot = self.where.get(unit)
        if slot is None:
            self.unforeseen += 1
            slot = self._spare(unit)
            self._begin(unit, slot, priority=-1)
        if slot.state is State.COMING and slot.batch is not None:
            self._wait(slot, slot.batch)
        else:
            self.hits += 1
        self._filler.attend(slot.data)
        self.check(partial(self._filler.check, unit))
        slot.seen = self._filler.seen(unit, slot.data)
        return slot

    def _wait(self, slot: Slot, batch: Filling) -> None:
        begin = time.perf_counter()
        self.hits += batch.is_over
        try:
            batch.wait()
        except BaseException:
            self._empty(slot)
            raise
        self.waited(slot.unit, begin, batch.total_bytes)
        slot.state, slot.batch = State.READY, None

    def waited(self, what: str, begin: float, nbytes: int) -> None:
        """Count what was read and waited for until now, for whatever comes and goes.

        Args:
            what: its name.
            begin: when the wait began, of `time.perf_counter`.
            nbytes: how much was read.
        """
        self.stall_s += time.perf_counter() - begin
        self.streamed_bytes += nbytes
        self.tracer.span("wait", what, begin, nbytes)

    def check(self, files: Callable[[], None]) -> None:
        """Check files; what was read ahead of wrong ones is dropped, for the right ones may be put back.

        Args:
            files: raises where they are wrong.
        """
        try:
            files()
        except BaseException:
            for slot in self.slots:
                if slot.state is not State.USED:
                    self._empty(slot)
            raise

    def read_ahead(self) -> None:
        """Fill every slot that is not needed with what comes next, each unit into the smallest that it fits in."""
        free = [slot for slot in self.slots if slot.state is not State.USED]
        soon = self._order.coming(len(free))
        spare = [slot for slot in free if slot.unit not in soon or self.where.get(slot.unit) is not slot]
        for unit in soon:
            fitting = [slot for slot in spare if self._has_room(slot, unit)]
            if unit not in self.where and fitting:
                slot = min(fitting, key=lambda slot: slot.data.numel())
                spare.remove(slot)
                self._begin(unit, slot, priority=0)

    def _spare(self, unit: str) -> Slot:
        """A slot for a unit that nobody foresaw: the one whose content is wanted last."""
        soon = self._order.coming(len(self.slots))
        free = [slot for slot in self.slots if slot.state is not State.USED and self._has_room(slot, unit)]
        if not free:
            raise StreamedModel(
                f"{unit}: expected a free slot, found all {len(self.slots)} computing, one unit within the other; "
                "use more slots."
            )
        return max(free, key=lambda slot: soon.index(slot.unit) if slot.unit in soon else len(soon))

    def _has_room(self, slot: Slot, unit: str) -> bool:
        return slot.data.numel() >= self._filler.layout(unit).slot_bytes

    def _begin(self, unit: str, slot: Slot, *, priority: int) -> None:
        def known(filling: Filling) -> None:
            # Before it runs; the unit is found here only once it runs: an interrupt can come at any line.
            slot.batch = filling

        self._empty(slot)
        for other in self.slots:
            # Left on its way by an interrupt: the same unit, whose front and what is behind it have one place for all
            # slots, would be expanded there while it is computed with.
            if other.batch is not None and self.where.get(other.unit) is not other:
                self._empty(other)
        self._filler.fill(unit, slot.data, priority=priority, known=known)
        slot.state, slot.unit = State.COMING, unit
        self.where[unit] = slot

    def _empty(self, slot: Slot) -> None:
        if self.where.get(slot.unit) is slot:
            del self.where[slot.unit]
        slot.state, slot.unit = State.EMPTY, ""
        if slot.batch is not None:
            slot.batch.cancel()
            slot.batch = None


def kept_output(output: Any, memory: torch.Tensor) -> Any:
    """A unit's output with what lies in the unit's memory copied out of it; None where nothing does."""
    if isinstance(output, torch.Tensor):
        begin = memory.data_ptr()
        return output.clone() if begin <= output.untyped_storage().data_ptr() < begin + memory.numel() else None
    if isinstance(output, list | tuple) and type(output) in (list, tuple):
        kept = [kept_output(one, memory) for one in output]
        if any(one is not None for one in kept):
            return type(output)(old if new is None else new for old, new in zip(output, kept, strict=True))
    if isinstance(output, dict):
        changed = {key: new for key, value in output.items() if (new := kept_output(value, memory)) is not None}
        for key, new in changed.items():
            output[key] = new
    return None
