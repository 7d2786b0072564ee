"""How threads that compute together wait for each other: awake, or asleep so that others get the core."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_POLICY = "OMP_WAIT_POLICY"
# Whoever has set one of these knows better.
_SETTINGS = (_POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@contextmanager
def sleeping_waits(wanted: bool) -> Iterator[None]:
    """Have OpenMP's threads sleep between operations where wanted, if torch is imported within and not before.

    GNU's stay awake for milliseconds after each operation, on a core that threads which read or expand weights could
    use. OpenMP reads its environment once, when its library is loaded; it is as it was when this ends.

    Source: https://gcc.gnu.org/onlinedocs/libgomp/OMP_005fWAIT_005fPOLICY.html
    """
    if not wanted or "torch" in sys.modules or any(name in os.environ for name in _SETTINGS):
        yield
        return
    os.environ[_POLICY] = "PASSIVE"
    try:
        yield
    finally:
        os.environ.pop(_POLICY, None)
