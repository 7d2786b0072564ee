"""Importing torch and building modules make hundreds of thousands of objects and no garbage worth looking for."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.Lock()
_depth = 0
_was_enabled = False


@contextmanager
def paused_gc() -> Iterator[None]:
    """No cyclic garbage collection within; it is resumed when the last thread leaves.

    The collector's passes over ever more live objects cost 0.4 of the 3.2 seconds that the imports take.
    """
    global _depth, _was_enabled  # noqa: PLW0603 - the collector itself is global
    with _LOCK:
        if _depth == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _depth += 1
    try:
        yield
    finally:
        with _LOCK:
            _depth -= 1
            if _depth == 0 and _was_enabled:
                gc.enable()
