"""What the decoders of GGUF blocks ask of whoever computes: numpy's arrays on the host, or torch's tensors anywhere.

A format is written down once, as a kernel that is given such operations, blocks `(num_blocks, block_nbytes)` of bytes
and the float32 `(num_blocks, block_numel)` to fill. Words are unsigned and as wide as they need be; bytes are added and
multiplied modulo 256.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

# Of numpy or of torch, all of one call of the same.
Array = Any


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Numbers that are always the same, so that each device may keep them; told from others by identity.

    Attributes:
        entries: contiguous; of a table of two dimensions, rows of four or eight bytes.
    """

    entries: NDArray[Any]


class Ops(Protocol):
    """Operations on the blocks of one strip; what they give may be spoilt by the next."""

    def half(self, blocks: Array, offset: int) -> Array:
        """The float16 at byte `offset` of every block, as a column of float32."""

    def field(self, blocks: Array, offset: int, nbytes: int) -> Array:
        """`nbytes` of every block from `offset` on, as new contiguous bytes."""

    def words(self, packed: Array, nbytes: int) -> Array:
        """Every 2 or 4 bytes as one unsigned number, the lowest byte first: (num_blocks, numbers)."""

    def bytes_of(self, words: Sequence[Array]) -> Array:
        """Numbers of 4 bytes, a column each, as their bytes: (num_blocks, 4 * len(words))."""

    def as_half(self, words: Array) -> Array:
        """Numbers of 2 bytes, taken for float16, as float32."""

    def floats(self, values: Array) -> Array:
        """Numbers as float32."""

    def signed(self, values: Array) -> Array:
        """The same bytes, from -128 to 127."""

    def wide(self, values: Array) -> Array:
        """Bytes as numbers of 16 bits at least."""

    def stack(self, values: Sequence[Array]) -> Array:
        """Side by side in a last dimension of their own."""

    def join(self, values: Sequence[Array]) -> Array:
        """Behind each other in the last dimension."""

    def digits(self, packed: Array, width: int) -> Array:
        """Every `width` bits of each byte, the lowest first, a byte each: (num_blocks, 8 / width * nbytes)."""

    def repeat(self, values: Array) -> Array:
        """Every byte sixteen times."""

    def spread(self, packed: Array, shifts: tuple[int, ...], mask: int, item: int) -> Array:
        """The bit fields of bytes, one to a byte.

        Args:
            packed: fields of the blocks, (num_blocks, nbytes).
            shifts: how far to the right each bit field is shifted.
            mask: what is left of each byte.
            item: every run of so many bytes, a multiple of 8, becomes one such run for each shift.

        Returns:
            (num_blocks, nbytes * len(shifts))
        """

    def spread_high(self, packed: Array, shifts: tuple[int, ...], mask: int, item: int) -> Array:
        """The bit fields of bytes, one to a byte, where they are wanted: above four low bits.

        Args:
            packed: fields of the blocks, (num_blocks, nbytes).
            shifts: where in the low half of a byte its bit fields begin; they do the same in the high half.
            mask: what is left of each byte.
            item: every run of so many bytes becomes one such run for each bit field.

        Returns:
            (num_blocks, nbytes * 2 * len(shifts))
        """

    def merge(self, low: Array, high: Array, shift: int = 0) -> Array:
        """`low | high << shift` of bytes, in place in `low`; `high` is spoilt."""

    def centre(self, quants: Array, zero: int) -> Array:
        """`quants - zero` of bytes, signed, in place."""

    def take(self, table: Table, index: Array) -> Array:
        """The entries of a table that is always the same: (*index.shape, *table.shape[1:])."""

    def look_up(self, codes: Array, values: Sequence[int], out: Array) -> None:
        """`out = values[codes]` of codes from 0 to 15."""

    def scale(self, quants: Array, out: Array, factor: Array) -> None:
        """`out = factor * quants`, where factor has a value for each group of a block."""

    def scale_in_place(self, out: Array, factor: Array) -> None:
        """`out = factor * out`, likewise."""

    def lift(self, out: Array, values: Array) -> None:
        """`out = out + values`, likewise."""

    def lower(self, out: Array, values: Array) -> None:
        """`out = out - values`, likewise."""


# Decodes blocks (num_blocks, block_nbytes) into floats (num_blocks, block_numel).
Kernel = Callable[[Ops, Array, Array], None]
