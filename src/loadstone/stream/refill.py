"""Units of a model that come again from their files in each pass: what is read, and where in a slot it goes.

Everything that can be worked out once is: the order of the parameters in a slot is the order of their tensors in the
files, and what lies side by side there, and is decoded alike, is read as one. What is only moved lies in the slot as it
lies in the file's blocks, so that the disk writes it where it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from loadstone.architecture.keymap import Assignment, Part, Target
from loadstone.checkpoint.files import check_unchanged
from loadstone.checkpoint.values import Checkpoint, CheckpointFile, TensorInfo
from loadstone.dtypes import DTYPES, nbytes_of
from loadstone.events import Observer, ignore
from loadstone.hardware.pages import Bytes
from loadstone.stream.convert import copy
from loadstone.stream.host import fill_for
from loadstone.stream.read import Batch, Reader, batch_of
from loadstone.stream.rearrange import (
    Rearranged,
    decoded_nbytes,
    is_rearranged,
    placer,
    rearranging_fill,
    target_nbytes,
)
from loadstone.stream.source import ALIGNMENT, OpenFiles, streaming_manners
from loadstone.stream.spans import Fill, Prepared, prepare
from loadstone.stream.stored import Stored
from loadstone.units import round_up

NOWHERE = np.empty(0, np.uint8)
# Where parameters begin that are not laid out as the file's blocks are.
_PLACE_ALIGNMENT = 64

Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One parameter: what fills it, and what it must be.

    Attributes:
        assignment: the tensors of the checkpoint, and where in it they belong.
        target: what is made of them.
        stored: how they lie in memory where they are wanted as the files hold them; the target is bytes then.
    """

    assignment: Assignment
    target: Target
    stored: Stored | None = None

    @property
    def fqn(self) -> str:
        """Its name in the module."""
        return self.assignment.target

    def pieces(self, tensors: Tensors) -> list[tuple[Part, TensorInfo]]:
        """What is read for it, and where in the target each of it belongs."""
        if self.stored is not None:
            return self.stored.pieces
        return [(part, tensors[part.source]) for part in self.assignment.parts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a parameter lies in a slot: from byte `begin` on; as `stored` says, where it is yet to be made."""

    fqn: str
    target: Target
    begin: int
    stored: Stored | None = None


def can_refill(wanted: Wanted, tensors: Tensors) -> bool:
    """Whether a parameter can be read again by numpy alone."""
    return all(_fill(part, tensors[part.source], wanted.target) is not None for part in wanted.assignment.parts)


def _fill(part: Part, info: TensorInfo, target: Target) -> Fill | None:
    if is_rearranged(part, info):
        return rearranging_fill(part, info, target)
    return fill_for(info, target.dtype, NOWHERE, fresh=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """A fill whose destination is the bytes from `begin` on, of whatever slot."""

    fill: Fill
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.fill.nbytes * self.fill.destination_bits // self.fill.source_bits

    def part(self, begin: int, end: int, memory: Bytes) -> Fill:
        """What of it goes between two bytes of a unit, of which `memory` is all. For bytes that only move."""
        low = min(max(self.begin, begin), self.end)
        high = max(low, min(self.end, end))
        offset = self.fill.offset + low - self.begin
        return replace(self.fill, offset=offset, nbytes=high - low, destination=memory[low:high])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rearrangement:
    """A part that is read into the bytes from `begin` on, behind the parameters, and moved from there."""

    part: Part
    info: TensorInfo
    place: Place
    begin: int


@dataclass(slots=True)
class Recipe:
    """How one unit fills a slot.

    Attributes:
        places: where its parameters lie.
        nbytes: how large the slot must be.
        moved_bytes: how much is read from the files.
    """

    places: list[Place] = field(default_factory=list)
    nbytes: int = 0
    moved_bytes: int = 0
    _reads: list[_Read] = field(default_factory=list)
    _rearrangements: list[_Rearrangement] = field(default_factory=list)

    def add(self, wanted: Wanted, tensors: Tensors) -> None:
        """Lay out one more parameter; they come in the order of their files."""
        pieces = wanted.pieces(tensors)
        begin = self._begin_of(wanted.target, *pieces[0])
        place = Place(fqn=wanted.fqn, target=wanted.target, begin=begin, stored=wanted.stored)
        self.places.append(place)
        self.nbytes = place.begin + target_nbytes(wanted.target)
        for part, info in pieces:
            self.moved_bytes += info.nbytes
            if is_rearranged(part, info):
                self._rearrangements.append(_Rearrangement(part=part, info=info, place=place, begin=0))
            elif (fill := _fill(part, info, wanted.target)) is not None:
                begin = place.begin + nbytes_of(DTYPES[wanted.target.dtype], part.start)
                self._reads.append(_Read(fill=fill, begin=begin))

    def _begin_of(self, target: Target, first: Part, info: TensorInfo) -> int:
        """Where the next parameter begins: for bytes that only move, as far into a block as in the file."""
        moves = not is_rearranged(first, info) and info.is_aligned and first.start == 0
        if not moves or info.encoding is not None or info.dtype != target.dtype:
            return round_up(self.nbytes, _PLACE_ALIGNMENT)
        last = self._reads[-1] if self._reads else None
        if last is not None and last.fill.kernel is copy and last.fill.file == info.file and last.end == self.nbytes:
            gap = info.offset - last.fill.offset - last.fill.nbytes
            if 0 <= gap < ALIGNMENT:
                return self.nbytes + gap
        return round_up(self.nbytes, ALIGNMENT) + info.offset % ALIGNMENT

    def finish(self) -> None:
        """Join what is read in one go, and make room for what is rearranged."""
        self._reads = _joined(self._reads)
        for number, one in enumerate(self._rearrangements):
            begin = round_up(self.nbytes, _PLACE_ALIGNMENT)
            self._rearrangements[number] = replace(one, begin=begin)
            self.nbytes = begin + decoded_nbytes(one.part, one.info, one.place.target)

    @property
    def is_moved(self) -> bool:
        """Whether all of it only moves, so that any part of it can be read by itself."""
        return not self._rearrangements and all(read.fill.kernel is copy for read in self._reads)

    def prepare(self, slot: Bytes) -> tuple[Prepared, list[Rearranged]]:
        """The same for the memory of one slot."""
        fills = [replace(read.fill, destination=slot[read.begin : read.end]) for read in self._reads]
        kernels = []
        for one in self._rearrangements:
            target = one.place.target
            decoded = slot[one.begin : one.begin + decoded_nbytes(one.part, one.info, target)]
            whole = slot[one.place.begin : one.place.begin + target_nbytes(target)]
            fill = rearranging_fill(one.part, one.info, target)
            if fill is not None:
                move = placer(one.part, one.info, target, decoded, whole)
                kernels.append(Rearranged(fill.kernel, fill.nbytes, move))
                fills.append(replace(fill, destination=decoded, kernel=kernels[-1]))
        return prepare(fills), kernels

    @property
    def is_compressible(self) -> bool:
        """Whether any part of it can be kept compressed: all of it only moves, and is bfloat16."""
        return self.is_moved and all(place.target.dtype == "bfloat16" for place in self.places)

    def moved_bytes_behind(self, begin: int) -> int:
        """How much is read from the files for what lies behind byte `begin` of a unit that only moves."""
        return sum(min(read.fill.nbytes, max(0, read.end - begin)) for read in self._reads)

    def prepare_part(self, begin: int, end: int, memory: Bytes) -> Prepared:
        """The same for a part of a unit that only moves: what lies between two of its bytes.

        Args:
            begin: the first.
            end: the one after the last.
            memory: for all of the unit.
        """
        return prepare([part for _, part in self.parts(begin, end, memory)])

    def parts(self, begin: int, end: int, memory: Bytes) -> Iterator[tuple[int, Fill]]:
        """What is read for a part of a unit that only moves, and where in the unit each of it begins."""
        for read in self._reads:
            part = read.part(begin, end, memory)
            if part.nbytes:
                yield max(read.begin, begin), part


def _joined(reads: Sequence[_Read]) -> list[_Read]:
    joined: list[_Read] = []
    for read in sorted(reads, key=lambda read: (str(read.fill.file), read.fill.offset)):
        last = joined[-1] if joined else None
        if last is not None and _continues(last, read):
            nbytes = read.fill.offset + read.fill.nbytes - last.fill.offset
            joined[-1] = replace(last, fill=replace(last.fill, nbytes=nbytes))
        else:
            joined.append(read)
    return joined


def _continues(last: _Read, read: _Read) -> bool:
    """Whether two reads are one: what lies between them, if anything, lies between them in the slot too."""
    before, after = last.fill, read.fill
    same = (before.file, before.kernel, before.source_bits, before.destination_bits) == (
        after.file,
        after.kernel,
        after.source_bits,
        after.destination_bits,
    )
    gap = after.offset - before.offset - before.nbytes
    return same and read.begin - last.end == gap and (gap == 0 or (before.kernel is copy and 0 < gap < ALIGNMENT))


def recipe_for(wanted: Iterable[Wanted], tensors: Tensors) -> Recipe:
    """How parameters that come together fill a slot."""

    def place_in_files(one: Wanted) -> tuple[str, int]:
        info = tensors[one.assignment.parts[0].source]
        return str(info.file), info.offset

    recipe = Recipe()
    for one in sorted(wanted, key=place_in_files):
        recipe.add(one, tensors)
    recipe.finish()
    return recipe


class Refill:
    """Reads units into slots, again and again; close it.

    Args:
        units: what each unit holds, by its name; all of it `can_refill`.
        checkpoint: where it comes from.
        observer: is told of bytes.

    Attributes:
        tensors: of the checkpoint, by name.
        recipes: how each unit fills a slot.
        reader: the threads that read.
        files: the files, which stay open.
    """

    def __init__(
        self, units: Mapping[str, Sequence[Wanted]], checkpoint: Checkpoint, observer: Observer = ignore
    ) -> None:
        self.tensors = checkpoint.tensors
        self._versions = {file.path: file for file in checkpoint.files}
        self._files_of = {name: self.versions(wanted) for name, wanted in units.items()}
        self._prepared: dict[tuple[str, int], tuple[Prepared, list[Rearranged]]] = {}
        self.recipes = {name: recipe_for(wanted, checkpoint.tensors) for name, wanted in units.items()}
        self.reader = Reader(observer=observer, stage="stream")
        self.files = OpenFiles(streaming_manners(self._versions), checkpoint.files)

    def know(self, checkpoint: Checkpoint) -> None:
        """Know the tensors of one more checkpoint, whose names are its own."""
        self.tensors = {**self.tensors, **checkpoint.tensors}
        self._versions |= {file.path: file for file in checkpoint.files}
        self.files.add(checkpoint.files)

    def add(self, units: Mapping[str, Sequence[Wanted]]) -> None:
        """Know more units; see the class."""
        self._files_of |= {name: self.versions(wanted) for name, wanted in units.items()}
        self.recipes |= {name: recipe_for(wanted, self.tensors) for name, wanted in units.items()}

    def fill(self, unit: str, slot: Bytes, *, priority: int = 0) -> Batch:
        """Begin to read a unit into a slot, which nobody must use meanwhile.

        Args:
            unit: its name.
            slot: page-aligned memory, at least as large as the unit's recipe says, always the same for one slot.
            priority: lower numbers come first.

        Returns:
            What can be waited for; `check` afterwards that the files are still the same.
        """
        return self.reader.begin(self.batch(unit, slot), priority)

    def batch(self, unit: str, slot: Bytes) -> Batch:
        """The same, for `reader.begin` to begin: what is to be cancelled must be known before it runs."""
        key = (unit, slot.ctypes.data)
        if key not in self._prepared:
            self._prepared[key] = self.recipes[unit].prepare(slot)
        prepared, kernels = self._prepared[key]
        for kernel in kernels:
            kernel.restart()
        return batch_of(prepared, self.files, unit)

    def batch_of_part(self, unit: str, begin: int, end: int, memory: Bytes) -> Batch:
        """The same for a part of a unit that only moves; see `Recipe.prepare_part`."""
        key = (unit, memory.ctypes.data + begin)
        if key not in self._prepared:
            self._prepared[key] = self.recipes[unit].prepare_part(begin, end, memory), []
        return batch_of(self._prepared[key][0], self.files, unit)

    def batch_of(self, unit: str, prepared: Prepared) -> Batch:
        """The same for what was prepared elsewhere."""
        return batch_of(prepared, self.files, unit)

    def forget(self, slot: Bytes) -> None:
        """Hold on to memory no longer: it goes, or is not filled again."""
        begin = slot.ctypes.data
        for key in [key for key in self._prepared if begin <= key[1] < begin + slot.size]:
            del self._prepared[key]

    def check(self, unit: str) -> None:
        """Check that the files of a unit are those whose headers were read.

        Raises:
            UnreadableFile: one is gone.
            FileChanged: one was replaced, cut short or written to.
        """
        check_unchanged(self._files_of[unit])

    def info(self, wanted: Wanted) -> TensorInfo:
        """The tensor that fills a parameter, or the first of those that do."""
        return self.tensors[wanted.assignment.parts[0].source]

    def check_all(self) -> None:
        """Check that all files are those whose headers were read.

        Raises:
            UnreadableFile: one is gone.
            FileChanged: one was replaced, cut short or written to.
        """
        check_unchanged(self._versions.values())

    def versions(self, wanted: Iterable[Wanted]) -> tuple[CheckpointFile, ...]:
        """The files that parameters lie in, as they were when their headers were read."""
        paths = {self.tensors[part.source].file: None for one in wanted for part in one.assignment.parts}
        return tuple(self._versions[path] for path in paths)

    def close(self) -> None:
        """End the threads and close the files, until something is read again."""
        self.reader.close()
        self.files.close()
