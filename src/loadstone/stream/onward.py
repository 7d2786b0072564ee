"""Units that are filled into host memory first and sent on from there: disk -> RAM -> device, or rounded on the way.

Each of a few threads owns one buffer of exact size, locked where the device fetches from it. It has the buffer filled,
sends it on, and fills it anew when the device has taken it. With two, one is read while the other travels.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loadstone.plan.reserve import NUM_BUFFERS
from loadstone.stream.destination import AtDestination, Destination
from loadstone.stream.filler import Filler, Known, Layout, unknown
from loadstone.stream.from_memory import Home, move
from loadstone.stream.read import Reader
from loadstone.stream.transfer import Moved
from loadstone.stream.workers import Job, Workers


@dataclass(slots=True, eq=False)
class _Buffer:
    """What one thread fills and sends on.

    Attributes:
        memory: the buffer.
        taken: when what was sent on last has arrived.
    """

    memory: torch.Tensor
    taken: Moved | None = None


class Onward(AtDestination):
    """A filler -> its buffers -> the slots of a destination.

    Args:
        inner: fills buffers of host memory; it is closed with this.
        layouts: how each unit lies in a slot, and in which dtypes.
        destination: where the slots are; closed by whoever made it.

    Attributes:
        inner: that.
    """

    def __init__(self, inner: Filler, layouts: Mapping[str, Layout], destination: Destination) -> None:
        super().__init__(destination)
        self.inner = inner
        self._layouts: dict[str, Layout] = {}
        self._usual_bytes = self._largest_bytes = 0
        self._workers = Workers(NUM_BUFFERS, "loadstone-send")
        self._own = threading.local()
        self._buffers: list[_Buffer] = []
        self.add(layouts, usual=True)

    def add(self, layouts: Mapping[str, Layout], *, usual: bool = False) -> None:
        """Know more units, which the inner filler knows already.

        Args:
            layouts: how each lies in a slot.
            usual: buffers are to suit them from the start; else they grow when they are too small for one.
        """
        self._layouts |= layouts
        if usual:
            self._usual_bytes = max([self._usual_bytes, *(self.inner.layout(unit).nbytes for unit in layouts)])
            self._largest_bytes = max(self._largest_bytes, self._usual_bytes)

    def knows(self, unit: str) -> bool:
        """Whether it was told how a unit lies in a slot."""
        return unit in self._layouts

    def layout(self, unit: str) -> Layout:
        """How a unit lies in a slot."""
        return self._layouts[unit]

    def moved_bytes(self, unit: str) -> int:
        """What the inner filler moves."""
        return self.inner.moved_bytes(unit)

    def fill(self, unit: str, slot: torch.Tensor, *, priority: int = 0, known: Known = unknown) -> Job:
        """Begin to fill a buffer, and to send it on into a slot."""
        job = Job(self.moved_bytes(unit), lambda job: self._pass_on(job, unit, slot, priority))
        known(job)
        return self._workers.begin(job, priority=priority)

    def check(self, unit: str) -> None:
        """Check what the inner filler checks."""
        self.inner.check(unit)

    def check_all(self) -> None:
        """Check what the inner filler checks."""
        self.inner.check_all()

    def readers(self) -> tuple[Reader, ...]:
        """Those of the inner filler."""
        return self.inner.readers()

    def rest(self, *, leaves_memory: bool = False) -> None:
        """End the threads, and let their buffers go when the device has taken what is in them."""
        self.inner.rest(leaves_memory=leaves_memory)
        self._workers.close()
        for buffer in self._buffers:
            self._let_go(buffer)
        self._buffers.clear()
        self._largest_bytes = self._usual_bytes

    def close(self) -> None:
        """End the threads and the inner filler; the buffers are the link's, which is closed after this."""
        self.inner.close()
        self._workers.close()
        self._buffers.clear()

    def _pass_on(self, job: Job, unit: str, slot: torch.Tensor, priority: int) -> None:
        """One unit, by the thread whose buffer it goes through."""
        buffer = self._buffer(self.inner.layout(unit).nbytes)
        if buffer.taken is not None:
            buffer.taken.wait()
        filling = self.inner.fill(unit, buffer.memory, priority=priority)
        job.on_cancel = filling.cancel
        if job.is_cancelled:
            filling.cancel()
        filling.wait()
        if job.is_cancelled:
            return
        inner, layout = self.inner.layout(unit), self._layouts[unit]
        home = Home(tensors=inner.tensors(buffer.memory), whole=buffer.memory, places=inner.places)
        late = self._destination.is_late
        buffer.taken = self._destination.send(slot, lambda: move(home, layout, slot, late=late))

    def _buffer(self, nbytes: int) -> _Buffer:
        """This thread's own, for so many bytes at least."""
        buffer: _Buffer | None = getattr(self._own, "buffer", None)
        if buffer is not None and buffer.memory.numel() < nbytes:
            self._buffers.remove(buffer)
            self._let_go(buffer)
            buffer = None
        if buffer is None:
            self._largest_bytes = max(self._largest_bytes, nbytes)
            buffer = _Buffer(memory=torch.from_numpy(self._destination.link.locked(self._largest_bytes)))
            self._own.buffer = buffer
            self._buffers.append(buffer)
        return buffer

    def _let_go(self, buffer: _Buffer) -> None:
        if buffer.taken is not None:
            buffer.taken.wait()
        self._destination.link.unlock(buffer.memory.numpy())
