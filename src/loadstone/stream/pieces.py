"""The pieces that a new file is made of: how each stretch of it comes from checkpoint tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import numpy as np

from loadstone.architecture.gguf_layouts import Array, Chain, GroupHeads, Layout, apply_layout, computes
from loadstone.architecture.keymap import Assignment, Part
from loadstone.checkpoint.values import TensorInfo
from loadstone.checkpoint.write import NewTensor, Shard
from loadstone.dtypes import DTYPES, GGML_BLOCKS_BY_NAME, nbytes_of
from loadstone.errors import UnsupportedDtype
from loadstone.hardware.pages import Bytes, anonymous
from loadstone.stream.convert import kernel_for
from loadstone.stream.host import FileMaps, fill_for, lost
from loadstone.stream.memory import Gatherer
from loadstone.stream.read import Reader
from loadstone.stream.source import ALIGNMENT
from loadstone.stream.spans import Fill

# Decoded at once by a thread: of most encodings some 300 kB become 2 MB of float32.
_BLOCK_CHUNK_NUMEL = 1 << 19
# Gathered at once from a strided tensor. That takes two copies, and as many addresses and their sums, if every element
# lies alone.
_GATHER_NUMEL = 1 << 20
_GATHER_BYTES = 2 * 8 * _GATHER_NUMEL + 2 * 8 * _GATHER_NUMEL

Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a piece is made with.

    Attributes:
        slot: memory for it, `ALIGNMENT` larger than the largest piece that uses it.
        reader: reads files.
        maps: the files as memory.
        gatherer: copies what lies apart in them; of the thread that makes the pieces.
    """

    slot: Bytes
    reader: Reader
    maps: FileMaps
    gatherer: Gatherer


class Piece(Protocol):
    """A stretch of a new file."""

    @property
    def offset(self) -> int:
        """Of its first byte in the file."""

    @property
    def alone(self) -> bool:
        """Whether it takes memory of its own, so that only one such piece may be made at a time."""

    def begin(self, room: Room) -> Callable[[], Bytes]:
        """Start to make it; the function returned waits for it and gives its bytes."""


def pieces_of(
    shard: Shard, assignments: Mapping[str, Assignment], tensors: Tensors, slot_bytes: int
) -> Iterator[Piece]:
    """Cut a file into pieces, in order.

    Args:
        shard: the file.
        assignments: what fills its tensors, by their names.
        tensors: of the checkpoint, by name.
        slot_bytes: the most bytes of a piece that is no tensor as a whole.
    """
    offset = len(shard.header)
    packer = _Packer(slot_bytes)
    for tensor in shard.tensors:
        for parts in _made_at_once(assignments[tensor.name]):
            begin = offset + nbytes_of(DTYPES[tensor.dtype], parts[0].start)
            info = tensors[parts[0].source]
            if _is_composed(parts):
                yield from packer.flush()
                yield Composed(offset=begin, tensor=tensor, parts=parts, tensors=tensors)
            elif info.strides is not None:
                yield from packer.flush()
                yield from _strided(info, tensor.dtype, begin)
            else:
                yield from packer.add(info, tensor.dtype, begin)
        offset += tensor.nbytes
    yield from packer.flush()


def _made_at_once(assignment: Assignment) -> Iterator[tuple[Part, ...]]:
    """The parts that must be made together: all where they are slices, each by itself where they follow one another."""
    if any(part.index is not None for part in assignment.parts):
        yield assignment.parts
    else:
        yield from ((part,) for part in assignment.parts)


def _is_composed(parts: tuple[Part, ...]) -> bool:
    """Whether parts must be in memory as a whole: slices of a tensor, or rearranged."""
    return parts[0].index is not None or parts[0].layout is not None


def compose_bytes(tensor: NewTensor, assignment: Assignment, tensors: Tensors) -> int:
    """The memory of its own that making a tensor takes."""
    needed = 0
    for parts in _made_at_once(assignment):
        if _is_composed(parts):
            largest = max(_part_bytes(part, tensors[part.source], tensor.dtype) for part in parts)
            needed = max(needed, largest + (0 if parts[0].index is None else tensor.nbytes))
    return needed


def gather_bytes(tensors: Iterable[TensorInfo]) -> int:
    """The memory of its own that gathering takes while a file is written."""
    return _GATHER_BYTES if any(info.strides is not None for info in tensors) else 0


def _part_bytes(part: Part, info: TensorInfo, dtype: str) -> int:
    middle = _middle(part, dtype)
    cast_bytes = 0 if middle == dtype else nbytes_of(DTYPES[dtype], info.numel)
    return (1 + _num_copies(part.layout)) * nbytes_of(DTYPES[middle], info.numel) + cast_bytes


