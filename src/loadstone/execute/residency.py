"""Which unit is where, and what happens when one is needed: the accounting of a model that is not wholly in memory.

A unit is kept, or streamed: then its forward waits until it is in a slot, its parameters become views of that slot, and
when the forward is over they are placeholders again and the slot is read anew with what comes next, which may be the
beginning of the next pass. The files are the only copy; nothing is ever written back. Units go from the one to the
other when the model is parked or woken, when its limit changes, and when memory is short.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

import torch

from loadstone.errors import StreamedModel
from loadstone.events import Observer, Tracer, ignore
from loadstone.execute.counted import counted_so_far
from loadstone.execute.expert_room import ExpertRoom
from loadstone.execute.hooks import Hooks
from loadstone.execute.kept import Unit
from loadstone.execute.meter import Meter
from loadstone.execute.placeholder import Take
from loadstone.execute.pressure import is_out_of_memory
from loadstone.execute.slots import Ring, Slot, State, kept_output
from loadstone.execute.states import Adopted, States
from loadstone.execute.turn import Turn
from loadstone.execute.values import StreamStats
from loadstone.stream.filler import Filler

Adopt = Callable[["Residency", Collection[str]], Adopted]
Changed = TypeVar("Changed")


class Residency:
    """The units of one model. Forwards of several threads take turns.

    Args:
        filler: fills memory with them.
        num_slots: how many are in memory at a time; more where units lie within one another.
        hooks: tell of forwards; they are not on yet.
        adopt: finds the units that were loaded to stay, when they are to go for the first time; it is given this and
            the names of the units that there are.
        observer: is told of the progress of each forward.
    """

    def __init__(
        self, filler: Filler, num_slots: int, hooks: Hooks, adopt: Adopt | None = None, observer: Observer = ignore
    ) -> None:
        self._filler = filler
        self._units: dict[str, Unit] = {}
        self._ring = Ring(filler)
        self._states = States(self._units, self._ring, filler, num_slots, self)
        self._hooks = hooks
        self._adopt = adopt
        own = Residency
        scopes = own.start, own.close, own.change, own.ask, own.use, own.lend
        self._turn = Turn(self._forget, (function.__code__ for function in scopes))
        self._entered: list[str] = []
        self._closed = False
        self._num_changing = 0
        self._passes = 0
        self._meter = Meter(observer)

    def take_on(self, units: Iterable[Unit]) -> None:
        """Know units that are streamed."""
        self._units |= {unit.name: unit for unit in units}

    def take_off_hooks(self) -> None:
        """Hear of no forward any more."""
        self._hooks.remove()

    def have_room(self, room: ExpertRoom) -> None:
        """Know of experts that come one by one."""
        self._states.room = room

    @property
    def units(self) -> tuple[str, ...]:
        """What comes and goes at present."""
        return tuple(name for name, unit in self._units.items() if not unit.is_kept)

    def trace_to(self, tracer: Tracer) -> None:
        """Have reads, waits and switches kept by `tracer` from now on."""
        self._ring.tracer = tracer
        for reader in self._filler.readers():
            reader.tracer = tracer

    def start(self, needed_bytes: int = 0) -> None:
        """Begin to stream: with hooks, slots, and the first units on their way.

        Args:
            needed_bytes: what a run will use of the memory that is free now.
        """
        with self._turn:
            self._states.watch.needed_bytes = needed_bytes + self._states.kept_bytes
            self._hooks.put(self, self._entries())
            self._states.stream()
            self._filler.bring_kept()

    def stats(self) -> StreamStats:
        """What was done so far."""
        states = self._states
        counted = counted_so_far(self._ring, self._filler, states.room, states.shortage, states.in_parts())
        return replace(counted, passes=self._passes, pass_s=self._meter.seconds)

    def close(self) -> None:
        """End the threads and close the files; a model that needs them cannot be used any more."""
        with self._turn:
            self._closed = True
            self._states.watch.stop()
            for part in self._states.in_parts():
                part.drop()
            self._filler.close()

    def begin_pass(self, *_: Any) -> None:
        """Before the forward of the whole model: take the turn.

        Raises:
            LoadstoneError: a file is not the one whose header was read.
        """
        self._drop_lost_turn()
        if self._begin(""):
            self._check_files()
            self._passes += 1
            in_parts = sum(part.pass_bytes for part in self._states.in_parts())
            self._meter.expect(len(self._ring.units), self._ring.pass_bytes + in_parts)
            self._meter.begin(self._passes, self._ring.streamed_bytes, self._ring.stall_s)

    def end_pass(self, *hooked: Any) -> None:
        """After it.

        Raises:
            LoadstoneError: a file was written to meanwhile, and what of it is mapped may have changed.
        """
        if not self.is_computing() or "" not in self._entered:
            return
        failed = hooked[-1] is None
        try:
            self._meter.end(self._ring.streamed_bytes, self._ring.stall_s)
            if failed:
                self._relieve(sys.exception())
            else:
                self._check_files()
        finally:
            self._left("", failed=failed)

    def enter(self, unit: str, *_: Any) -> None:
        """Before the forward of a unit: have its parameters in place.

        Raises:
            StreamedModel: gradients were asked for, or the model was closed.
            LoadstoneError: its files cannot be read, or are not those whose headers were read.
        """
        if not self._begin(unit) or self._units[unit].is_kept:
            return
        self._refuse_gradients(unit)
        slot = self._ring.where.get(unit)
        if slot is None or slot.state is not State.USED:
            self._meter.need(unit, self._ring.streamed_bytes, self._ring.stall_s)
            slot = self._ring.arrive(unit)
            slot.state = State.USED
            begin = time.perf_counter()
            self._units[unit].put_views(slot, self._filler.layout(unit))
            self._ring.tracer.span("switch", unit, begin)
        slot.depth += 1
        self._ring.read_ahead()

    def hold(self, unit: str) -> None:
        """Before the forward of a module that has its parameters from elsewhere: take the turn; `leave` it after.

        Raises:
            StreamedModel: gradients were asked for, or the model was closed.
        """
        if self._begin(unit):
            self._refuse_gradients(unit)

    def leave(self, unit: str, *hooked: Any) -> Any:
        """After it: let the slot go, and read what comes next.

        Returns:
            The unit's output where part of it lay in the slot, else None.
        """
        if not self.is_computing() or unit not in self._entered:
            return None
        slot, output = self._ring.where.get(unit), None
        if slot is not None and slot.state is State.USED:
            output = kept_output(hooked[-1], slot.seen)
            slot.depth -= 1
            if not slot.depth:
                self._let_go(slot)
                self._ring.read_ahead()
        self._left(unit, failed=hooked[-1] is None)
        return output

    def use(self, unit: str, fqn: str, whole: Take, partly: Callable[[Ring], torch.Tensor]) -> torch.Tensor:
        """Compute with a parameter that comes in parts: rows of a table, slices of a head.

        Args:
            unit: the parameter's.
            fqn: its name.
            whole: called with the parameter where it is kept; what it returns must not lie in it.
            partly: called where it is not, with what counts what is read.

        Returns:
            What either returned.
        """
        with self._turn:
            self._be_ready()
            if self._units[unit].is_kept:
                owner, name = next(one for one in self._units[unit].members if one.placeholder.fqn == fqn).owners[0]
                self._release_hooks()
                return whole(owner[name])
            self._refuse_gradients(fqn)
            return partly(self._ring)

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

    def can_lend(self, unit: str) -> bool:
        """Whether a unit is there, can be woken, or is needed by a forward that is under way in this thread."""
        known = self._units[unit]
        return known.is_kept or self._states.parked is not None or (bool(known.entries) and self.is_computing())

    def is_computing(self) -> bool:
        """Whether a forward of the model is under way in this thread."""
        return self._turn.is_mine and bool(self._entered)

    @property
    def is_whole(self) -> bool:
        """Whether all of the model is there to stay."""
        return self._states.is_whole

    @property
    def is_parked(self) -> bool:
        """Whether the model has left memory."""
        return self._states.parked is not None

    def change(self, work: Callable[[States], Changed]) -> Changed:
        """Have units go or come back between forwards, with hooks on that tell of all of them.

        Args:
            work: is given the states of the units.

        Returns:
            What `work` returned.

        Raises:
            StreamedModel: the model was closed.
        """
        self._drop_lost_turn()
        with self._turn:
            self._refuse_if_closed("the model")
            were_on = self._hooks.are_on
            self._num_changing += 1
        try:
            with self._turn:
                self._know_all()
            if not were_on:
                self._hooks.wait_for_others()
            with self._turn:
                return work(self._states)
        finally:
            with self._turn:
                self._num_changing -= 1
                self._release_hooks()

    def ask(self, nbytes: int) -> None:
        """Give back so many bytes as soon as that can be done, or take so many again where they are less than 0."""
        self._states.shortage.asked_bytes = nbytes
        if self._turn.try_acquire():
            try:
                if not self._entered:  # no forward is under way
                    self._settle()
            finally:
                self._turn.release()

    def given_back(self) -> tuple[int, int]:
        """The bytes of the units that went for want of memory, and of the smallest of them."""
        sizes = [self._units[name].nbytes for name in tuple(self._states.shortage.units)]
        return sum(sizes), min(sizes, default=0)

    def _be_ready(self) -> None:
        """Wake the model if it is parked, and do what was asked for when memory was looked at."""
        if self._states.parked is not None:
            self._refuse_if_closed("the model")
            self._states.wake()
        if self._states.shortage.asked_bytes and not self._ring.is_used() and not torch.is_grad_enabled():
            self._settle()

    def _settle(self) -> None:
        if self._closed or self._states.parked is not None:
            self._states.shortage.asked_bytes = 0
            return
        self._know_all()
        self._states.settle(self._entered)

    def _know_all(self) -> None:
        """Find the units that were loaded to stay, once, and have hooks on them."""
        if self._adopt is not None:
            self._states.adopt(self._adopt(self, self._units))
            self._adopt = None
        self._hooks.put(self, self._entries())

    def _entries(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(unit.name, unit.entries) for unit in self._units.values()]

    def _begin(self, entered: str) -> bool:
        """A forward begins: take the turn, and have what is needed for it. False where nobody is told of forwards."""
        self._turn.acquire()
        if not self._hooks.are_on:  # they were taken off while this thread waited
            self._turn.release()
            return False
        if not self._entered:
            self._meter.start()
        self._entered.append(entered)
        self._be_ready()
        return True

    def _left(self, entered: str, *, failed: bool) -> None:
        """One forward is over, and with the outermost the turn."""
        self._entered.remove(entered)
        if not self._entered:
            self._meter.stop()
        if not failed:  # torch walks over the hooks while it handles an error
            self._release_hooks()
        self._turn.release()

    def _check_files(self) -> None:
        if not self._states.is_whole:
            self._states.check_files()

    def _relieve(self, error: BaseException | None) -> None:
        """Give memory back where a forward ended because there was too little of it."""
        if torch.is_grad_enabled():
            return
        if self._entered == [""] and error is not None and is_out_of_memory(error):
            self._know_all()
            self._states.relieve(error)

    def _release_hooks(self) -> None:
        """Leave the module alone once all of it is there to stay."""
        if self._states.is_whole and not self._entered and not self._num_changing:
            self._hooks.remove()

    def _drop_lost_turn(self) -> None:
        """Give the turn back where an interrupt (Ctrl-C) ended this thread's last forward without a word."""
        if self._turn.is_mine:
            self._forget()
            self._turn.drop()

    def _forget(self) -> None:
        """Forget forwards that never ended."""
        for slot in self._ring.slots:
            if slot.state is State.USED:
                self._let_go(slot)
        self._entered.clear()

    def _refuse_if_closed(self, what: str) -> None:
        if self._closed:
            raise StreamedModel(f"{what}: its model was closed and its files with it; load the model again.")

    def _refuse_gradients(self, unit: str) -> None:
        self._refuse_if_closed(unit)
        if torch.is_grad_enabled():
            raise StreamedModel(
                f"{unit}: expected a forward without gradients, found them enabled; the weights are gone after the "
                "forward, so nothing can be propagated back. Use torch.inference_mode() or torch.no_grad()."
            )

    def _let_go(self, slot: Slot) -> None:
        self._units[slot.unit].put_placeholders()
        slot.state, slot.depth = State.READY, 0
        self._filler.release(slot.data)

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled, and the model with it."""
        raise StreamedModel(
            "expected a model that is wholly in memory to copy or pickle, found one that is streamed from its files "
            "or parked; load it again, or wake it, instead of copying it."
        )
