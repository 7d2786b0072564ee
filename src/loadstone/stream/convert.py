"""Casts between the dtypes of checkpoints on plain bytes: numpy only, so that they can run while torch is imported.

A kernel reads contiguous source bytes and writes contiguous destination bytes; numpy releases the GIL meanwhile. Every
kernel gives the same bits as torch's own cast, which a test checks for every 16-bit value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    # In strips that stay in the cache: the temporaries are four times the destination.
    for start in range(0, bits.size, _STRIP):
        strip = bits[start : start + _STRIP]
        rounded = strip + (((strip >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))
        out[start : start + _STRIP] = rounded >> np.uint32(16)
        nan = (strip & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        if nan.any():
            out[start : start + _STRIP][nan] = 0x7FC0


_STRIP = 1 << 15


def _between(source_dtype: Any, destination_dtype: Any) -> Kernel:
    def cast(source: Bytes, destination: Bytes) -> None:
        with np.errstate(all="ignore"):
            np.copyto(destination.view(destination_dtype), source.view(source_dtype), casting="unsafe")

    return cast


def _through_float32(first: Kernel, second: Kernel, source_bits: int) -> Kernel:
    def cast(source: Bytes, destination: Bytes) -> None:
        middle = np.empty(source.size * 32 // source_bits, np.uint8)
        first(source, middle)
        second(middle, destination)

    return cast


KERNELS: dict[tuple[str, str], Kernel] = {
    ("bfloat16", "float32"): bfloat16_to_float32,
    ("float16", "float32"): _between(np.float16, np.float32),
    ("float64", "float32"): _between(np.float64, np.float32),
    ("float32", "bfloat16"): float32_to_bfloat16,
    ("float32", "float16"): _between(np.float32, np.float16),
    ("float32", "float64"): _between(np.float32, np.float64),
    ("float16", "bfloat16"): _through_float32(_between(np.float16, np.float32), float32_to_bfloat16, 16),
    ("bfloat16", "float16"): _through_float32(bfloat16_to_float32, _between(np.float32, np.float16), 16),
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
