"""What fills the slots of a streamed model, whatever the way there: all that residency asks for.

A filler knows units by name. Fillers are composed: one that sends on to a device has another one fill what it sends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch

from loadstone.architecture.keymap import Target
from loadstone.dtypes import DTYPES, nbytes_of
from loadstone.stream.read import Reader
from loadstone.stream.refill import Place

# Where parameters begin in memory that is laid out here: what torch's allocators on devices keep to.
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the parameters of a unit lie in memory.

    Attributes:
        places: of the parameters.
        nbytes: how much memory it takes to fill them.
        front_bytes: the first of them, where these stay in memory of the unit's own.
        compressed_bytes: the memory of what stays compressed.
    """

    places: tuple[Place, ...]
    nbytes: int
    front_bytes: int = 0
    compressed_bytes: int = 0

    @property
    def slot_bytes(self) -> int:
        """How large a slot must be for what comes and goes of the unit."""
        return self.nbytes - self.front_bytes

    @property
    def kept_bytes(self) -> int:
        """The memory of what stays of the unit while it comes and goes."""
        return self.front_bytes + self.compressed_bytes

    @property
    def end(self) -> int:
        """Where the last parameter ends."""
        return max(place.begin + _nbytes(place) for place in self.places)

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The parameters in memory that is laid out so; normal tensors also where they are made in inference mode."""
        with torch.inference_mode(False):
            return [_view(memory, place) for place in self.places]

    def tensors(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same by fqn."""
        return {place.fqn: view for place, view in zip(self.places, self.views(memory), strict=True)}


class Filling(Protocol):
    """A unit on its way into a slot."""

    @property
    def total_bytes(self) -> int:
        """What travels."""

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to wait for."""

    def wait(self) -> None:
        """Return when `Filler.attend` may be called.

        Raises:
            LoadstoneError: it cannot be read.
        """

    def cancel(self) -> None:
        """Give it up; when this returns, the slot may be filled anew."""


Known = Callable[[Filling], None]


def unknown(_: Filling) -> None:
    """Nobody wants to know."""


class Filler(Protocol):
    """Fills slots with units; close it.

    Attributes:
        on_host: the slots are memory that the host computes with.
    """

    on_host: bool

    def knows(self, unit: str) -> bool:
        """Whether it can fill memory with a unit."""

    def layout(self, unit: str) -> Layout:
        """How a unit lies in memory, and how large a slot must be."""

    def moved_bytes(self, unit: str) -> int:
        """What travels to fill it."""

    def slot(self, nbytes: int) -> torch.Tensor:
        """A new slot, shape (nbytes,), uint8, where the model computes."""

    def memory(self, nbytes: int) -> torch.Tensor:
        """The same for a unit that is to stay, all of which goes there."""

    def fill(self, unit: str, slot: torch.Tensor, *, priority: int = 0, known: Known = unknown) -> Filling:
        """Begin to fill a slot, which nobody must use meanwhile.

        Args:
            unit: what fills it.
            slot: the memory.
            priority: lower numbers come first.
            known: told of what is to be waited for, or cancelled, before anything of it runs that can be cancelled.
        """

    def attend(self, slot: torch.Tensor) -> None:
        """What this thread computes from now on waits for what fills the slot."""

    def seen(self, unit: str, slot: torch.Tensor) -> torch.Tensor:
        """The memory that a unit lies in as its layout says, once it has arrived in a slot, until that is released."""

    def release(self, slot: torch.Tensor) -> None:
        """What this thread was asked to compute until now must be over before the slot is filled anew."""

    def forget(self, slot: torch.Tensor) -> None:
        """Nothing is sent into a slot any more; what was sent has arrived when this returns."""

    def check(self, unit: str) -> None:
        """Check that what a unit was filled from is what it was when the model was loaded.

        Raises:
            UnreadableFile: a file is gone.
            FileChanged: one was replaced, cut short or written to.
        """

    def check_all(self) -> None:
        """Check the same for all units, and for what else was loaded from the files.

        Raises:
            UnreadableFile: a file is gone.
            FileChanged: one was replaced, cut short or written to.
        """

    def readers(self) -> tuple[Reader, ...]:
        """What reads files for it; none where all of it comes from memory."""

    def bring_kept(self) -> None:
        """Read what stays of units, where that is neither there nor on its way; without this it comes with its unit.

        Raises:
            LoadstoneError: it cannot be read, or its file is not the one whose header was read.
        """

    def fill_whole(self) -> None:
        """Have every unit whole in its slot from now on; there must be no slot."""

    def rest(self, *, leaves_memory: bool = False) -> None:
        """End threads, close files, give back what is only needed on the way, until something is filled again.

        Args:
            leaves_memory: give back what is at home in memory too, if it can be read again.
        """

    def close(self) -> None:
        """The same for good."""


def laid_out(targets: Mapping[str, Target]) -> Layout:
    """Parameters side by side, in their order.

    Args:
        targets: shape and dtype by fqn.
    """
    places: list[Place] = []
    end = 0
    for fqn, target in targets.items():
        begin = -(-end // _ALIGNMENT) * _ALIGNMENT
        places.append(Place(fqn=fqn, target=target, begin=begin))
        end = begin + nbytes_of(DTYPES[target.dtype], prod(target.shape))
    return Layout(places=tuple(places), nbytes=end)


def arriving(layout: Layout, targets: Sequence[Target]) -> Layout:
    """How a unit lies in its slot: as on the way, where nothing is cast, so that it is sent in one piece."""
    if [place.target for place in layout.places] == list(targets):
        return Layout(places=layout.places, nbytes=layout.end)
    return laid_out({place.fqn: target for place, target in zip(layout.places, targets, strict=True)})


def _nbytes(place: Place) -> int:
    return nbytes_of(DTYPES[place.target.dtype], prod(place.target.shape))


def _view(memory: torch.Tensor, place: Place) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, place.target.dtype)
    return memory[place.begin : place.begin + _nbytes(place)].view(dtype).view(place.target.shape)


def slot_sizes(filler: Filler, units: Iterable[str], count: int) -> list[int]:
    """How large each of `count` slots must be, so that any `count` different units find room at once."""
    return sorted((filler.layout(unit).slot_bytes for unit in units), reverse=True)[:count]
