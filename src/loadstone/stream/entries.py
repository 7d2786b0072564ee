"""A fused parameter whose first dimension counts experts, as entries of which each can be read by itself.

Files hold an expert's matrices as tensors of their own, or all experts' in one tensor. Either way an entry is a smaller
parameter with a first dimension of one, and whoever reads parameters can read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from loadstone.architecture.gguf_layouts import Transpose
from loadstone.architecture.keymap import Assignment, Part, Target
from loadstone.checkpoint.values import TensorInfo
from loadstone.stream.refill import Recipe, Wanted, can_refill, recipe_for

_ALL = slice(None)
_Piece = tuple[Part, TensorInfo]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """The entries of one parameter.

    Attributes:
        wanted: the whole parameter.
        target: what each entry is: `(1, ...)`.
        pieces: what fills each entry, with the stretches of the files that they lie in.
    """

    wanted: Wanted
    target: Target
    pieces: tuple[tuple[_Piece, ...], ...]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.pieces)

    @property
    def stored_bytes(self) -> int:
        """What all of them take in the files."""
        return sum(info.nbytes for pieces in self.pieces for _, info in pieces)

    def recipe(self, number: int) -> Recipe:
        """How an entry fills a slot."""
        return recipe_for([self._entry(number)], {part.source: info for part, info in self.pieces[number]})

    def name(self, number: int) -> str:
        """What an entry is called where it comes by itself."""
        return f"{self.wanted.fqn}[{number}]"

    def alone(self, number: int) -> tuple[Wanted, dict[str, TensorInfo]]:
        """An entry as a parameter of its own, `...experts.gate_up_proj[7]`, with its tensors by names of their own."""
        name = self.name(number)
        pieces = [(f"{name}/{index}", part, info) for index, (part, info) in enumerate(self.pieces[number])]
        parts = tuple(replace(part, source=source) for source, part, _ in pieces)
        wanted = Wanted(assignment=Assignment(target=name, parts=parts), target=self.target)
        return wanted, {source: info for source, _, info in pieces}

    def is_readable(self) -> bool:
        """Whether numpy alone can read every entry; entries are alike but for their place."""
        return can_refill(self._entry(0), {part.source: info for part, info in self.pieces[0]})

    def _entry(self, number: int) -> Wanted:
        parts = tuple(part for part, _ in self.pieces[number])
        return Wanted(assignment=Assignment(target=self.wanted.fqn, parts=parts), target=self.target)


def split(wanted: Wanted, tensors: Mapping[str, TensorInfo]) -> Entries | None:
    """Divide a parameter of three dimensions or more by the first.

    Args:
        wanted: the parameter.
        tensors: the checkpoint's, by name.

    Returns:
        None where its entries cannot be read one by one.
    """
    shape = wanted.target.shape
    if len(shape) < 3 or shape[0] < 2:
        return None
    pieces: list[list[_Piece]] = [[] for _ in range(shape[0])]
    for part in wanted.assignment.parts:
        found = _pieces_of(part, tensors[part.source], shape)
        if found is None:
            return None
        first, several = found
        for number, piece in enumerate(several, first):
            pieces[number].append(piece)
    target = replace(wanted.target, shape=(1, *shape[1:]))
    if any(sum(info.numel for _, info in entry) != prod(target.shape) for entry in pieces):
        return None
    made = Entries(wanted=wanted, target=target, pieces=tuple(map(tuple, pieces)))
    return made if made.is_readable() else None


def _pieces_of(part: Part, info: TensorInfo, shape: tuple[int, ...]) -> tuple[int, list[_Piece]] | None:
    """The first entry that a part fills, and what of it goes into that and each of those that follow."""
    numel, count = prod(shape[1:]), shape[0]
    if info.strides is not None:
        return None
    if part.index is None and part.layout is None and part.start % numel + info.numel <= numel:
        return part.start // numel, [(replace(part, start=part.start % numel), info)]
    whole = part.index is None or part.index[0] == _ALL
    if part.start or not whole or info.shape[:1] != (count,) or info.nbytes % count:
        return None
    if part.layout is not None and not (isinstance(part.layout, Transpose) and len(info.shape) > 2):
        return None
    one = _straightened(replace(part, shape=(1, *info.shape[1:])), shape)
    stored = info.nbytes // count
    return 0, [
        (one, replace(info, offset=info.offset + number * stored, nbytes=stored, shape=(1, *info.shape[1:])))
        for number in range(count)
    ]


def _straightened(part: Part, shape: tuple[int, ...]) -> Part:
    """The same, where a slice of neighbouring rows is a contiguous stretch of one entry."""
    if part.layout is not None or part.index is None or len(part.index) != 2:
        return part
    begin, end, step = part.index[1].indices(shape[1])
    if step != 1 or end <= begin:
        return part
    return replace(part, index=None, start=begin * prod(shape[2:]))
