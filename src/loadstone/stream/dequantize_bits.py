"""What the decoders of GGUF blocks share: fields cut out of blocks, bit fields spread into bytes, floats scaled.

numpy's inner loops are fast and their starts are not: a loop over 32 bytes costs as much as one over 500. So bits are
shifted and masked over whole fields, and what must be put elsewhere is moved as items of 8 to 64 bytes, in one loop for
all blocks. numpy releases the GIL in all of it; few calls on many blocks keep threads from waiting for each other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
# Decodes blocks (num_blocks, block_nbytes) into floats (num_blocks, block_numel).
Kernel = Callable[[Bytes, Floats], None]

# The floats decoded at once, 2 MB of them. Smaller strips make calls so short that threads spend their time handing
# each other the GIL, which costs more than leaving the second-level cache.
STRIP_NUMEL = 524288


def half(blocks: Bytes, offset: int) -> Floats:
    """The float16 at byte `offset` of every block of an even size, as a column of float32."""
    return blocks.view("<f2")[:, offset // 2, None].astype(np.float32)


def field(blocks: Bytes, offset: int, nbytes: int) -> Bytes:
    """`nbytes` of every block from `offset` on, made contiguous."""
    item = f"V{nbytes}"
    packed = np.empty((len(blocks), nbytes), np.uint8)
    packed.view(item)[:, 0] = blocks[:, offset : offset + nbytes].view(item)[:, 0]
    return packed


def spread(packed: Bytes, shifts: tuple[int, ...], mask: int, item: int) -> Bytes:
    """The bit fields of bytes, one to a byte.

    Args:
        packed: fields of the blocks of one strip, (num_blocks, nbytes).
        shifts: how far to the right each bit field is shifted.
        mask: what is left of each byte; it drops the bits that a shift of whole words has moved across bytes.
        item: every run of so many bytes, a multiple of 8, becomes one such run for each shift.

    Returns:
        (num_blocks, nbytes * len(shifts))
    """
    index, amounts = _moves(shifts, item)
    runs = packed.reshape(-1).view(f"V{item}")
    words = np.take(runs, index[: runs.size * len(shifts)]).view(np.uint64)
    np.right_shift(words, amounts[: words.size], out=words)
    np.bitwise_and(words, np.uint64(mask * 0x0101010101010101), out=words)
    return words.view(np.uint8).reshape(len(packed), -1)


def spread_high(packed: Bytes, shifts: tuple[int, ...], mask: int, item: int) -> Bytes:
    """The bit fields of bytes, one to a byte, where they are wanted: above four low bits.

    Args:
        packed: fields of the blocks of one strip, (num_blocks, nbytes).
        shifts: where in the low half of a byte its bit fields begin; they do the same in the high half.
        mask: what is left of each byte.
        item: every run of so many bytes becomes one such run for each bit field.

    Returns:
        (num_blocks, nbytes * 2 * len(shifts))
    """
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
    """`low | high << shift`, in place in `low`; `high` is spoilt."""
    whole, moved = low.view(np.uint64), high.view(np.uint64)
    if shift:
        np.left_shift(moved, np.uint64(shift), out=moved)
    np.bitwise_or(whole, moved, out=whole)
    return low


def centre(quants: Bytes, zero: int) -> NDArray[np.int8]:
    """`quants - zero`, in place."""
    signed = quants.view(np.int8)
    np.subtract(signed, np.int8(zero), out=signed)
    return signed


def nibbles(packed: Bytes) -> Bytes:
    """The low and the high half of each byte, side by side."""
    out = np.empty((*packed.shape, 2), np.uint8)
    np.bitwise_and(packed, np.uint8(15), out=out[..., 0])
    np.right_shift(packed, np.uint8(4), out=out[..., 1])
    return out.reshape(len(packed), -1)


def scale(quants: NDArray[Any], out: Floats, factor: Floats) -> None:
    """`out = factor * quants`, where factor has a value for each group of a block."""
    np.copyto(out, quants)
    scale_in_place(out, factor)


def scale_in_place(out: Floats, factor: Floats) -> None:
    """`out = factor * out`, likewise."""
    groups = out.reshape(len(out), factor.shape[1], -1)
    np.multiply(groups, factor[:, :, None], out=groups)


def lower(out: Floats, minimum: Floats) -> None:
    """`out = out - minimum`, where minimum has a value for each group of a block."""
    groups = out.reshape(len(out), minimum.shape[1], -1)
    np.subtract(groups, minimum[:, :, None], out=groups)
