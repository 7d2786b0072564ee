"""Casts between the dtypes of checkpoints on plain bytes: numpy only, so that they can run while torch is imported.

A kernel reads contiguous source bytes and writes contiguous destination bytes; numpy releases the GIL meanwhile. Every
kernel gives the same bits as torch's own cast, which a test checks for every 16-bit value.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadstone.dtypes import DTYPES
from loadstone.stream.float8 import FLOAT8_VALUES

Bytes = NDArray[np.uint8]
Kernel = Callable[[Bytes, Bytes], None]


def copy(source: Bytes, destination: Bytes) -> None:
    """Move bytes as they are."""
    destination[:] = source


def bfloat16_to_float32(source: Bytes, destination: Bytes) -> None:
    """A bfloat16 is the upper half of a float32; one shift is three times as fast as writing two halves."""
    np.left_shift(
        source.view(np.uint16), np.uint32(16), out=destination.view(np.uint32), dtype=np.uint32, casting="unsafe"
    )


def bfloat16_to_fresh_float32(source: Bytes, destination: Bytes) -> None:
    """The same into memory that is known to be zero: the lower halves need no writing."""
    destination.view(np.uint16)[1::2] = source.view(np.uint16)


def float32_to_bfloat16(source: Bytes, destination: Bytes) -> None:
    """Round to nearest, ties to even; every NaN becomes 0x7FC0, as in torch (c10/util/BFloat16.h)."""
    bits = source.view(np.uint32)
    out = destination.view(np.uint16)
    scratch = np.empty(min(_STRIP, bits.size), np.uint32)
    # In strips that stay in the cache.
    for start in range(0, bits.size, _STRIP):
        strip = bits[start : start + _STRIP]
        rounded = scratch[: strip.size]
        np.right_shift(strip, np.uint32(16), out=rounded)
        np.bitwise_and(rounded, np.uint32(1), out=rounded)
        np.add(rounded, strip, out=rounded)
        np.add(rounded, np.uint32(0x7FFF), out=rounded)
        np.right_shift(rounded, np.uint32(16), out=rounded)
        out[start : start + _STRIP] = rounded
        # A NaN is the largest of what it is among.
        if np.isnan(strip.view(np.float32).max()):
            out[start : start + _STRIP][np.isnan(strip.view(np.float32))] = 0x7FC0


_STRIP = 1 << 15


def _between(source_dtype: Any, destination_dtype: Any) -> Kernel:
    def cast(source: Bytes, destination: Bytes) -> None:
        with np.errstate(all="ignore"):
            np.copyto(destination.view(destination_dtype), source.view(source_dtype), casting="unsafe")

    return cast


class _Middle(threading.local):
    """Memory of each thread for what lies between two kernels; it stays, so that its pages are found only once."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> Bytes:
        """`nbytes` that the next call gives away again."""
        if self._buffer.size < nbytes:
            self._buffer = np.empty(nbytes, np.uint8)
        return self._buffer[:nbytes]


_middle = _Middle()
# Stays in a large second-level cache.
_MIDDLE_BYTES = 1 << 20


def through(first: Kernel, second: Kernel, *, source: int, middle: int, destination: int) -> Kernel:
    """One kernel after the other, in strips.

    Args:
        first: applied to the source; it may not use the memory of `through` itself.
        second: applied to what `first` has made.
        source: the bytes of one element, or of one block.
        middle: what `first` makes of it.
        destination: what `second` makes of that.
    """
    step = max(1, _MIDDLE_BYTES // middle)

    def run(stored: Bytes, wanted: Bytes) -> None:
        count = stored.size // source
        for begin in range(0, count, step):
            end = min(begin + step, count)
            between = _middle.take((end - begin) * middle)
            first(stored[begin * source : end * source], between)
            second(between, wanted[begin * destination : end * destination])

    return run


def _from_float8(name: str, destination_dtype: str) -> Kernel:
    """Look two elements up at once."""

    @cache
    def pairs() -> NDArray[Any]:
        values = FLOAT8_VALUES[name].view(np.uint8)
        made = np.empty((256, DTYPES[destination_dtype].bits // 8), np.uint8)
        kernel_for("float32", destination_dtype)(values, made.reshape(-1))  # type: ignore[misc]
        low = np.tile(made, (256, 1))
        high = made.repeat(256, axis=0)
        return np.concatenate([low, high], axis=1).view(f"V{2 * made.shape[1]}")[:, 0]

    def cast(source: Bytes, destination: Bytes) -> None:
        table = pairs()
        even = source.size // 2
        # No index is out of bounds; other modes than "clip" are buffered.
        words = source[: 2 * even].view(np.uint16)
        np.take(table, words, out=destination[: even * table.itemsize].view(table.dtype), mode="clip")
        if source.size % 2:
            destination[even * table.itemsize :] = table[source[-1:]].view(np.uint8)[: table.itemsize // 2]

    return cast


_half_to_float = _between(np.float16, np.float32)
_float_to_half = _between(np.float32, np.float16)
_double_to_float = _between(np.float64, np.float32)

KERNELS: dict[tuple[str, str], Kernel] = {
    ("bfloat16", "float32"): bfloat16_to_float32,
    ("float16", "float32"): _half_to_float,
    ("float64", "float32"): _double_to_float,
    ("float32", "bfloat16"): float32_to_bfloat16,
    ("float32", "float16"): _float_to_half,
    ("float32", "float64"): _between(np.float32, np.float64),
    ("float16", "float64"): _between(np.float16, np.float64),
    # Where torch rounds twice, so does this.
    ("float64", "float16"): through(_double_to_float, _float_to_half, source=8, middle=4, destination=2),
    ("float64", "bfloat16"): through(_double_to_float, float32_to_bfloat16, source=8, middle=4, destination=2),
    ("float16", "bfloat16"): through(_half_to_float, float32_to_bfloat16, source=2, middle=4, destination=2),
    ("bfloat16", "float16"): through(bfloat16_to_float32, _float_to_half, source=2, middle=4, destination=2),
    ("bfloat16", "float64"): through(
        bfloat16_to_float32, _between(np.float32, np.float64), source=2, middle=4, destination=8
    ),
}
KERNELS |= {
    (name, wanted): _from_float8(name, wanted)
    for name in FLOAT8_VALUES
    for wanted in ("bfloat16", "float16", "float32", "float64")
}


def kernel_for(source: str, destination: str, *, fresh: bool = False) -> Kernel | None:
    """The kernel from one dtype to another, by torch's names.

    Args:
        source: the stored dtype.
        destination: the wanted dtype.
        fresh: the destination is known to hold zeros.

    Returns:
        None where numpy has none; torch must cast then.
    """
    if source == destination:
        return copy
    if fresh and (source, destination) == ("bfloat16", "float32"):
        return bfloat16_to_fresh_float32
    return KERNELS.get((source, destination))
