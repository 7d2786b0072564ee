"""The operations of the decoders of GGUF blocks on numpy's arrays; see `dequantize_ops.Ops`.

numpy's inner loops are fast and their starts are not: a loop over 32 bytes costs as much as one over 500. So bits are
shifted and masked over whole fields, and what must be put elsewhere is moved as items of 8 to 64 bytes, in one loop for
all blocks. numpy releases the GIL in all of it; few calls on many blocks keep threads from waiting for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadstone.stream.dequantize_ops import Table

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Numbers = NDArray[Any]

# The floats decoded at once, 2 MB of them. Smaller strips make calls so short that threads spend their time handing
# each other the GIL, which costs more than leaving the second-level cache.
STRIP_NUMEL = 524288
# Every byte sixteen times.
_SIXTEEN_TIMES = np.arange(256, dtype=np.uint8).repeat(16).view("V16")


def half(blocks: Bytes, offset: int) -> Floats:
    """The float16 at byte `offset` of every block of an even size, as a column of float32."""
    return blocks.view("<f2")[:, offset // 2, None].astype(np.float32)


def field(blocks: Bytes, offset: int, nbytes: int) -> Bytes:
    """`nbytes` of every block from `offset` on, made contiguous."""
    item = f"V{nbytes}"
    packed = np.empty((len(blocks), nbytes), np.uint8)
    packed.view(item)[:, 0] = blocks[:, offset : offset + nbytes].view(item)[:, 0]
    return packed


def words(packed: Bytes, nbytes: int) -> Numbers:
    """Bytes as numbers of 2 or 4."""
    return packed.view(f"<u{nbytes}")


def bytes_of(words: Sequence[Numbers]) -> Bytes:
    """Columns of numbers as their bytes."""
    return np.stack(words, axis=1).view(np.uint8)


def as_half(words: Numbers) -> Floats:
    """Numbers taken for float16."""
    return words.view("<f2").astype(np.float32)


def floats(values: Numbers) -> Floats:
    """Numbers as float32."""
    return values.astype(np.float32)


def signed(values: Numbers) -> NDArray[np.int8]:
    """The same bytes."""
    return values.view(np.int8)


def wide(values: Bytes) -> NDArray[np.uint16]:
    """Bytes as 16 bits."""
    return values.astype(np.uint16)


def stack(values: Sequence[Numbers]) -> Numbers:
    """Side by side in a last dimension."""
    return np.stack(values, axis=-1)


def join(values: Sequence[Numbers]) -> Numbers:
    """Behind each other."""
    return np.concatenate(values, axis=-1)


def digits(packed: Bytes, width: int) -> Bytes:
    """Bits of each byte, lowest first."""
    if width == 1:
        return np.unpackbits(packed.reshape(-1), bitorder="little").reshape(len(packed), -1)
    out = np.empty((*packed.shape, 8 // width), np.uint8)
    for index in range(8 // width):
        np.right_shift(packed, np.uint8(index * width), out=out[..., index])
    np.bitwise_and(out, np.uint8((1 << width) - 1), out=out)
    return out.reshape(len(packed), -1)


def repeat(values: Bytes) -> Bytes:
    """Every byte sixteen times."""
    return np.take(_SIXTEEN_TIMES, values).view(np.uint8)


def spread(packed: Bytes, shifts: tuple[int, ...], mask: int, item: int) -> Bytes:
    """Bit fields in runs; the mask drops the bits that a shift of whole words has moved across bytes."""
    index, amounts = _moves(shifts, item)
    runs = packed.reshape(-1).view(f"V{item}")
    words = np.take(runs, index[: runs.size * len(shifts)]).view(np.uint64)
    np.right_shift(words, amounts[: words.size], out=words)
    np.bitwise_and(words, np.uint64(mask * 0x0101010101010101), out=words)
    return words.view(np.uint8).reshape(len(packed), -1)


def spread_high(packed: Bytes, shifts: tuple[int, ...], mask: int, item: int) -> Bytes:
    """Bit fields in runs, above four low bits."""
    runs = packed.reshape(-1, 1, item)
    halves = np.empty((len(runs), 2, item), np.uint8)
    np.left_shift(runs, np.uint8(4), out=halves[:, :1])
    halves[:, 1:] = runs
    return spread(halves.reshape(len(packed), -1), shifts, mask, item)


@cache
def _moves(shifts: tuple[int, ...], item: int) -> tuple[NDArray[np.intp], NDArray[np.uint64]]:
    """For a whole strip: the run that each run is taken from, and how far each of its words is shifted."""
    num_runs = STRIP_NUMEL // item
    index = np.arange(-(-num_runs // len(shifts))).repeat(len(shifts))
    amounts = np.resize(np.array(shifts, np.uint64).repeat(item // 8), index.size * (item // 8))
    return index, amounts


def merge(low: Bytes, high: Bytes, shift: int = 0) -> Bytes:
    """`low | high << shift`, in place; eight bytes at a time, whose high bits are never reached."""
    whole, moved = low.view(np.uint64), high.view(np.uint64)
    if shift:
        np.left_shift(moved, np.uint64(shift), out=moved)
    np.bitwise_or(whole, moved, out=whole)
    return low


def centre(quants: Bytes, zero: int) -> NDArray[np.int8]:
    """`quants - zero`, in place."""
    made = quants.view(np.int8)
    np.subtract(made, np.int8(zero), out=made)
    return made


def take(table: Table, index: Numbers) -> Numbers:
    """Entries of a table; its rows move as one item."""
    entries = table.entries
    if entries.ndim == 1:
        return np.take(entries, index)
    rows = np.take(entries.view(f"u{entries.shape[1]}")[:, 0], index)
    return rows.view(entries.dtype).reshape(*index.shape, entries.shape[1])


def look_up(codes: Bytes, values: Sequence[int], out: Floats) -> None:
    """The values of codes, two at a time."""
    pairs = codes.view("<u2").astype(np.intp)
    # No index is out of bounds; other modes than "clip" would be checked or buffered.
    np.take(_pairs_of(tuple(values)), pairs, out=out.view(np.uint64), mode="clip")


@cache
def _pairs_of(values: tuple[int, ...]) -> NDArray[np.uint64]:
    """Two floats for every word of two codes, 0x0000 to 0x0F0F, as one item."""
    floats = np.zeros((0x1000, 2), np.float32)
    nibble = np.arange(16)
    for high in range(16):
        floats[high << 8 | nibble] = np.stack([np.take(values, nibble), np.full(16, values[high])], axis=1)
    return floats.view(np.uint64)[:, 0]


def scale(quants: Numbers, out: Floats, factor: Floats) -> None:
    """`out = factor * quants`."""
    np.copyto(out, quants)
    scale_in_place(out, factor)


def scale_in_place(out: Floats, factor: Floats) -> None:
    """`out = factor * out`."""
    groups = _groups(out, factor)
    np.multiply(groups, factor[:, :, None], out=groups)


def lift(out: Floats, values: Floats) -> None:
    """`out = out + values`."""
    groups = _groups(out, values)
    np.add(groups, values[:, :, None], out=groups)


def lower(out: Floats, values: Floats) -> None:
    """`out = out - values`."""
    groups = _groups(out, values)
    np.subtract(groups, values[:, :, None], out=groups)


def _groups(out: Floats, values: Floats) -> Floats:
    return out.reshape(len(out), values.shape[1], -1)
