"""Which units go when memory is short, and which come back: worked out from sizes alone.

The walk over the units goes round, so those that are streamed do best as far from each other as can be: what is kept
between two of them computes while the next one is read. Tables that are looked up by rows go first, for they cost next
to nothing; then what most of the weights look like; what is larger needs larger slots, and what is small saves little.
"""

from __future__ import annotations

import bisect
import heapq
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum

# Beside the units that most weights are in, one of less than this part of their size is small.
_SMALL_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One unit.

    Attributes:
        name: of it.
        nbytes: what it takes where it is kept.
        slot_bytes: how large a slot it needs where it is streamed; 0 for a table that is looked up by rows.
        is_kept: whether it is in memory for good.
    """

    name: str
    nbytes: int
    slot_bytes: int
    is_kept: bool


class _Rank(IntEnum):
    """Who goes first."""

    TABLE = 0
    TYPICAL = 1
    LARGE = 2
    SMALL = 3


def total_bytes(pieces: Sequence[Piece], num_slots: int) -> int:
    """The memory of what is kept, and of the slots that the rest needs."""
    away = (piece.slot_bytes for piece in pieces if not piece.is_kept)
    return sum(piece.nbytes for piece in pieces if piece.is_kept) + sum(heapq.nlargest(num_slots, away))


def least_bytes(pieces: Sequence[Piece], num_slots: int) -> int:
    """The memory with everything streamed."""
    return sum(heapq.nlargest(num_slots, (piece.slot_bytes for piece in pieces)))


def lowered(pieces: Sequence[Piece], limit_bytes: int, num_slots: int) -> list[str]:
    """Which units must go.

    Args:
        pieces: all units, in the order of the walk.
        limit_bytes: what `total_bytes` may be at most.
        num_slots: of the ring.

    Returns:
        Their names; all that are kept where even that is not enough.
    """
    walk = _Walk(pieces, num_slots)
    gone: list[str] = []
    for candidates in walk.by_rank():
        left = [index for index in candidates if walk.kept[index]]
        away = walk.away()
        gaps = [walk.gap(index, away) for index in left]
        while left and walk.nbytes() > limit_bytes:
            at = max(range(len(left)), key=lambda at: (gaps[at], -left[at]))
            index = left.pop(at)
            gaps.pop(at)
            walk.kept[index] = False
            gaps = [min(gap, walk.apart(index, other)) for gap, other in zip(gaps, left, strict=True)]
            gone.append(pieces[index].name)
    return gone


def raised(pieces: Sequence[Piece], limit_bytes: int, num_slots: int, among: Collection[str]) -> list[str]:
    """Which units may come back.

    Args:
        pieces: all units, in the order of the walk.
        limit_bytes: what `total_bytes` may be at most.
        num_slots: of the ring.
        among: the names of those that may.

    Returns:
        Their names, the most that keep within the limit.
    """
    walk = _Walk(pieces, num_slots)
    back: list[str] = []
    for candidates in reversed(walk.by_rank()):
        left = [index for index in candidates if not walk.kept[index] and pieces[index].name in among]
        while left:
            away = walk.away()
            index = min(left, key=lambda index: (walk.gap(index, away), index))
            left.remove(index)
            walk.kept[index] = True
            if walk.nbytes() > limit_bytes:
                walk.kept[index] = False
            else:
                back.append(pieces[index].name)
    return back


class _Walk:
    """The units on their circle, some kept and some not."""

    def __init__(self, pieces: Sequence[Piece], num_slots: int) -> None:
        self._pieces = pieces
        self._num_slots = num_slots
        self.kept = [piece.is_kept for piece in pieces]

    def nbytes(self) -> int:
        """The memory that it takes now."""
        kept = sum(piece.nbytes for piece, is_kept in zip(self._pieces, self.kept, strict=True) if is_kept)
        away = (piece.slot_bytes for piece, is_kept in zip(self._pieces, self.kept, strict=True) if not is_kept)
        return kept + sum(heapq.nlargest(self._num_slots, away))

    def by_rank(self) -> list[list[int]]:
        """The numbers of the units, those that go first first."""
        shares: Counter[int] = Counter()
        for piece in self._pieces:
            shares[piece.slot_bytes] += piece.slot_bytes
        typical = shares.most_common(1)[0][0] if shares else 0
        ranks: list[list[int]] = [[] for _ in _Rank]
        for index, piece in enumerate(self._pieces):
            ranks[_rank(piece, typical)].append(index)
        return ranks

    def away(self) -> list[int]:
        """The numbers of those that are streamed through slots, in order."""
        return [index for index, kept in enumerate(self.kept) if not kept and self._pieces[index].slot_bytes]

    def gap(self, index: int, away: Sequence[int]) -> int:
        """How far the nearest of the others that are streamed is."""
        at = bisect.bisect_left(away, index)
        others = {away[at - 1], away[at % len(away)], away[(at + 1) % len(away)]} - {index} if away else set()
        return min((self.apart(index, other) for other in others), default=len(self.kept))

    def apart(self, one: int, other: int) -> int:
        """How far two units are from each other, the shorter way round."""
        distance = abs(one - other)
        return min(distance, len(self.kept) - distance)


def _rank(piece: Piece, typical: int) -> _Rank:
    if not piece.slot_bytes:
        return _Rank.TABLE
    if piece.slot_bytes > typical:
        return _Rank.LARGE
    return _Rank.SMALL if piece.slot_bytes < _SMALL_SHARE * typical else _Rank.TYPICAL
