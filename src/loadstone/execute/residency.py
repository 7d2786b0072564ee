"""Which unit is where, and what happens when one is needed: the accounting of a model that is not wholly in memory.

A unit is kept, or streamed: then its forward waits until it is in a slot, its parameters become views of that slot, and
when the forward is over they are placeholders again and the slot is read anew with what comes next, which may be the
beginning of the next pass. The files are the only copy; nothing is ever written back. Units go from the one to the
other when the model is parked or woken, when its limit changes, and when memory is short.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from loadstone.errors import StreamedModel
from loadstone.execute.hooks import Hooks
from loadstone.execute.kept import Unit, views
from loadstone.execute.placeholder import Take
from loadstone.execute.pressure import is_out_of_memory
from loadstone.execute.slots import Ring, Slot, State, kept_output
from loadstone.execute.states import Adopted, States
from loadstone.execute.values import StreamStats
from loadstone.stream.refill import Refill

Adopt = Callable[["Residency", Collection[str]], Adopted]


class Residency:
    """The units of one model. Forwards of several threads take turns.

    Args:
        refill: reads them.
        num_slots: how many are in memory at a time; more where units lie within one another.
        hooks: tell of forwards; they are not on yet.
        adopt: finds the units that were loaded to stay, when they are to go for the first time; it is given this and
            the names of the units that there are.

    Attributes:
        refill: see above.
    """

    def __init__(
        self,
        refill: Refill,
        num_slots: int,
        hooks: Hooks,
        adopt: Adopt | None = None,
    ) -> None:
        self.refill = refill
        self._units: dict[str, Unit] = {}
        self._ring = Ring(refill)
        self._states = States(self._units, self._ring, refill, num_slots, self)
        self._hooks = hooks
        self._adopt = adopt
        self._turn = threading.RLock()
        self._door = threading.Lock()
        self._entered: list[str] = []
        self._closed = False
        self._num_changing = 0
        self._passes = self._looked_up_bytes = 0
        self._stall_s = 0.0

    def take_on(self, units: Iterable[Unit]) -> None:
        """Know units that are streamed."""
        self._units |= {unit.name: unit for unit in units}

    def start(self, needed_bytes: int = 0) -> None:
        """Begin to stream: with hooks, slots, and the first units on their way.

        Args:
            needed_bytes: what a run will use of the memory that is free now.
        """
        with self._turn:
            self._states.watch.needed_bytes = needed_bytes
            self._hooks.put(self, self._entries())
            self._states.stream()

    def stats(self) -> StreamStats:
        """What was done so far."""
        ring = self._ring
        return StreamStats(
            passes=self._passes,
            uses=ring.uses,
            hits=ring.hits,
            unforeseen=ring.unforeseen,
            streamed_bytes=ring.streamed_bytes + self._looked_up_bytes,
            stall_s=ring.stall_s + self._stall_s,
            num_units=len(ring.units),
            num_slots=len(ring.slots),
            slot_bytes=sum(slot.data.size for slot in ring.slots),
            pass_bytes=sum(self.refill.recipes[unit].moved_bytes for unit in ring.units),
            given_back_bytes=self._states.shortage.given_back_bytes,
        )

    def close(self) -> None:
        """End the threads and close the files; a model that needs them cannot be used any more."""
        with self._turn:
            self._closed = True
            self._states.watch.stop()
            self.refill.close()

    def begin_pass(self, *_: Any) -> None:
        """Before the forward of the whole model: take the turn."""
        self._take_turn()
        if not self._hooks.are_on:  # they were taken off while this thread waited
            self._turn.release()
            return
        if self._entered:  # an interrupt (Ctrl-C) ended this thread's last forward without a word
            self._abandon()
        self._entered.append("")
        self._passes += 1
        self._be_ready()

    def end_pass(self, *hooked: Any) -> None:
        """After it."""
        if self.is_computing() and "" in self._entered:
            self._entered.remove("")
            failed = hooked[-1] is None
            error = sys.exception() if failed else None
            if error is not None and not self._entered and is_out_of_memory(error) and not torch.is_grad_enabled():
                self._know_all()
                self._states.relieve(error)
            self._release(failed=failed)

    def enter(self, unit: str, *_: Any) -> None:
        """Before the forward of a unit: have its parameters in place.

        Raises:
            StreamedModel: gradients were asked for, or the model was closed.
            LoadstoneError: its files cannot be read, or are not those whose headers were read.
        """
        self._take_turn()
        if not self._hooks.are_on:
            self._turn.release()
            return
        self._entered.append(unit)
        self._be_ready()
        if self._units[unit].is_kept:
            return
        self._refuse_gradients(unit)
        slot = self._ring.where.get(unit)
        if slot is None or slot.state is not State.USED:
            slot = self._ring.arrive(unit)
            slot.state = State.USED
            if unit not in slot.parameters:
                places = self.refill.recipes[unit].places
                slot.parameters[unit] = views(self._units[unit], (slot.data[place.begin :] for place in places))
            self._units[unit].put(slot.parameters[unit])
        slot.depth += 1
        self._ring.read_ahead()

    def leave(self, unit: str, *hooked: Any) -> Any:
        """After it: let the slot go, and read what comes next.

        Returns:
            The unit's output where part of it lay in the slot, else None.
        """
        if not self.is_computing() or unit not in self._entered:
            return None
        self._entered.remove(unit)
        slot, output = self._ring.where.get(unit), None
        if slot is not None and slot.state is State.USED:
            output = kept_output(hooked[-1], slot.data)
            slot.depth -= 1
            if not slot.depth:
                self._let_go(slot)
                self._ring.read_ahead()
        self._release(failed=hooked[-1] is None)
        return output

    def look_up(self, unit: str, fqn: str, ids: torch.Tensor, take: Take) -> torch.Tensor:
        """Read rows of a table, and take what is wanted of them.

        Args:
            unit: the table's.
            fqn: the table's name.
            ids: the numbers of the rows.
            take: called with the table; what it returns must not lie in it.

        Returns:
            What `take` returned.
        """
        with self._having_turn():
            self._be_ready()
            if self._units[unit].is_kept:
                owner, name = next(one for one in self._units[unit].members if one.wanted.fqn == fqn).owners[0]
                self._release_hooks()
                return take(owner[name])
            self._refuse_gradients(fqn)
            rows, table = self._units[unit].tables[fqn].rows()
            before, begin = rows.read_bytes, time.perf_counter()
            rows.bring(ids.numpy())
            self._stall_s += time.perf_counter() - begin
            self._looked_up_bytes += rows.read_bytes - before
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

    def can_lend(self, unit: str) -> bool:
        """Whether a unit is there, can be woken, or is needed by a forward that is under way in this thread."""
        known = self._units[unit]
        return known.is_kept or self._states.parked is not None or (bool(known.entries) and self.is_computing())

    def is_computing(self) -> bool:
        """Whether a forward of the model is under way in this thread."""
        mine = self._turn.acquire(blocking=False)
        if mine:
            self._turn.release()
        return mine and bool(self._entered)

    @property
    def is_parked(self) -> bool:
        """Whether the model has left memory."""
        return self._states.parked is not None

    def park(self, *, keep_changed: bool) -> int:
        """Let every unit go, and the slots, the threads and the files with them.

        Args:
            keep_changed: leave parameters that are not as they were loaded in memory, instead of refusing.

        Returns:
            The bytes of the parameters that went.

        Raises:
            StreamedModel: a parameter was changed, or the model was closed.
        """
        with self._changing():
            return self._states.park(keep_changed=keep_changed)

    def wake(self) -> None:
        """Bring back what was there when the model was parked.

        Raises:
            StreamedModel: the model was closed.
            LoadstoneError: its files cannot be read, or are not those whose headers were read.
        """
        if self.is_parked:
            with self._changing():
                self._states.wake()

    def limit(self, limit_bytes: int | None) -> None:
        """Let units go, or bring them back, so that the weights take at most so much.

        Args:
            limit_bytes: what is kept and the slots together; None for no limit.

        Raises:
            ValueError: not even the slots fit.
            StreamedModel: the model was closed.
            LoadstoneError: files cannot be read, or are not those whose headers were read.
        """
        with self._changing():
            self._states.limit(limit_bytes)

    def ask(self, nbytes: int) -> None:
        """Give back so many bytes as soon as that can be done, or take so many again where they are less than 0."""
        self._states.shortage.asked_bytes = nbytes
        if self._turn.acquire(blocking=False):
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

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Have the turn between forwards, with hooks on that tell of all of them."""
        with self._having_turn():
            self._refuse_if_closed("the model")
            were_on = self._hooks.are_on
            self._num_changing += 1
        try:
            with self._having_turn():
                if self._entered:  # by this thread, whose forward was ended by an interrupt
                    self._abandon()
                self._know_all()
            if not were_on:
                self._hooks.wait_for_others()
            with self._having_turn():
                yield
        finally:
            with self._having_turn():
                self._num_changing -= 1
                self._release_hooks()

    def _take_turn(self) -> None:
        """Wait for the turn, in a queue: a thread that computes on and on must not keep all others out."""
        if self.is_computing():
            self._turn.acquire()
            return
        with self._door:
            self._turn.acquire()

    @contextmanager
    def _having_turn(self) -> Iterator[None]:
        self._take_turn()
        try:
            yield
        finally:
            self._turn.release()

    def _release(self, *, failed: bool) -> None:
        if not failed:  # torch walks over the hooks while it handles an error
            self._release_hooks()
        self._turn.release()

    def _release_hooks(self) -> None:
        """Leave the module alone once all of it is there to stay."""
        if self._states.is_whole and not self._entered and not self._num_changing:
            self._hooks.remove()

    def _abandon(self) -> None:
        """Forget forwards of this thread that never ended."""
        for slot in self._ring.slots:
            if slot.state is State.USED:
                self._let_go(slot)
        for _ in self._entered:
            self._turn.release()
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

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled, and the model with it."""
        raise StreamedModel(
            "expected a model that is wholly in memory to copy or pickle, found one that is streamed from its files "
            "or parked; load it again, or wake it, instead of copying it."
        )
