"""Which unit is in which slot, and what happens when one is needed: the accounting of a streamed model.

Slots are memory that was allocated once. A unit whose forward begins is waited for, its parameters become views of its
slot, and when the forward is over they are placeholders again and the slot is read anew with what comes next, which
may be the beginning of the next pass. The files are the only copy; nothing is ever written back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from loadstone.errors import StreamedModel
from loadstone.execute.placeholder import StreamedParameter, Take
from loadstone.execute.prefetch import Order
from loadstone.execute.values import StreamStats
from loadstone.stream.filler import Filler, Filling, slot_sizes
from loadstone.stream.rows import Table


class State(Enum):
    """What is in a slot."""

    EMPTY = "nothing"
    COMING = "a unit that is being read"
    READY = "a unit that waits to be used"
    USED = "a unit that computes"


@dataclass(slots=True, eq=False)
class _Slot:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One parameter of a unit.

    Attributes:
        placeholder: what stands for it.
        owners: the parameter dicts of the modules that hold it, with its name there.
    """

    placeholder: StreamedParameter
    owners: tuple[tuple[dict[str, Any], str], ...]


class Residency:
    """The slots of one model. Forwards of several threads take turns.

    Args:
        units: what each unit holds, in the order in which units are likely used; the order of the members is that of
            the unit's places in `refill`.
        refill: fills slots with them.
        num_slots: how many are in memory at a time.

    Attributes:
        hooks: what calls this when modules compute.
    """

    def __init__(self, units: Mapping[str, Sequence[Member]], refill: Filler, num_slots: int) -> None:
        self._units = dict(units)
        self._refill = refill
        self._slots = [_Slot(data=refill.slot(nbytes)) for nbytes in slot_sizes(refill, units, num_slots)]
        self._where: dict[str, _Slot] = {}
        self._order = Order(tuple(units))
        self._turn = threading.RLock()
        self._entered: list[str] = []
        self._closed = False
        self._passes = self._uses = self._hits = self._unforeseen = self._streamed_bytes = 0
        self._stall_s = 0.0
        self.hooks: list[RemovableHandle] = []
        self._read_ahead()

    def stats(self) -> StreamStats:
        """What was done so far."""
        return StreamStats(
            passes=self._passes,
            uses=self._uses,
            hits=self._hits,
            unforeseen=self._unforeseen,
            streamed_bytes=self._streamed_bytes,
            stall_s=self._stall_s,
            num_units=len(self._units),
            num_slots=len(self._slots),
            slot_bytes=sum(slot.data.numel() for slot in self._slots),
            pass_bytes=sum(map(self._refill.moved_bytes, self._units)),
        )

    def close(self) -> None:
        """End the threads and close the files; the model cannot be used any more."""
        with self._turn:
            self._closed = True
            self._refill.close()

    def begin_pass(self, *_: Any) -> None:
        """Before the forward of the whole model: take the turn."""
        self._turn.acquire()
        if self._entered:  # an interrupt (Ctrl-C) ended this thread's last forward without a word
            self._abandon()
        self._entered.append("")
        self._passes += 1

    def end_pass(self, *_: Any) -> None:
        """After it."""
        if self.is_computing():
            self._entered.remove("")
            self._turn.release()

    def enter(self, unit: str, *_: Any) -> None:
        """Before the forward of a unit: have its parameters in place.

        Raises:
            StreamedModel: gradients were asked for, or the model was closed.
            LoadstoneError: its files cannot be read, or are not those whose headers were read.
        """
        self._turn.acquire()
        self._entered.append(unit)
        self._refuse_gradients(unit)
        slot = self._where.get(unit)
        if slot is None or slot.state is not State.USED:
            self._uses += 1
            self._order.visit(unit)
            slot = self._arrived(unit)
            slot.state = State.USED
            self._switch(unit, slot)
        slot.depth += 1
        self._read_ahead()

    def leave(self, unit: str, *hooked: Any) -> Any:
        """After it: let the slot go, and read what comes next.

        Returns:
            The unit's output where part of it lay in the slot, else None.
        """
        if not self.is_computing() or unit not in self._entered:
            return None
        self._entered.remove(unit)
        slot, output = self._where.get(unit), None
        if slot is not None and slot.state is State.USED:
            output = _kept(hooked[-1], slot.data)
            slot.depth -= 1
            if not slot.depth:
                self._let_go(slot)
                self._read_ahead()
        self._turn.release()
        return output

    def look_up(self, rows: Table, table: torch.Tensor, fqn: str, ids: torch.Tensor, take: Take) -> torch.Tensor:
        """Read rows of a table, and take what is wanted of them.

        Args:
            rows: reads them.
            table: where they are then.
            fqn: the table's name.
            ids: the numbers of the rows.
            take: called with the table; what it returns must not lie in it.

        Returns:
            What `take` returned.
        """
        with self._turn:
            self._refuse_gradients(fqn)
            before, begin = rows.read_bytes, time.perf_counter()
            rows.bring(ids.numpy(force=True))
            self._stall_s += time.perf_counter() - begin
            self._streamed_bytes += rows.read_bytes - before
            taken = take(table)
            rows.trim()
            return taken

    def lend(self, unit: str, work: Callable[[], Any]) -> Any:
        """Have a unit in place while `work` runs, though its module does not compute.

        Args:
            unit: the unit.
            work: uses its parameters.

        Returns:
            What `work` returned; what of it lay in the slot is copied.
        """
        self.enter(unit)
        result = None
        try:
            result = work()
        finally:
            copied = self.leave(unit, result)
        return result if copied is None else copied

    def is_computing(self) -> bool:
        """Whether a forward of the model is under way in this thread."""
        mine = self._turn.acquire(blocking=False)
        if mine:
            self._turn.release()
        return mine and bool(self._entered)

    def _abandon(self) -> None:
        """Forget forwards of this thread that never ended."""
        for slot in self._slots:
            if slot.state is State.USED:
                self._let_go(slot)
        for _ in self._entered:
            self._turn.release()
        self._entered.clear()

    def _refuse_gradients(self, unit: str) -> None:
        if self._closed:
            raise StreamedModel(f"{unit}: its model was closed and its files with it; load the model again.")
        if torch.is_grad_enabled():
            raise StreamedModel(
                f"{unit}: expected a forward without gradients, found them enabled; the weights are gone after the "
                "forward, so nothing can be propagated back. Use torch.inference_mode() or torch.no_grad()."
            )

    def _arrived(self, unit: str) -> _Slot:
        """The slot of a unit, once all of it is there."""
        slot = self._where.get(unit)
        if slot is None:
            self._unforeseen += 1
            slot = self._spare(unit)
            self._begin(unit, slot, priority=-1)
        if slot.state is State.COMING and slot.batch is not None:
            begin = time.perf_counter()
            self._hits += slot.batch.is_over
            try:
                slot.batch.wait()
            except BaseException:
                self._empty(slot)
                raise
            self._stall_s += time.perf_counter() - begin
            self._streamed_bytes += slot.batch.total_bytes
            slot.state, slot.batch = State.READY, None
        else:
            self._hits += 1
        self._refill.attend(slot.data)
        try:
            self._refill.check(unit)
        except BaseException:
            self._empty(slot)
            raise
        return slot

    def _spare(self, unit: str) -> _Slot:
        """A slot for a unit that nobody foresaw: the one whose content is wanted last."""
        soon = self._order.coming(len(self._slots))
        free = [slot for slot in self._slots if slot.state is not State.USED and self._has_room(slot, unit)]
        if not free:
            raise StreamedModel(
                f"{unit}: expected a free slot, found all {len(self._slots)} computing, one unit within the other; "
                "use more slots."
            )
        return max(free, key=lambda slot: soon.index(slot.unit) if slot.unit in soon else len(soon))

    def _read_ahead(self) -> None:
        """Fill every slot that is not needed with what comes next, each unit into the smallest that it fits in."""
        free = [slot for slot in self._slots if slot.state is not State.USED]
        soon = self._order.coming(len(free))
        spare = [slot for slot in free if slot.unit not in soon]
        for unit in soon:
            fitting = [slot for slot in spare if self._has_room(slot, unit)]
            if unit not in self._where and fitting:
                slot = min(fitting, key=lambda slot: slot.data.numel())
                spare.remove(slot)
                self._begin(unit, slot, priority=0)

    def _has_room(self, slot: _Slot, unit: str) -> bool:
        return slot.data.numel() >= self._refill.layout(unit).nbytes

    def _begin(self, unit: str, slot: _Slot, *, priority: int) -> None:
        self._empty(slot)
        slot.batch = self._refill.fill(unit, slot.data, priority=priority)
        slot.state, slot.unit = State.COMING, unit
        self._where[unit] = slot

    def _empty(self, slot: _Slot) -> None:
        if slot.batch is not None:
            slot.batch.cancel()
        self._where.pop(slot.unit, None)
        slot.state, slot.unit, slot.batch = State.EMPTY, "", None

    def _switch(self, unit: str, slot: _Slot) -> None:
        """Put the parameters that lie in a slot into their modules."""
        if unit not in slot.parameters:
            slot.parameters[unit] = self._views(unit, slot.data)
        for member, parameter in zip(self._units[unit], slot.parameters[unit], strict=True):
            for owner, name in member.owners:
                owner[name] = parameter

    def _let_go(self, slot: _Slot) -> None:
        for member in self._units[slot.unit]:
            for owner, name in member.owners:
                owner[name] = member.placeholder
        slot.state, slot.depth = State.READY, 0
        self._refill.release(slot.data)

    def _views(self, unit: str, data: torch.Tensor) -> list[nn.Parameter]:
        with torch.inference_mode(False):
            return [
                nn.Parameter(tensor, requires_grad=member.placeholder.requires_grad)
                for tensor, member in zip(self._refill.layout(unit).views(data), self._units[unit], strict=True)
            ]

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled, and the model with it."""
        raise StreamedModel(
            "expected a model that is wholly in memory to copy or pickle, found one that is streamed from its files; "
            "load it again instead of copying it."
        )


def _kept(output: Any, slot: torch.Tensor) -> Any:
    """A unit's output with what lies in its slot copied out of it; None where nothing does."""
    if isinstance(output, torch.Tensor):
        begin = slot.data_ptr()
        return output.clone() if begin <= output.untyped_storage().data_ptr() < begin + slot.numel() else None
    if isinstance(output, list | tuple) and type(output) in (list, tuple):
        kept = [_kept(one, slot) for one in output]
        if any(one is not None for one in kept):
            return type(output)(old if new is None else new for old, new in zip(output, kept, strict=True))
    if isinstance(output, dict):
        changed = {key: new for key, value in output.items() if (new := _kept(value, slot)) is not None}
        for key, new in changed.items():
            output[key] = new
    return None
