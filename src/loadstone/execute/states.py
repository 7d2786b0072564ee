"""What of a model is in memory: parked, woken, kept within a limit, and given back while memory is short.

Whoever uses this has the model's turn, and no forward is under way but for what a forward itself asks for.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from loadstone.errors import StreamedModel
from loadstone.execute import spread
from loadstone.execute.expert_room import ExpertRoom
from loadstone.execute.kept import InParts, Kept, Unit
from loadstone.execute.pressure import Pressed, Shortage, Watch, asked_for_bytes
from loadstone.execute.slots import Ring
from loadstone.stream.filler import Filler
from loadstone.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted:
    """What was loaded to stay, and can go all the same.

    Attributes:
        units: of it.
        fixed_bytes: of the parameters that are in no unit.
        changed: the names of those that are not as they were loaded.
    """

    units: tuple[Unit, ...] = ()
    fixed_bytes: int = 0
    changed: tuple[str, ...] = ()


class States:
    """Which units are kept and which are streamed.

    Args:
        units: of the model, by name; more are added when those that were loaded to stay are found.
        ring: of those that are streamed.
        filler: fills memory with them.
        num_slots: how many are in memory at a time; more where units lie within one another.
        pressed: is asked to give memory back.

    Attributes:
        units: see above.
        parked: the units to bring back, where the model is parked.
        shortage: what went for want of memory.
        watch: looks at free memory.
        room: of experts that come one by one, which are never there to stay.
    """

    def __init__(self, units: dict[str, Unit], ring: Ring, filler: Filler, num_slots: int, pressed: Pressed) -> None:
        self.units = units
        self.parked: frozenset[str] | None = None
        self.shortage = Shortage()
        self.watch = Watch(pressed)
        self.room: ExpertRoom | None = None
        self._ring = ring
        self._filler = filler
        self._kept = Kept(units, filler)
        self._num_slots = num_slots
        self._adopted = Adopted()
        self._limit_bytes: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether all of the model is there to stay."""
        return self.parked is None and self.room is None and all(unit.is_kept for unit in self.units.values())

    @property
    def kept_bytes(self) -> int:
        """The memory of what stays of units that are streamed, and of what comes in parts."""
        return sum(self._lasting().values()) + sum(part.memory_bytes for part in self.in_parts())

    def adopt(self, adopted: Adopted) -> None:
        """Know what was loaded to stay."""
        self._adopted = adopted
        self.units |= {unit.name: unit for unit in adopted.units}

    def park(self, *, keep_changed: bool, copied: bool = False) -> int:
        """Let every unit go, and the slots, the room of experts, the threads and the files with them.

        Args:
            keep_changed: leave parameters that are not as they were loaded in memory, instead of refusing.
            copied: to host memory, what was there to stay.

        Returns:
            The bytes of the parameters that went.

        Raises:
            StreamedModel: a parameter was changed, or no file can give anything back.
        """
        if self.parked is not None:
            return 0
        changed = self._changed()
        if changed and not keep_changed:
            raise StreamedModel(
                f"{changed[0]}: expected it as it was loaded, found it changed (in place, replaced, cast, moved, or "
                "with a gradient), which would not come back; save it first, or leave such parameters in memory "
                "with park(keep_changed=True)."
            )
        pieces = self._kept.pieces()
        if not pieces and self.room is None:
            raise StreamedModel(
                "park: expected weights that their files can give back, found none; what torch converts, and what is "
                "loaded under torch.inference_mode(), stay in memory. Drop the model and load it again instead."
            )
        kept = frozenset(piece.name for piece in pieces if piece.is_kept)
        nbytes = self._kept.demote(kept, copied=copied)
        self.parked = kept
        self.stream(leaves_memory=not copied)
        return nbytes

    def wake(self) -> None:
        """Bring back what was there when the model was parked.

        Raises:
            LoadstoneError: its files cannot be read, or are not those whose headers were read.
        """
        if self.parked is not None:
            try:
                self._kept.promote(self.parked)
            except BaseException:
                self._filler.rest()  # it stays parked, with all that this means
                raise
            self._kept.drop_copies()
            self._filler.rest()  # what came back may have needed larger buffers than what is streamed
            self.parked = None
            self.stream()

    def limit(self, limit_bytes: int | None) -> None:
        """Let units go, or bring them back, so that the weights take at most so much.

        Args:
            limit_bytes: what is kept, the slots and the room of experts together; None for no limit.

        Raises:
            ValueError: not even the slots fit.
            LoadstoneError: files cannot be read, or are not those whose headers were read.
        """
        pieces = [self._as_woken(piece) for piece in self._kept.pieces()]
        known = {piece.name for piece in pieces}
        fixed = sum(unit.nbytes for unit in self.units.values() if unit.name not in known)
        fixed += sum(part.memory_bytes for unit in self.units.values() for part in unit.in_parts)
        fixed += self._adopted.fixed_bytes + (self.room.counts.room_bytes if self.room is not None else 0)
        least = fixed + spread.least_bytes(pieces, self._num_slots)
        if limit_bytes is not None and limit_bytes < least:
            raise ValueError(
                f"limit: expected at least {format_bytes(least)} for the slots and for what cannot be read again, "
                f"found {format_bytes(limit_bytes)}."
            )
        self._fill_whole()
        room = sys.maxsize if limit_bytes is None else limit_bytes - fixed
        gone = spread.lowered(pieces, room, self._num_slots)
        back = spread.raised(pieces, room, self._num_slots, known) if not gone else []
        self._limit_bytes = None if limit_bytes is None else room
        self.shortage.units.clear()
        if self.parked is not None:
            self.parked = (self.parked - frozenset(gone)) | frozenset(back)
        else:
            self._exchange(gone, back)

    def settle(self, entered: Collection[str]) -> None:
        """Give back, or take again, what was asked for when memory was looked at.

        Args:
            entered: the units whose forward is under way; they stay as they are.
        """
        asked, self.shortage.asked_bytes = self.shortage.asked_bytes, 0
        pieces = [piece for piece in self._kept.pieces() if piece.name not in entered]
        if asked > 0:
            self._give_back(asked, pieces)
        else:
            room = spread.total_bytes(pieces, self._num_slots) - asked
            room = room if self._limit_bytes is None else min(room, self._limit_bytes)
            back = spread.raised(pieces, room, self._num_slots, self.shortage.units)
            self._exchange([], back)
            self.shortage.units -= set(back)

    def _give_back(self, asked_bytes: int, pieces: Sequence[spread.Piece]) -> None:
        """Let units go; first what stays of those that are streamed, so that some of them come back whole."""
        lasting = self._lasting()
        before = spread.total_bytes(pieces, self._num_slots)
        if lasting:
            before = self._taken_bytes(lasting, pieces)
            if self._limit_bytes is None:
                self._limit_bytes = before  # such units could come back whole, and take more than before
        self._fill_whole()
        gone = spread.lowered(pieces, before - asked_bytes, self._num_slots)
        back = spread.raised(pieces, before - asked_bytes, self._num_slots, lasting) if not gone else []
        self._exchange(gone, back)
        gone += [name for name in lasting if name not in back]
        given = {name: self.units[name].nbytes for name in gone} | lasting
        self.shortage.note(gone, sum(given[name] for name in gone))

    def relieve(self, error: BaseException) -> None:
        """Give memory back after a forward that had too little of it, and say so in the error."""
        before = self.shortage.given_back_bytes
        self.shortage.asked_bytes = max(2 * asked_for_bytes(error), self.watch.margin_bytes or 0, 1)
        self.settle(())
        given = self.shortage.given_back_bytes - before
        error.add_note(
            f"Loadstone gave back {format_bytes(given)} of weights, which are read from their files from now on; call "
            "the model again, from the beginning of its text where it keeps a cache."
            if given
            else "Nothing is left that Loadstone could give back; use a shorter context or a smaller batch."
        )

    def stream(self, *, leaves_memory: bool = False) -> None:
        """Have slots for what is not kept, and watch memory meanwhile; nothing at all for a model that is parked.

        Args:
            leaves_memory: of one that is, what is at home in memory goes too, if it can be read again.
        """
        away = [unit for unit in self.units.values() if not unit.is_kept and unit.entries and self.parked is None]
        away.sort(key=lambda unit: unit.order)
        self._ring.stream([unit.name for unit in away], max(self._num_slots, _deepest(away)))
        if self.parked is None and not self.is_whole:
            if self._filler.on_host:  # what goes from a device leaves the host nothing more
                self.watch.start()
            return
        self.watch.stop()
        for part in self.in_parts():
            part.drop()
        if self.room is not None:
            self.room.rest()
        self._filler.rest(leaves_memory=leaves_memory)

    def in_parts(self) -> Iterator[InParts]:
        """What comes in parts now."""
        for unit in self.units.values():
            if not unit.is_kept:
                yield from unit.in_parts

    def check_files(self) -> None:
        """Check all files; what was read ahead of wrong ones is used no more.

        Raises:
            LoadstoneError: one is not the one whose header was read.
        """
        try:
            self._ring.check(self._filler.check_all)
        except BaseException:
            for part in self.in_parts():
                part.doubt()
            raise

    def _as_woken(self, piece: spread.Piece) -> spread.Piece:
        return piece if self.parked is None else replace(piece, is_kept=piece.name in self.parked)

    def _exchange(self, gone: Sequence[str], back: Sequence[str]) -> None:
        if gone or not back:  # without either, what fills the slots may have changed
            self._kept.demote(gone)
            self.stream()
        if back:
            self._kept.promote(back)
            self.stream()

    def _lasting(self) -> dict[str, int]:
        """The memory of what stays of units that are streamed, by their names."""
        away = (name for name, unit in self.units.items() if not unit.is_kept and unit.entries)
        return {name: nbytes for name in away if (nbytes := self._filler.layout(name).kept_bytes)}

    def _taken_bytes(self, lasting: Mapping[str, int], pieces: Sequence[spread.Piece]) -> int:
        """The memory of what is kept, of what stays of the others, and of the slots."""
        kept = sum(piece.nbytes for piece in pieces if piece.is_kept)
        return kept + sum(lasting.values()) + sum(slot.data.numel() for slot in self._ring.slots)

    def _fill_whole(self) -> None:
        """Give back what stays of units; there are no slots afterwards, if anything did."""
        if self._lasting():
            self._ring.stream((), self._num_slots)
            self._filler.fill_whole()

    def _changed(self) -> list[str]:
        found = (unit.changed() for unit in self.units.values() if unit.is_kept)
        return [*self._adopted.changed, *(name for name in found if name)]


def _deepest(units: Sequence[Unit]) -> int:
    """How many units can be needed at once, because their modules lie within one another."""
    entries = [entry for unit in units for entry in unit.entries]
    return max((sum(f"{inner}.".startswith(f"{outer}.") for outer in entries) for inner in entries), default=0)