def _num_copies(layout: Layout | None) -> int:
    """How many copies of a tensor undoing its layout has at hand at once, at most, beside the tensor itself."""
    match layout:
        case None:
            return 0
        case Chain():
            return 1 + max(map(_num_copies, layout.layouts))
        case GroupHeads():
            return 3  # grouped, joined to what stays in front, made contiguous
    return 1


def _middle(part: Part, dtype: str) -> str:
    """The dtype in which a part is rearranged: what is computed must not be rounded twice."""
    return "float32" if computes(part.layout) else dtype


def _words(data: Bytes, dtype: str) -> Array:
    """The elements of a dtype as numpy can move them, and calculate with them where it is float32."""
    return data.view(np.float32 if dtype == "float32" else f"u{DTYPES[dtype].bits // 8}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """A whole tensor, or a stretch of one that is rearranged by itself, in memory of its own.

    Attributes:
        offset: of its first byte in the file.
        tensor: what it belongs to.
        parts: the slices that make the tensor, or the only part of the stretch.
        tensors: of the checkpoint, by name.
    """

    offset: int
    tensor: NewTensor
    parts: tuple[Part, ...]
    tensors: Tensors

    @property
    def alone(self) -> bool:
        """Always."""
        return True

    def begin(self, room: Room) -> Callable[[], Bytes]:
        """Nothing is read before it is its turn: its memory would be held longer."""
        return lambda: self._make(room)

    def _make(self, room: Room) -> Bytes:
        if self.parts[0].index is None:
            return _flat(self._part(self.parts[0], room))
        whole = anonymous(self.tensor.nbytes)
        places = _words(whole, self.tensor.dtype).reshape(self.tensor.shape)
        for part in self.parts:
            places[part.index or ()] = self._part(part, room)
        return whole

    def _part(self, part: Part, room: Room) -> Array:
        """A part in the shape of the place that it fills."""
        info, dtype = self.tensors[part.source], self.tensor.dtype
        middle = _middle(part, dtype)
        decoded = anonymous(nbytes_of(DTYPES[middle], info.numel))
        if info.strides is None:
            room.reader.submit([fill_of(info, middle, decoded)]).wait()
        else:
            for piece in _strided(info, middle, 0):
                piece.gather(room, decoded[piece.offset : piece.offset + piece.nbytes])
        found = apply_layout(part.layout, _words(decoded, middle).reshape(info.shape))
        if middle == dtype:
            return found
        del decoded
        narrow = anonymous(nbytes_of(DTYPES[dtype], info.numel))
        cast(_flat(found), middle, narrow, dtype)
        return _words(narrow, dtype).reshape(found.shape)


def _flat(array: Array) -> Bytes:
    """The bytes of an array, in order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """Neighbouring tensors, or a stretch of one, that are read, cast and decoded into a slot.

    Attributes:
        offset: of the first byte in the file.
        nbytes: how many bytes.
        stretches: what it consists of, each with its checkpoint tensor cut to size and the dtype it becomes.
    """

    offset: int
    nbytes: int
    stretches: tuple[tuple[TensorInfo, str, slice], ...]

    @property
    def alone(self) -> bool:
        """Never."""
        return False

    def begin(self, room: Room) -> Callable[[], Bytes]:
        """Start to read."""
        first, dtype, _ = self.stretches[0]
        # At an address that is aligned as the file is, whole blocks of the disk are read to where they belong.
        shift = first.offset % ALIGNMENT if first.dtype == dtype and first.encoding is None else 0
        data = room.slot[shift : shift + self.nbytes]
        batch = room.reader.submit([fill_of(info, kind, data[place]) for info, kind, place in self.stretches])

        def finish() -> Bytes:
            batch.wait()
            return data

        return finish


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """A stretch of a tensor whose elements lie apart: picked from the mapped file.

    Attributes:
        offset: of the first byte in the file.
        info: the tensor.
        dtype: what it becomes.
        box: which of its elements: a range for each dimension.
    """

    offset: int
    info: TensorInfo
    dtype: str
    box: tuple[slice, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes it becomes."""
        return nbytes_of(DTYPES[self.dtype], prod(side.stop - side.start for side in self.box))

    @property
    def alone(self) -> bool:
        """Never."""
        return False

    def begin(self, room: Room) -> Callable[[], Bytes]:
        """Nothing can be read ahead."""
        return lambda: self.gather(room, room.slot[: self.nbytes])

    def gather(self, room: Room, destination: Bytes) -> Bytes:
        """Fill the destination, and give it back.

        Raises:
            TruncatedFile: the file was cut short.
            UnreadableFile: it cannot be read any more.
        """
        info = self.info
        words = _words(room.maps.bytes_of(info), info.dtype)
        strides = tuple(step * words.itemsize for step in info.strides or ())
        view = np.lib.stride_tricks.as_strided(words, info.shape, strides, writeable=False)[self.box]
        # In the order of the file first: ten times faster where that is a map.
        order = np.argsort([-step for step in view.strides], kind="stable")
        nearby = view.transpose(order)
        copied = np.empty(nearby.shape, nearby.dtype)
        if not room.gatherer.copy(nearby, _flat(copied)):
            raise lost(info)
        cast(_flat(copied.transpose(np.argsort(order))), info.dtype, destination, self.dtype)
        return destination


class _Packer:
    """Packs tensors that lie side by side in the new file into pieces."""

    def __init__(self, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        self._offset = 0
        self._nbytes = 0
        self._stretches: list[tuple[TensorInfo, str, slice]] = []

    def add(self, info: TensorInfo, dtype: str, offset: int) -> Iterator[Piece]:
        """Append a tensor that becomes `dtype`; gives the pieces that are full."""
        stored_bytes, new_bytes = unit_bytes(info, dtype)
        done, total = 0, info.nbytes // stored_bytes
        while done < total:
            if self._nbytes and (total - done) * new_bytes > self._slot_bytes - self._nbytes:
                yield from self.flush()
            if not self._nbytes:
                self._offset = offset + done * new_bytes
            units = min(total - done, (self._slot_bytes - self._nbytes) // new_bytes)
            cut = replace(info, offset=info.offset + done * stored_bytes, nbytes=units * stored_bytes)
            place = slice(self._nbytes, self._nbytes + units * new_bytes)
            self._stretches.append((cut, dtype, place))
            self._nbytes = place.stop
            done += units

    def flush(self) -> Iterator[Piece]:
        """The piece that is not full."""
        if self._stretches:
            yield Streamed(offset=self._offset, nbytes=self._nbytes, stretches=tuple(self._stretches))
        self._stretches, self._nbytes = [], 0


def _strided(info: TensorInfo, dtype: str, offset: int) -> Iterator[Gathered]:
    for box in _boxes(info.shape):
        piece = Gathered(offset=offset, info=info, dtype=dtype, box=box)
        yield piece
        offset += piece.nbytes


def _boxes(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Parts of a tensor of that shape that follow one another in the order in which it is written."""
    row_numel = prod(shape[1:])
    if row_numel > _GATHER_NUMEL:
        for row in range(shape[0]):
            yield from ((slice(row, row + 1), *rest) for rest in _boxes(shape[1:]))
        return
    step = max(1, _GATHER_NUMEL // max(1, row_numel))
    for start in range(0, shape[0], step):
        yield (slice(start, min(start + step, shape[0])), *(slice(0, size) for size in shape[1:]))


def unit_bytes(info: TensorInfo, dtype: str) -> tuple[int, int]:
    """The bytes of the smallest part of a tensor that can be read by itself: as stored, and as what it becomes."""
    if info.encoding is not None:
        block = GGML_BLOCKS_BY_NAME[info.encoding]
        return block.block_nbytes, nbytes_of(DTYPES[dtype], block.block_numel)
    if info.dtype == dtype:
        return 1, 1
    return DTYPES[info.dtype].bits // 8, DTYPES[dtype].bits // 8


def fill_of(info: TensorInfo, dtype: str, destination: Bytes) -> Fill:
    """How to read a contiguous tensor, or a stretch of one, into memory that was used before."""
    fill = fill_for(info, dtype, destination, fresh=False)
    if fill is None:
        raise _no_cast(info.name, info.dtype, dtype)
    if info.encoding is None:
        return fill
    block = GGML_BLOCKS_BY_NAME[info.encoding]
    return replace(fill, chunk_bytes=_BLOCK_CHUNK_NUMEL // block.block_numel * block.block_nbytes)


def cast(data: Bytes, dtype: str, destination: Bytes, wanted: str) -> None:
    """Cast elements in memory."""
    kernel = kernel_for(dtype, wanted)
    if kernel is None:
        raise _no_cast("a tensor", dtype, wanted)
    kernel(data, destination)


def _no_cast(name: str, dtype: str, wanted: str) -> UnsupportedDtype:
    return UnsupportedDtype(f"{name}: expected a dtype that can be cast to {wanted}, found {dtype}; leave it as it is.")
