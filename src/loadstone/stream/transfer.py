"""From the disk to a device: a ring of page-locked buffers, a stream beside the one that computes, casts over there.

Reads land in page-locked slots of exact size (torch's `pin_memory` rounds up to a power of two). A slot is sent on in a
stream of its own and is read into again when the device has taken it; the stored bytes travel, and what must be cast
is cast where they arrive. A `Link` is all that is asked of a device, so that the same code runs on a fake one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch

from loadstone.checkpoint.values import TensorInfo
from loadstone.dtypes import DTYPES
from loadstone.hardware.pages import Bytes, adjoining, anonymous
from loadstone.stream.source import staging_bytes
from loadstone.stream.spans import Fill

# At 4 MB a copy takes longer than the calls that ask for it: PCIe 5 moves it in 0.1 ms.
CHUNK_BYTES = 4 << 20
_NUM_SLOTS = 2
# That read for all devices together; each has so many slots.
NUM_THREADS = 8

_logger = logging.getLogger("loadstone.stream")


class Moved(Protocol):
    """A point in what was enqueued."""

    def is_over(self) -> bool:
        """Whether all before it is done."""

    def wait(self) -> None:
        """Return when it is."""

    def join(self) -> None:
        """What this thread asks the device to compute from now on waits for it; returns at once."""


class Link(Protocol):
    """The way to one device, first in, first out."""

    def locked(self, nbytes: int) -> Bytes:
        """Page-aligned host memory that the device can fetch from by itself; it is the link's until `close`."""

    def unlock(self, memory: Bytes) -> None:
        """Memory that `locked` gave is ordinary again; the device has fetched from it for the last time."""

    def fork(self) -> None:
        """What is enqueued from now on waits for what the device was asked to compute until now."""

    def enqueue(self, work: Callable[[], None]) -> None:
        """Have `work`, which moves or casts tensors, done on the device; returns before it is."""

    def mark(self) -> Callable[[], None]:
        """A function that returns when all that was enqueued until now is done."""

    def join(self) -> None:
        """What the device is asked to compute from now on waits for all that was enqueued."""

    def moved(self) -> Moved:
        """The point that enqueued work has come to when all that was enqueued until now is done."""

    def computed(self) -> Callable[[], None]:
        """A function after whose call what is enqueued waits for what this thread has asked the device to compute."""

    def close(self) -> None:
        """Wait, and give the memory back."""


