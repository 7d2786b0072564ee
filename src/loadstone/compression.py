"""What is planned for weights that are compressed in memory: figures only, for plans that know no numpy."""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec

from loadstone.units import round_up

# What is planned for a byte; what takes more is better not kept so.
SHARE = 0.722
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
