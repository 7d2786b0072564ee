"""Weights compressed in memory without loss, and what is planned for them.

Of the 16 bits of a bfloat16 some 12 say something: weights of a matrix are alike in size, so upper bits of their
exponents are nearly always the same. Sorted by bits, the same bit of many numbers side by side, LZ4 makes 0.74 to 0.76
of them, and gives them back faster than most disks could. Both are done by Blosc, https://www.blosc.org.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from loadstone.units import round_up

if TYPE_CHECKING:  # plans know what is planned for it, and no numpy
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

# What is planned for a byte; what takes more is better not kept so.
SHARE = 0.765
# Blosc takes blocks twice as large as it is told, and hardly compresses one that is not full.
GRAIN_BYTES = 64 << 10
_PAGE_BYTES = 4096


@cache
def can_compress() -> bool:
    """Whether there is what compresses."""
    return find_spec("numcodecs") is not None


def kept_bytes(nbytes: int) -> int:
    """The memory that is planned for bytes that are kept compressed, whole pages."""
    return round_up(math.ceil(nbytes * SHARE), _PAGE_BYTES)


def whole_grains(nbytes: int) -> int:
    """What of so many bytes can be kept compressed."""
    return max(0, nbytes) // GRAIN_BYTES * GRAIN_BYTES


def compress(data: Bytes) -> bytes:
    """Bytes of 16-bit numbers, compressed without loss."""
    blosc = _blosc()
    compressed: bytes = blosc.compress(data.view("uint16"), b"lz4", 1, blosc.BITSHUFFLE, GRAIN_BYTES // 2)
    return compressed


def expand(compressed: bytes | bytearray | Bytes, destination: Bytes) -> None:
    """What was compressed, as it was.

    Args:
        compressed: what `compress` returned.
        destination: as many bytes as went in.
    """
    _blosc().decompress(compressed, destination)


@cache
def _blosc() -> Any:
    # Imported when it is first used, which takes 0.1 s. It makes threads of its own in the main thread only.
    from numcodecs import blosc

    return blosc
