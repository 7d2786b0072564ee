"""Which unit is in which slot, and what happens when one is needed: the accounting of a streamed model.

Slots are memory that was allocated once. A unit whose forward begins is waited for, its parameters become views of its
slot, and when the forward is over they are placeholders again and the slot is read anew with what comes next, which
may be the beginning of the next pass. The files are the only copy; nothing is ever written back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from loadstone.errors import StreamedModel
from loadstone.events import NO_TRACE, Observer, Tracer, ignore
from loadstone.execute.expert_room import ExpertCounts
from loadstone.execute.meter import Meter
from loadstone.execute.placeholder import StreamedParameter, Take
from loadstone.execute.prefetch import Order
from loadstone.execute.slots import Slot, Slots, State, kept
from loadstone.execute.turn import Turn
from loadstone.execute.values import StreamStats
from loadstone.stream.filler import Filler
from loadstone.stream.rows import Table


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
        observer: is told of the progress of each forward.

    Attributes:
        hooks: what calls this when modules compute.
    """

    def __init__(
        self, units: Mapping[str, Sequence[Member]], refill: Filler, num_slots: int, observer: Observer = ignore
    ) -> None:
        self._units = dict(units)
        self._refill = refill
        self._slots = Slots(refill, self._units, num_slots)
        self._order = Order(tuple(units))
        self._turn = Turn(self._forget, (Residency.look_up.__code__, Residency.close.__code__))
        self._entered: list[str] = []
        self._experts: ExpertCounts | None = None
        self._closed = False
        self._passes = self._uses = self._hits = self._unforeseen = self._streamed_bytes = 0
        self._stall_s = 0.0
        self._pass_bytes = sum(map(refill.moved_bytes, self._units))
        self._meter = Meter(len(units), self._pass_bytes, observer)
        self._tracer: Tracer = NO_TRACE
        self.hooks: list[RemovableHandle] = []
        self._slots.fill_ahead(self._order)

    def stats(self) -> StreamStats:
        """What was done so far."""
        experts, readers = self._experts or ExpertCounts(), self._refill.readers()
        return StreamStats(
            passes=self._passes,
            uses=self._uses,
            hits=self._hits,
            unforeseen=self._unforeseen,
            streamed_bytes=self._streamed_bytes + experts.read_bytes,
            stall_s=self._stall_s + experts.stall_s,
            num_units=len(self._units),
            num_slots=len(self._slots),
            slot_bytes=self._slots.nbytes,
            pass_bytes=self._pass_bytes,
            pass_s=self._meter.seconds,
            read_bytes=sum(reader.done_bytes for reader in readers),
            read_s=sum(reader.busy_s for reader in readers),
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
        self._tracer = tracer
        for reader in self._refill.readers():
            reader.tracer = tracer

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
        if not self._closed:
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
        slot = self._slots.find(unit)
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
        self._slots.fill_ahead(self._order)

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
        slot, output = self._slots.find(unit), None
        if slot is not None and slot.state is State.USED:
            output = kept(hooked[-1], slot.data)
            slot.depth -= 1
            if not slot.depth:
                self._let_go(slot)
                self._slots.fill_ahead(self._order)
        self._left(unit)
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

    def _arrived(self, unit: str) -> Slot:
        """The slot of a unit, once all of it is there."""
        slot = self._slots.find(unit)
        if slot is None:
            self._unforeseen += 1
            slot = self._slots.for_unforeseen(unit, self._order)
            self._slots.fill(unit, slot, priority=-1)
        if slot.state is State.COMING and slot.batch is not None:
            begin = time.perf_counter()
            self._hits += slot.batch.is_over
            try:
                slot.batch.wait()
            except BaseException:
                self._slots.empty(slot)
                raise
            self._stall_s += time.perf_counter() - begin
            self._streamed_bytes += slot.batch.total_bytes
            self._tracer.span("wait", unit, begin, slot.batch.total_bytes)
            slot.state, slot.batch = State.READY, None
        else:
            self._hits += 1
        self._refill.attend(slot.data)
        self._check(partial(self._refill.check, unit))
        return slot

    def _check(self, files: Callable[[], None]) -> None:
        """Check files; what was read ahead of wrong ones is dropped, for the right ones may be put back."""
        try:
            files()
        except BaseException:
            self._slots.empty_unused()
            raise

    def _switch(self, unit: str, slot: Slot) -> None:
        """Put the parameters that lie in a slot into their modules."""
        if unit not in slot.parameters:
            slot.parameters[unit] = self._views(unit, slot.data)
        for member, parameter in zip(self._units[unit], slot.parameters[unit], strict=True):
            for owner, name in member.owners:
                owner[name] = parameter

    def _let_go(self, slot: Slot) -> None:
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
