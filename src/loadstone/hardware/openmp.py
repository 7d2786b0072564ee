"""The threads that compute together: how many, and how they wait for each other."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from loadstone.hardware.memory import num_bound_cores, num_cores

_THREADS = "OMP_NUM_THREADS"
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


def num_threads() -> int:
    """The threads that torch multiplies matrices with: one for each core, whatever time a group gives the process.

    Fewer where the user has said so; more than there are cores it does not make.
    """
    wanted = os.environ.get(_THREADS, "").split(",")[0].strip()
    return min(num_bound_cores(), int(wanted)) if wanted.isdecimal() and int(wanted) else num_bound_cores()


def fit_threads_to_cores() -> None:
    """Have this process, and those that it starts, compute with no more threads than it is given time for.

    Threads that take turns on a core wait for each other: with two for the time of one core a token took 1.4 times as
    long. For a process of our own, before torch is imported; whatever the user has said stays.
    """
    if "torch" not in sys.modules and not os.environ.get(_THREADS) and num_cores() < num_bound_cores():
        os.environ[_THREADS] = str(num_cores())
