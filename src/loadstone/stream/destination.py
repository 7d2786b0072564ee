"""Slots where a model computes: on the host, or on a device at the other end of a link.

A device does later what it is asked to do, in more than one stream. What is sent into a slot therefore waits, over
there, for what was computed with the slot before; and what is computed with it waits for what was sent. Nobody waits
here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from loadstone.hardware.pages import anonymous
from loadstone.stream.transfer import Link, Moved, NoLink, link_for


class Destination:
    """Where slots are, and who must wait for whom; close it.

    Args:
        device: whose memory they are in.
        link: the way there; by default the one for such a device, or none.
    """

    def __init__(self, device: torch.device, link: Link | None = None) -> None:
        self.device = device
        self.link: Link = link or link_for(device) or NoLink()
        self._lock = threading.Lock()
        self._sent: dict[int, Moved] = {}
        self._users: dict[int, Callable[[], None]] = {}

    @property
    def is_late(self) -> bool:
        """Whether what is sent arrives later than the call that sends it returns."""
        return not isinstance(self.link, NoLink)

    @property
    def is_host(self) -> bool:
        """Whether the host itself computes there."""
        return self.device.type == "cpu" and not self.is_late

    def slot(self, nbytes: int) -> torch.Tensor:
        """A new slot; a normal tensor also where it is made in inference mode."""
        with torch.inference_mode(False):
            if self.device.type == "cpu":
                return torch.from_numpy(anonymous(nbytes))
            made = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        self.release(made)  # the allocator may have had the memory from something that is computed with until now
        return made

    def send(self, slot: torch.Tensor, work: Callable[[], None]) -> Moved:
        """Have `work` fill a slot when nothing computes with it any more.

        Args:
            slot: of this destination.
            work: moves or casts tensors; called in the order of the link.

        Returns:
            The point at which it is done.
        """
        if not self.is_late:
            self.link.enqueue(work)  # by as many threads as there are
            return self.link.moved()
        with self._lock:
            if (hold := self._users.pop(slot.data_ptr(), None)) is not None:
                hold()
            self.link.enqueue(work)
            self._sent[slot.data_ptr()] = moved = self.link.moved()
        return moved

    def attend(self, slot: torch.Tensor) -> None:
        """What this thread computes from now on waits for what was sent into a slot."""
        if (moved := self._sent.get(slot.data_ptr())) is not None:
            moved.join()

    def release(self, slot: torch.Tensor) -> None:
        """What this thread was asked to compute until now comes before what is sent into the slot next."""
        if not self.is_late:
            return
        with self._lock:
            if (hold := self._users.get(slot.data_ptr())) is not None:
                hold()  # an earlier use, maybe in another stream, that nothing was sent after
            self._users[slot.data_ptr()] = self.link.computed()

    def forget(self, slot: torch.Tensor) -> None:
        """Nothing is sent into a slot any more: what was sent has arrived when this returns."""
        with self._lock:
            self._users.pop(slot.data_ptr(), None)
            moved = self._sent.pop(slot.data_ptr(), None)
        if moved is not None:
            moved.wait()

    def rest(self) -> None:
        """Let the device have the memory back that torch keeps for later."""
        if self.device.type != "cpu":
            empty = getattr(torch.get_device_module(self.device), "empty_cache", None)
            if empty is not None:
                empty()

    def close(self) -> None:
        """Wait for the device, and give locked memory back."""
        self.link.close()


class AtDestination:
    """The part of a filler that the destination of what it fills answers.

    Args:
        destination: where the slots are; closed by whoever made it.

    Attributes:
        on_host: the slots are memory that the host computes with.
    """

    def __init__(self, destination: Destination) -> None:
        self.on_host = destination.is_host
        self._destination = destination

    def slot(self, nbytes: int) -> torch.Tensor:
        """Memory of the destination."""
        return self._destination.slot(nbytes)

    def memory(self, nbytes: int) -> torch.Tensor:
        """The same for a unit that is to stay."""
        return self._destination.slot(nbytes)

    def attend(self, slot: torch.Tensor) -> None:
        """What this thread computes from now on waits for what fills the slot."""
        self._destination.attend(slot)

    def seen(self, unit: str, slot: torch.Tensor) -> torch.Tensor:
        """The slot: all of a unit is in it."""
        del unit
        return slot

    def bring_kept(self) -> None:
        """Nothing is."""

    def fill_whole(self) -> None:
        """So it is."""

    def release(self, slot: torch.Tensor) -> None:
        """What this thread was asked to compute until now comes before the next fill of the slot."""
        self._destination.release(slot)

    def forget(self, slot: torch.Tensor) -> None:
        """What was sent into it has arrived when this returns."""
        self._destination.forget(slot)