class _Done:
    """A point that was passed before anybody asked."""

    def is_over(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def join(self) -> None:
        pass


class NoLink:
    """No way at all: whoever enqueues does the work, before the call returns.

    For the host itself, and for devices that order copies and computation by themselves.
    """

    def locked(self, nbytes: int) -> Bytes:
        """Ordinary memory."""
        return anonymous(nbytes)

    def unlock(self, memory: Bytes) -> None:
        """It was ordinary all the time."""

    def fork(self) -> None:
        """Nothing is left to wait for."""

    def enqueue(self, work: Callable[[], None]) -> None:
        """Do it."""
        work()

    def mark(self) -> Callable[[], None]:
        """A function that returns at once."""
        return _Done().wait

    def join(self) -> None:
        """Nothing is left to wait for."""

    def moved(self) -> Moved:
        """A point that is passed already."""
        return _Done()

    def computed(self) -> Callable[[], None]:
        """A function that does nothing."""
        return _Done().wait

    def close(self) -> None:
        """Nothing is held."""


def _driver() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class _CudaMoved:
    """An event in the side stream."""

    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event = event
        self._device = device

    def is_over(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self._event.synchronize()

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)


class CudaLink:
    """The way to a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._memory: dict[int, Bytes] = {}

    def locked(self, nbytes: int) -> Bytes:
        """Memory that is registered with the driver; where that is refused, ordinary memory, which is slower."""
        memory = adjoining(nbytes)
        refused = int(_driver().cudaHostRegister(memory.ctypes.data, nbytes, 0))
        if refused:
            _logger.warning("page-locked memory was refused (CUDA error %d); raise `ulimit -l`", refused)
        else:
            self._memory[memory.ctypes.data] = memory
        return memory

    def unlock(self, memory: Bytes) -> None:
        """Unregister it."""
        if self._memory.pop(memory.ctypes.data, None) is not None:
            _driver().cudaHostUnregister(memory.ctypes.data)

    def fork(self) -> None:
        """The side stream waits for the current one."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def enqueue(self, work: Callable[[], None]) -> None:
        """Run it in the side stream."""
        with torch.cuda.stream(self._stream):
            work()

    def mark(self) -> Callable[[], None]:
        """An event in the side stream."""
        reached: Callable[[], None] = self._stream.record_event().synchronize
        return reached

    def join(self) -> None:
        """The current stream waits for the side stream."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def moved(self) -> Moved:
        """An event in the side stream, which the current one can be made to wait for."""
        return _CudaMoved(self._stream.record_event(), self._device)

    def computed(self) -> Callable[[], None]:
        """An event in the current stream, which the side stream can be made to wait for."""
        event = torch.cuda.current_stream(self._device).record_event()
        return lambda: self._stream.wait_event(event)

    def close(self) -> None:
        """Wait for both streams, then unregister."""
        torch.cuda.synchronize(self._device)
        for address in self._memory:
            _driver().cudaHostUnregister(address)
        self._memory.clear()


# By the type of the device. Others have no page-locked memory of this kind (mps shares the host's) and are sent whole
# tensors.
LINKS: dict[str, Callable[[torch.device], Link]] = {"cuda": CudaLink}


# What computes in the place of a device that is not there, by the device's id; tests put a fake link beside it.
STAND_INS: dict[str, str] = {}


def torch_device(device_id: str) -> torch.device:
    """The device of that id as torch has it."""
    return torch.device(STAND_INS.get(device_id, device_id))


def link_for(device: torch.device) -> Link | None:
    """The way to a device; None where tensors are better sent whole."""
    made = LINKS.get(device.type)
    return made(device) if made is not None else None


class LockedStaging:
    """The slots of one thread: a slot is handed out again when the device has taken what was in it."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._slots = [link.locked(staging_bytes(CHUNK_BYTES)) for _ in range(_NUM_SLOTS)]
        self._taken: list[Callable[[], None] | None] = [None] * _NUM_SLOTS
        self._current: int | None = None

    def next(self) -> Bytes:
        """The slot after the last; what was read into that one has been enqueued by now."""
        if self._current is None:
            self._current = 0
        else:
            self._taken[self._current] = self._link.mark()
            self._current = (self._current + 1) % _NUM_SLOTS
        if (wait := self._taken[self._current]) is not None:
            wait()
        return self._slots[self._current]


def device_fill(
    info: TensorInfo, dtypes: tuple[torch.dtype, torch.dtype], destination: torch.Tensor, link: Link
) -> Fill:
    """How to read a plain contiguous tensor into device memory.

    Args:
        info: the tensor, without encoding and strides.
        dtypes: what it is stored in, and what it is cast to over there.
        destination: its bytes on the device, shape (nbytes,), uint8.
        link: the way to that device.
    """
    stored, wanted = dtypes

    def send(source: Bytes, piece: Any) -> None:
        staged = torch.from_numpy(source)
        if stored == wanted:
            link.enqueue(lambda: piece.copy_(staged, non_blocking=True))
        else:
            link.enqueue(lambda: piece.view(wanted).copy_(staged.to(piece.device, non_blocking=True).view(stored)))

    return Fill(
        file=info.file,
        offset=info.offset,
        nbytes=info.nbytes,
        destination=destination,
        kernel=send,
        source_bits=DTYPES[info.dtype].bits,
        destination_bits=wanted.itemsize * 8,
        fresh=False,
        chunk_bytes=CHUNK_BYTES,
    )
