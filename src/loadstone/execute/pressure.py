"""When memory is short: told by a thread that looks at it twice a second, acted upon between the units of a forward."""

from __future__ import annotations

import errno
import logging
import re
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from loadstone.errors import LoadstoneError
from loadstone.hardware.memory import host_memory
from loadstone.plan.budget import HOST_MARGIN_SHARE
from loadstone.units import format_bytes

logger = logging.getLogger("loadstone.execute")

PERIOD_S = 0.5
# So many times in a row must memory be free before units come back.
_PATIENCE = 10
# The least margin that is worth a unit.
_LEAST_MARGIN_BYTES = 32_000_000
# What torch says on its devices. Source: c10/core/impl/alloc_cpu.cpp, c10/cuda/CUDACachingAllocator.cpp of pytorch
_OUT_OF_MEMORY = re.compile(r"not enough memory|can't allocate memory|out of memory|Unable to allocate", re.IGNORECASE)
_ASKED_FOR = re.compile(r"allocate (\d+) bytes")


class Pressed(Protocol):
    """Who gives memory back."""

    def ask(self, nbytes: int) -> None:
        """Give back so many bytes when it can be done, or take so many again where they are less than 0."""

    def given_back(self) -> tuple[int, int]:
        """The bytes of the units that went for want of memory, and of the smallest of them."""


@dataclass(slots=True, kw_only=True)
class Shortage:
    """What went for want of memory.

    Attributes:
        asked_bytes: to give back next, or to take again where less than 0.
        units: those that went.
        given_back_bytes: of all that ever went.
    """

    asked_bytes: int = 0
    units: set[str] = field(default_factory=set)
    given_back_bytes: int = 0

    def note(self, names: list[str], nbytes: int) -> None:
        """Note that units went, and say so the first time."""
        self.units |= set(names)
        if not self.given_back_bytes and nbytes:
            logger.warning(
                "memory is short: gives back %s of weights, which are read from their files in each pass until memory "
                "is free again; end other processes, or load with a smaller max_memory=, if this is too slow",
                format_bytes(nbytes),
            )
        self.given_back_bytes += nbytes


@dataclass(slots=True, kw_only=True)
class Judgement:
    """Decides, look by look, whether units go or come back.

    Attributes:
        margin_bytes: of free memory that must be left.
        num_free: looks in a row that found enough for a unit to come back.
    """

    margin_bytes: int
    num_free: int = 0

    def judge(self, free_bytes: int, given_back_bytes: int, smallest_bytes: int) -> int:
        """What to ask for.

        Args:
            free_bytes: free memory now.
            given_back_bytes: of the units that went.
            smallest_bytes: of the smallest of them.

        Returns:
            The bytes to give back; less than 0, to take again; 0 for neither.
        """
        if free_bytes < self.margin_bytes:
            self.num_free = 0
            return self.margin_bytes - free_bytes
        # Twice the margin: a unit that comes back must not be the next one to go.
        spare = free_bytes - 2 * self.margin_bytes
        self.num_free = self.num_free + 1 if given_back_bytes and spare >= smallest_bytes else 0
        if self.num_free < _PATIENCE:
            return 0
        self.num_free = 0
        return -min(spare, given_back_bytes)


class Watch:
    """The thread that looks; it lives as long as there is something to watch for.

    Args:
        pressed: gives memory back; not kept alive by this.

    Attributes:
        needed_bytes: of what is free at the start, what a run will use: caches, activations, slots.
        margin_bytes: of free memory that must be left; None lets it follow from what is free beside that.
        look: tells free memory in bytes.
    """

    def __init__(self, pressed: Pressed) -> None:
        self.needed_bytes = 0
        self.margin_bytes: int | None = None
        self.look: Callable[[], int] = lambda: host_memory()[1]
        self._pressed = weakref.ref(pressed)
        self._over: threading.Event | None = None

    def start(self) -> None:
        """Look from now on, if that is not so already."""
        if self._over is not None:
            return
        if self.margin_bytes is None:
            total, free = host_memory()
            self.margin_bytes = margin_for(total, max(0, free - self.needed_bytes))
        self._over = threading.Event()
        judgement = Judgement(margin_bytes=self.margin_bytes)
        threading.Thread(
            target=_work,
            args=(self._pressed, weakref.ref(self), judgement, self._over),
            name="loadstone-pressure",
            daemon=True,
        ).start()

    def stop(self) -> None:
        """Look no longer."""
        if self._over is not None:
            self._over.set()
            self._over = None


def margin_for(total_bytes: int, free_bytes: int) -> int:
    """How much memory must be left, where so much would be free if everything went as foreseen."""
    share = int(HOST_MARGIN_SHARE * total_bytes)
    return max(min(share, free_bytes // 2), min(_LEAST_MARGIN_BYTES, share))


def _work(
    pressed: weakref.ref[Pressed], watch: weakref.ref[Watch], judgement: Judgement, over: threading.Event
) -> None:
    told = False
    while not over.wait(PERIOD_S):
        watched = watch()
        if watched is None:
            return
        free_bytes = watched.look()
        del watched
        found = pressed()
        if found is None:
            return
        asked = judgement.judge(free_bytes, *found.given_back())
        try:
            if asked and not over.is_set():
                found.ask(asked)
        except LoadstoneError as error:  # the units stay where they are, and the next forward meets the same fault
            if not told:
                logger.warning("weights cannot come back to memory: %s", error)
            told = True
        del found


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory is used up."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))
    )


def asked_for_bytes(error: BaseException) -> int:
    """How much was asked for when memory was used up; 0 where the error does not say."""
    found = _ASKED_FOR.search(str(error))
    return int(found[1]) if found is not None else 0
