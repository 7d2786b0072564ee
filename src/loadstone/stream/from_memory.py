"""Units that live in memory: on the host, locked where a device fetches from it, or beside where they are computed.

What is kept at home may be narrower than what is computed with. The stored bytes travel, and are cast where they
arrive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loadstone.stream.destination import AtDestination, Destination
from loadstone.stream.filler import Filling, Known, Layout, unknown
from loadstone.stream.read import Reader
from loadstone.stream.refill import Place
from loadstone.stream.transfer import Moved
from loadstone.stream.workers import Job, Workers

# One copies while the other finds out what is next; more take the memory's bandwidth from what computes.
_NUM_THREADS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """A unit's master copy. It is only ever read.

    Attributes:
        tensors: its parameters by fqn, contiguous.
        whole: the memory they all lie in, where that is so.
        places: how they lie there.
    """

    tensors: Mapping[str, torch.Tensor]
    whole: torch.Tensor | None = None
    places: tuple[Place, ...] = ()

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def packed(tensors: Mapping[str, torch.Tensor], layout: Layout, memory: torch.Tensor) -> Home:
    """Copy parameters into memory of their own.

    Args:
        tensors: by fqn.
        layout: how they are to lie there, and in which dtypes.
        memory: shape (layout.nbytes,), uint8.
    """
    views = {place.fqn: view for place, view in zip(layout.places, layout.views(memory), strict=True)}
    with torch.no_grad():
        for fqn, view in views.items():
            view.copy_(tensors[fqn])
    return Home(tensors=views, whole=memory, places=layout.places)


class FromMemory(AtDestination):
    """Memory -> the device, or another place on the host.

    Args:
        homes: by unit; units may come and go.
        layouts: how each unit lies in a slot, and in which dtypes; may grow.
        destination: where the slots are; closed by whoever made it.
    """

    def __init__(self, homes: Mapping[str, Home], layouts: Mapping[str, Layout], destination: Destination) -> None:
        super().__init__(destination)
        self._homes = homes
        self._layouts = layouts
        self._workers = Workers(_NUM_THREADS, "loadstone-copy")

    def knows(self, unit: str) -> bool:
        """Whether it has a home."""
        return unit in self._homes

    def layout(self, unit: str) -> Layout:
        """How a unit lies in a slot."""
        return self._layouts[unit]

    def moved_bytes(self, unit: str) -> int:
        """What is kept of it."""
        return self._homes[unit].nbytes

    def fill(self, unit: str, slot: torch.Tensor, *, priority: int = 0, known: Known = unknown) -> Filling:
        """Begin to copy a unit: by the device itself, or by a thread of the host."""
        home, layout = self._homes[unit], self._layouts[unit]
        if self._destination.is_late:
            sent = Sent(home.nbytes, self._destination.send(slot, lambda: move(home, layout, slot, late=True)))
            known(sent)
            return sent
        job = Job(home.nbytes, lambda _: move(home, layout, slot, late=False))
        known(job)
        return self._workers.begin(job, priority=priority)

    def check(self, unit: str) -> None:
        """Memory is nobody else's."""

    def check_all(self) -> None:
        """Memory is nobody else's."""

    def readers(self) -> tuple[Reader, ...]:
        """No file is read."""
        return ()

    def rest(self) -> None:
        """End the threads; what is at home stays there."""
        self._workers.close()

    def close(self) -> None:
        """The same."""
        self.rest()


class Sent:
    """A unit that the device fetches."""

    def __init__(self, total_bytes: int, moved: Moved) -> None:
        self.total_bytes = total_bytes
        self._moved = moved

    @property
    def is_over(self) -> bool:
        """Whether it has arrived."""
        return self._moved.is_over()

    def wait(self) -> None:
        """The device waits, when it must."""

    def cancel(self) -> None:
        """It comes all the same, before what is sent after it."""


def move(home: Home, layout: Layout, slot: torch.Tensor, *, late: bool) -> None:
    """Copy a unit into a slot, in one piece where it lies there as at home, and cast where dtypes differ.

    Args:
        home: the unit.
        layout: how it lies in the slot.
        slot: where it goes.
        late: the device may do it when this has returned.
    """
    with torch.no_grad():
        if home.whole is not None and home.places == layout.places:
            slot[: layout.end].copy_(home.whole[: layout.end], non_blocking=late)
            return
        for place, view in zip(layout.places, layout.views(slot), strict=True):
            tensor = home.tensors[place.fqn]
            # As stored over the link, then cast over there.
            near = tensor if tensor.dtype == view.dtype else tensor.to(view.device, non_blocking=late)
            view.copy_(near, non_blocking=late)
