"""Which unit is in which slot, and what happens when one is needed: the accounting of a streamed model.

Slots are memory that was allocated once. A unit whose forward begins is waited for, its parameters become views of its
slot, and when the forward is over they are placeholders again and the slot is read anew with what comes next, which
may be the beginning of the next pass. The files are the only copy; nothing is ever written back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from loadstone.errors import StreamedModel
from loadstone.events import NO_TRACE, Observer, Tracer, ignore
from loadstone.execute.expert_room import ExpertCounts
from loadstone.execute.meter import Meter
from loadstone.execute.placeholder import StreamedParameter, Take
from loadstone.execute.prefetch import Order
from loadstone.execute.turn import Turn
from loadstone.execute.values import StreamStats
from loadstone.stream.materialize import as_tensor
from loadstone.stream.memory import Bytes, anonymous
from loadstone.stream.read import Batch
from loadstone.stream.refill import Refill
from loadstone.stream.rows import Rows


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
        batch: what is being read.
        depth: how many forwards that use it are under way, one within the other.
        parameters: the parameters of each unit as views of this slot, made when they are first needed.
    """

    data: Bytes
    state: State = State.EMPTY
    unit: str = ""
    batch: Batch | None = None
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
        refill: reads them.
        num_slots: how many are in memory at a time.
        observer: is told of the progress of each forward.
    """

    def __init__(
        self, units: Mapping[str, Sequence[Member]], refill: Refill, num_slots: int, observer: Observer = ignore
    ) -> None:
        self._units = dict(units)
        self._refill = refill
        self._slots = [_Slot(data=anonymous(nbytes)) for nbytes in refill.slot_sizes(num_slots)]
        self._where: dict[str, _Slot] = {}
        self._order = Order(tuple(units))
        self._turn = Turn(self._forget, (Residency.look_up.__code__, Residency.close.__code__))
        self._entered: list[str] = []
        self._experts: ExpertCounts | None = None
        self._closed = False
        self._passes = self._uses = self._hits = self._unforeseen = self._streamed_bytes = 0
        self._stall_s = 0.0
        self._pass_bytes = sum(recipe.moved_bytes for recipe in refill.recipes.values())
        self._meter = Meter(len(units), self._pass_bytes, observer)
        self._tracer: Tracer = NO_TRACE
        self._read_ahead()

    def stats(self) -> StreamStats:
        """What was done so far."""
        experts = self._experts or ExpertCounts()
        return StreamStats(
            passes=self._passes,
            uses=self._uses,
            hits=self._hits,
            unforeseen=self._unforeseen,
            streamed_bytes=self._streamed_bytes + experts.read_bytes,
            stall_s=self._stall_s + experts.stall_s,
            num_units=len(self._units),
            num_slots=len(self._slots),
            slot_bytes=sum(slot.data.size for slot in self._slots),
            pass_bytes=self._pass_bytes,
            pass_s=self._meter.seconds,
            read_bytes=self._refill.reader.done_bytes,
            read_s=self._refill.reader.busy_s,
            expert_uses=experts.uses,
            expert_hits=experts.hits,
            expert_bytes=experts.read_bytes,
            room_bytes=experts.room_bytes,
        )

    def count_experts(self, counts: ExpertCounts) -> None:
        """Tell of experts, which have a room of their own, in the statistics."""
        self._experts = counts

    @property
    def units(self) -> tuple[str, ...]:
        """What comes and goes."""
        return tuple(self._units)

    def trace_to(self, tracer: Tracer) -> None:
        """Have reads, waits and switches kept by `tracer` from now on."""
        self._tracer = self._refill.reader.tracer = tracer

    def close(self) -> None:
        """End the threads and close the files; the model cannot be used any more."""
        with self._turn:
            self._closed = True
            self._refill.close()

    def begin_pass(self, *_: Any) -> None:
        """Before the forward of the whole model: take the turn.

        Raises:
            LoadstoneError: a file is not the one whose header was read.
        """
        if self._turn.is_mine:  # an interrupt (Ctrl-C) ended this thread's last forward without a word
            self._forget()
            self._turn.drop()
        self._turn.acquire()
        self._entered.append("")
        self._check(self._refill.check_all)
        self._passes += 1
        self._meter.begin(self._passes, self._streamed_bytes, self._stall_s)

    def end_pass(self, *hooked: Any) -> None:
        """After it.

        Raises:
            LoadstoneError: a file was written to meanwhile, and what of it is mapped may have changed.
        """
        if self.is_computing():
            try:
                self._meter.end(self._streamed_bytes, self._stall_s)
                if hooked[-1] is not None:  # no error is on its way already
                    self._check(self._refill.check_all)
            finally:
                self._left("")

    def enter(self, unit: str, *_: Any) -> None:
        """Before the forward of a unit: have its parameters in place.

        Raises:
            StreamedModel: gradients were asked for, or the model was closed.
            LoadstoneError: its files cannot be read, or are not those whose headers were read.
        """
        self._turn.acquire()
        if not self._entered:
            self._meter.start()
        self._entered.append(unit)
        self._refuse_gradients(unit)
        slot = self._where.get(unit)
        if slot is None or slot.state is not State.USED:
            self._uses += 1
            self._order.visit(unit)
            self._meter.need(unit, self._streamed_bytes, self._stall_s)
            slot = self._arrived(unit)
            slot.state = State.USED
            begin = time.perf_counter()
            self._switch(unit, slot)
            self._tracer.span("switch", unit, begin)
        slot.depth += 1
        self._read_ahead()

    def hold(self, unit: str) -> None:
        """Before the forward of a module that has its parameters from elsewhere: take the turn; `leave` it after.

        Raises:
            StreamedModel: gradients were asked for, or the model was closed.
        """
        self._turn.acquire()
        self._entered.append(unit)
        self._refuse_gradients(unit)

    def leave(self, unit: str, *hooked: Any) -> Any:
        """After it: let the slot go, and read what comes next.

        Returns:
            The unit's output where part of it lay in the slot, else None.
        """
        if not self.is_computing() or unit not in self._entered:
            return None
        slot, output = self._where.get(unit), None
        if slot is not None and slot.state is State.USED:
            output = _kept(hooked[-1], slot.data)
            slot.depth -= 1
            if not slot.depth:
                self._let_go(slot)
                self._read_ahead()
        self._left(unit)
        return output

    def look_up(self, rows: Rows, table: torch.Tensor, fqn: str, ids: torch.Tensor, take: Take) -> torch.Tensor:
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
            rows.bring(ids.numpy())
            self._stall_s += time.perf_counter() - begin
            self._streamed_bytes += rows.read_bytes - before
            self._tracer.span("wait", fqn, begin, rows.read_bytes - before)
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
        return self._turn.is_mine and bool(self._entered)

    def _left(self, entered: str) -> None:
        """One forward is over, and with the outermost the turn."""
        self._entered.remove(entered)
        if not self._entered:
            self._meter.stop()
        self._turn.release()

    def _forget(self) -> None:
        """Forget forwards that never ended."""
        for slot in self._slots:
            if slot.state is State.USED:
                self._let_go(slot)
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
            self._tracer.span("wait", unit, begin, slot.batch.total_bytes)
            slot.state, slot.batch = State.READY, None
        else:
            self._hits += 1
        self._check(partial(self._refill.check, unit))
        return slot

    def _check(self, files: Callable[[], None]) -> None:
        """Check files; what was read ahead of wrong ones is dropped, for the right ones may be put back."""
        try:
            files()
        except BaseException:
            for slot in self._slots:
                if slot.state is not State.USED:
                    self._empty(slot)
            raise

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
        spare = [slot for slot in free if slot.unit not in soon or self._where.get(slot.unit) is not slot]
        for unit in soon:
            fitting = [slot for slot in spare if self._has_room(slot, unit)]
            if unit not in self._where and fitting:
                slot = min(fitting, key=lambda slot: slot.data.size)
                spare.remove(slot)
                self._begin(unit, slot, priority=0)

    def _has_room(self, slot: _Slot, unit: str) -> bool:
        return slot.data.size >= self._refill.recipes[unit].nbytes

    def _begin(self, unit: str, slot: _Slot, *, priority: int) -> None:
        self._empty(slot)
        # Known before it runs, and found only once it runs: an interrupt can come at any line.
        slot.batch = self._refill.batch(unit, slot.data)
        self._refill.reader.begin(slot.batch, priority)
        slot.state, slot.unit = State.COMING, unit
        self._where[unit] = slot

    def _empty(self, slot: _Slot) -> None:
        if self._where.get(slot.unit) is slot:
            del self._where[slot.unit]
        slot.state, slot.unit = State.EMPTY, ""
        if slot.batch is not None:
            slot.batch.cancel()
            slot.batch = None

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

    def _views(self, unit: str, data: Bytes) -> list[nn.Parameter]:
        views = []
        with torch.inference_mode(False):
            for place, member in zip(self._refill.recipes[unit].places, self._units[unit], strict=True):
                nbytes = member.placeholder.numel() * member.placeholder.element_size()
                tensor = as_tensor(data[place.begin : place.begin + nbytes], place.target.dtype, place.target.shape)
                views.append(nn.Parameter(tensor, requires_grad=member.placeholder.requires_grad))
        return views

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled, and the model with it."""
        raise StreamedModel(
            "expected a model that is wholly in memory to copy or pickle, found one that is streamed from its files; "
            "load it again instead of copying it."
        )


def _kept(output: Any, slot: Bytes) -> Any:
    """A unit's output with what lies in its slot copied out of it; None where nothing does."""
    if isinstance(output, torch.Tensor):
        begin = slot.ctypes.data
        return output.clone() if begin <= output.untyped_storage().data_ptr() < begin + slot.size else None
    if isinstance(output, list | tuple) and type(output) in (list, tuple):
        kept = [_kept(one, slot) for one in output]
        if any(one is not None for one in kept):
            return type(output)(old if new is None else new for old, new in zip(output, kept, strict=True))
    if isinstance(output, dict):
        changed = {key: new for key, value in output.items() if (new := _kept(value, slot)) is not None}
        for key, new in changed.items():
            output[key] = new
    return None
