"""What stays of a unit while the rest comes and goes through slots: its first bytes, and more of it compressed."""

from __future__ import annotations

from dataclasses import dataclass

from loadstone.compression import can_compress, kept_bytes, whole_grains
from loadstone.hardware.memory import can_show_pages
from loadstone.hardware.pages import Bytes
from loadstone.stream.compressed import Compressed
from loadstone.stream.fronts import FrontedUnit, front_bytes
from loadstone.stream.refill import NOWHERE, Recipe
from loadstone.stream.spans import Fill, Prepared


@dataclass(frozen=True, slots=True, kw_only=True)
class Stays:
    """What stays of units that come and go, told by what does not.

    Attributes:
        slot_bytes: the most of a unit that goes through a slot; what it has before that stays. 0 for all of it.
        read_bytes: the most that is read of it; what a slot has before that stays compressed. None for all that goes
            through the slot.
    """

    slot_bytes: int = 0
    read_bytes: int | None = None

    def front_of(self, recipe: Recipe) -> int:
        """What stays of a unit as it is: its first bytes."""
        possible = self.slot_bytes and recipe.is_moved and can_show_pages()
        return front_bytes(recipe.nbytes, self.slot_bytes) if possible else 0

    def compressed_of(self, recipe: Recipe) -> range:
        """What stays of it compressed: bytes behind those."""
        front = self.front_of(recipe)
        if self.read_bytes is None or not recipe.is_compressible or not can_compress():
            return range(front, front)
        return range(front, front + whole_grains(recipe.nbytes - self.read_bytes - front))


ALL_GOES = Stays()


class Staying:
    """What stays of one unit, once it was read.

    Args:
        recipe: how the unit lies in memory.
        stays: what stays of it.

    Attributes:
        front_bytes: what of it stays as it is, its first bytes.
    """

    def __init__(self, recipe: Recipe, stays: Stays) -> None:
        self._recipe = recipe
        self.front_bytes = stays.front_of(recipe)
        self._middle = stays.compressed_of(recipe)
        self._fronted: FrontedUnit | None = None
        self._compressed: Compressed | None = None

    @property
    def is_expanded(self) -> bool:
        """Whether anything of it stays compressed."""
        return bool(self._middle)

    @property
    def is_nothing(self) -> bool:
        """Whether all of the unit goes."""
        return not self.front_bytes and not self._middle

    @property
    def compressed_bytes(self) -> int:
        """The memory of what stays compressed."""
        return kept_bytes(len(self._middle))

    @property
    def moved_bytes(self) -> int:
        """What is read for the unit each time."""
        refused = self._compressed.read_bytes if self._compressed is not None else 0
        return refused + self._recipe.moved_bytes_behind(self._middle.stop)

    @property
    def fronted(self) -> FrontedUnit:
        """The memory in which the unit is seen; for one that has a front."""
        if self._fronted is None:
            self._fronted = FrontedUnit(self._recipe.nbytes, self.front_bytes)
        return self._fronted

    @property
    def memory(self) -> Bytes:
        """That in which the unit is seen; none if there is none by now."""
        return NOWHERE if self._fronted is None else self._fronted.data

    def missing(self) -> list[Fill]:
        """What is to be read only because it stays."""
        missing: list[Fill] = []
        if self.front_bytes and not self.fronted.is_there:
            missing += [part for _, part in self._recipe.parts(0, self.front_bytes, self.fronted.data)]
        return missing + self._kept.missing() if self._middle else missing

    def prepare(self, memory: Bytes, begin: int) -> Prepared:
        """What brings a unit of which something is compressed into its memory, from byte `begin` on."""
        before = self._recipe.parts(begin, self._middle.start, memory) if begin < self._middle.start else ()
        behind = self._recipe.parts(self._middle.stop, memory.size, memory)
        return self._kept.prepare(memory, [part for _, part in (*before, *behind)])

    def forget(self, memory: Bytes) -> None:
        """Hold on to memory that it was brought into no longer."""
        if self._compressed is not None:
            self._compressed.forget(memory)

    def drop_compressed(self) -> None:
        """Read again what stays compressed."""
        self._compressed = None

    def drop(self) -> None:
        """Give back the memory of what stays, until it is wanted again."""
        self._fronted = self._compressed = None

    @property
    def _kept(self) -> Compressed:
        if self._compressed is None:
            self._compressed = Compressed(self._recipe.parts(self._middle.start, self._middle.stop, NOWHERE))
        return self._compressed
