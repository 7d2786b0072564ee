"""Weights compressed in memory without loss.

Of the 16 bits of a bfloat16 some 11 say something: weights of a matrix are alike in size, so upper bits of their
exponents are nearly always the same. Sorted by bits, the same bit of many numbers side by side, LZ4 makes 0.71 to 0.73
of them, and gives them back faster than most disks could. Both are done by Blosc, https://www.blosc.org.

Exponents 119 and 120, 0b01110111 and 0b01111000, differ in four bits. So a number is added to all exponents first: the
one of 16 for which most of their bits are nearly always the same. Without it 0.75 is left.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadstone.compression import GRAIN_BYTES

_MANTISSA_BITS, _EXPONENTS, _SHIFTS, _SAMPLE = 7, 256, 16, 8192
# What is left of bits that are set (or not set) so often, measured.
_RARE = (0.0, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.5)
_LEFT = (0.0, 0.16, 0.24, 0.36, 0.54, 0.67, 0.86, 0.98, 1.05, 1.07)

Bytes = NDArray[np.uint8]


def compress(data: Bytes) -> bytes:
    """Bytes of 16-bit numbers, compressed without loss.

    Returns:
        What `expand` takes: the compressed bytes, and behind them what was added to the exponents.
    """
    blosc, numbers = _blosc(), data.view("uint16")
    shift = _best_shift(numbers)
    compressed: bytes = blosc.compress(numbers + _added(shift), b"lz4", 1, blosc.BITSHUFFLE, GRAIN_BYTES // 2)
    return compressed + bytes([shift])


def expand(compressed: bytes | bytearray | Bytes, destination: Bytes) -> None:
    """What was compressed, as it was.

    Args:
        compressed: what `compress` returned.
        destination: as many bytes as went in.
    """
    data, numbers = np.frombuffer(compressed, np.uint8), destination.view("uint16")
    _blosc().decompress(data[:-1], destination)
    np.subtract(numbers, _added(int(data[-1])), out=numbers)


def _added(shift: int) -> np.uint16:
    """A number added to exponents, as it is added to whole 16-bit numbers; what overflows is lost both ways."""
    return np.uint16(shift << _MANTISSA_BITS)


def _best_shift(numbers: NDArray[np.uint16]) -> int:
    """What to add to the exponents so that the least is left."""
    sample = numbers[:: max(1, numbers.size // _SAMPLE)]
    counts = np.bincount((sample >> _MANTISSA_BITS) & (_EXPONENTS - 1), minlength=_EXPONENTS)
    often = _bits_of_shifted() @ (counts / max(1, sample.size))
    return int(np.interp(np.minimum(often, 1 - often), _RARE, _LEFT).sum(axis=1).argmin())


@cache
def _bits_of_shifted() -> NDArray[np.float64]:
    """The bits of each exponent once a number is added, shape (numbers to add, bits, exponents)."""
    shifted = np.arange(_SHIFTS)[:, None, None] + np.arange(_EXPONENTS)
    return (shifted >> np.arange(8)[:, None] & 1).astype(np.float64)


@cache
def _blosc() -> Any:
    # Imported when it is first used, which takes 0.1 s. It makes threads of its own in the main thread only.
    from numcodecs import blosc

    return blosc
