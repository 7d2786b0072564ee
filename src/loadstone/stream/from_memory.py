"""Units that live in memory: on the host, locked where a device fetches from it, or beside where they are computed.

What is kept at home may be narrower than what is computed with. The stored bytes travel, and are cast, or decoded,
where they arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from loadstone.hardware.pages import anonymous
from loadstone.stream.destination import AtDestination, Destination
from loadstone.stream.expand import expand
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
        is_near: that memory is of the device that computes.
    """

    tensors: Mapping[str, torch.Tensor]
    whole: torch.Tensor | None = None
    places: tuple[Place, ...] = ()
    is_near: bool = False

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def nbytes_with_gaps(self) -> int:
        """What the memory takes that they all lie in."""
        return self.nbytes if self.whole is None else self.whole.numel()


def packed(tensors: Mapping[str, torch.Tensor], layout: Layout, memory: torch.Tensor, *, is_near: bool = False) -> Home:
    """Copy parameters into memory of their own.

    Args:
        tensors: by fqn.
        layout: how they are to lie there, and in which dtypes.
        memory: shape (layout.nbytes,), uint8.
        is_near: it is of the device that computes.
    """
    views = layout.tensors(memory)
    with torch.no_grad():
        for fqn, view in views.items():
            view.copy_(tensors[fqn])
    return Home(tensors=views, whole=memory, places=layout.places, is_near=is_near)


Rehomed = Callable[[str, torch.Tensor], None]


def unnoticed(_fqn: str, _tensor: torch.Tensor) -> None:
    """Nobody else holds what is at home."""


class FromMemory(AtDestination):
    """Memory -> the device, or another place on the host.

    Args:
        homes: by unit; units may come and go.
        layouts: how each unit lies in a slot, and in which dtypes; may grow.
        destination: where the slots are; closed by whoever made it.
        moved: is told of each parameter whose master copy went elsewhere, with its new tensor.
        again: makes a unit's home anew; None where it is the only copy.
    """

    def __init__(
        self,
        homes: dict[str, Home],
        layouts: Mapping[str, Layout],
        destination: Destination,
        moved: Rehomed = unnoticed,
        again: Callable[[str], Home] | None = None,
    ) -> None:
        super().__init__(destination)
        self._homes = homes
        self._layouts = layouts
        self._moved = moved
        self._again = again
        self._off_device: set[str] = set()
        self._left_bytes: dict[str, int] = {}
        self._workers = Workers(_NUM_THREADS, "loadstone-copy")

    def add(self, homes: Mapping[str, Home], layouts: Mapping[str, Layout]) -> None:
        """Know more units; those that left memory, if any, are still away.

        Args:
            homes: by unit.
            layouts: how each of them lies in a slot.
        """
        self._homes |= homes
        self._layouts = {**self._layouts, **layouts}

    def knows(self, unit: str) -> bool:
        """Whether it has a home, or can have it again."""
        return unit in self._homes or unit in self._left_bytes

    def layout(self, unit: str) -> Layout:
        """How a unit lies in a slot."""
        return self._layouts[unit]

    def moved_bytes(self, unit: str) -> int:
        """What is kept of it."""
        return self._left_bytes[unit] if unit in self._left_bytes else self._homes[unit].nbytes

    def fill(self, unit: str, slot: torch.Tensor, *, priority: int = 0, known: Known = unknown) -> Filling:
        """Begin to copy a unit: by the device itself, or by a thread of the host."""
        if unit in self._left_bytes or unit in self._off_device:
            self._come_home()
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

    def rest(self, *, leaves_memory: bool = False) -> None:
        """End the threads; what is kept near leaves the device, or, with what else can be made anew, memory.

        All of it comes home when the first of it is wanted.
        """
        self._workers.close()
        if leaves_memory and self._again is not None:
            for unit, home in self._homes.items():
                self._left_bytes[unit] = home.nbytes
                if home.whole is not None and not home.is_near:
                    self._destination.link.unlock(home.whole.numpy())
            self._homes.clear()
            self._off_device.clear()
        elif not self._destination.is_host:
            for unit in [unit for unit, home in self._homes.items() if home.is_near]:
                self._move_home(unit, torch.from_numpy(anonymous(self._homes[unit].nbytes_with_gaps)), is_near=False)
                self._off_device.add(unit)

    def close(self) -> None:
        """End the threads."""
        self._workers.close()

    def _come_home(self) -> None:
        """Have every unit that left where it was before."""
        if (again := self._again) is not None:
            for unit in list(self._left_bytes):
                self._homes[unit] = again(unit)
                del self._left_bytes[unit]
        for unit in list(self._off_device):
            self._move_home(unit, self._destination.slot(self._homes[unit].nbytes_with_gaps), is_near=True)
            self._off_device.remove(unit)
        self._destination.link.fork()  # they are there before anything is sent from them

    def _move_home(self, unit: str, memory: torch.Tensor, *, is_near: bool) -> None:
        home = self._homes[unit]
        layout = Layout(places=home.places, nbytes=home.nbytes_with_gaps)
        self._homes[unit] = packed(home.tensors, layout, memory, is_near=is_near)
        for fqn, tensor in self._homes[unit].tensors.items():
            self._moved(fqn, tensor)


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
    """Copy a unit into a slot, in one piece where it lies there as at home; cast, decode or put in order what is not.

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
        stored = {place.fqn: place.stored for place in home.places}
        for place, view in zip(layout.places, layout.views(slot), strict=True):
            tensor, form = home.tensors[place.fqn], stored.get(place.fqn)
            if form is not None:
                expand(form, tensor, view, late=late)
                continue
            # As stored over the link, then cast over there.
            near = tensor if tensor.dtype == view.dtype else tensor.to(view.device, non_blocking=late)
            view.copy_(near, non_blocking=late)
