"""Which unit comes next: guessed at first, learnt as units are used."""

from __future__ import annotations

from collections.abc import Sequence

# How far a guess goes at most for each unit that is asked for: blocks used many times in a row add nothing new.
_PATIENCE = 8


class Order:
    """The walk over the units, told by what followed the last two the last time.

    Two, because a block that is shared by several places of the model is followed by another unit after each of them.
    The walk goes round, so that the end of one pass foretells the beginning of the next.

    Args:
        units: in the order in which they are likely used.
    """

    def __init__(self, units: Sequence[str]) -> None:
        self._first = tuple(units)
        self._after = dict(zip(units, [*units[1:], *units[:1]], strict=True))
        self._after_two: dict[tuple[str, str], str] = {}
        self._before = self._last = ""

    def visit(self, unit: str) -> None:
        """Note that a unit is used now."""
        if self._last:
            self._after[self._last] = unit
            self._after_two[self._before, self._last] = unit
        self._before, self._last = self._last, unit

    def coming(self, count: int) -> list[str]:
        """The next `count` different units, the first first; fewer where no more are known."""
        if not self._last:
            return list(self._first[:count])
        found: dict[str, None] = {}
        before, last = self._before, self._last
        for _ in range(count * _PATIENCE):
            before, last = last, self._after_two.get((before, last)) or self._after[last]
            found[last] = None
            if len(found) == count:
                break
        return list(found)
