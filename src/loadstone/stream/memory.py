"""Host memory to load into: private maps of files and what is cached of them, and slabs for small tensors."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from loadstone.checkpoint.files import open_regular
from loadstone.errors import TruncatedFile
from loadstone.hardware.pages import MAP_NORESERVE, PAGE_BYTES, Bytes, advise, anonymous, populate

_SLAB_BYTES = 8 << 20
_NUM_PROBES = 64
_ALIGNMENT = 64
# The most pieces of one call. Source: https://man7.org/linux/man-pages/man2/writev.2.html (IOV_MAX)
_MAX_PIECES = 1024

_libc = ctypes.CDLL(None, use_errno=True)
_libc.writev.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
_libc.writev.restype = ctypes.c_ssize_t
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def map_file(path: Path) -> Bytes:
    """Map a whole file: pages are read when touched, and writing to them never reaches the file.

    The map is private and writable, so that an in-place edit of a weight copies the page instead of ending the process,
    and without a reservation, so that a file larger than RAM opens.

    Args:
        path: the file; it must not be empty.

    Returns:
        Its bytes, shape (nbytes,).

    Raises:
        TruncatedFile: it is empty.
        SourceError: it is gone, or may not be read any more.
    """
    with open_regular(path) as file:
        if file.nbytes == 0:
            raise TruncatedFile(f"{path}: expected weights, found an empty file; download it again.")
        try:
            mapped = mmap.mmap(
                file.fd, file.nbytes, flags=mmap.MAP_PRIVATE | MAP_NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
        except OSError:
            # vm.overcommit_memory=2 counts private maps all the same. A shared read-only map never counts.
            return _as_writable(mmap.mmap(file.fd, file.nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ))
    return np.frombuffer(mapped, np.uint8)


class _Borrowed(np.ndarray[Any, Any]):
    """An array over memory that `owner` keeps alive."""

    owner: object


def _as_writable(mapped: mmap.mmap) -> Bytes:
    """A read-only map as an array that torch takes without a warning; only reading it is allowed all the same."""
    view = np.frombuffer(mapped, np.uint8)
    raw = (ctypes.c_uint8 * view.size).from_address(view.ctypes.data)
    array = np.frombuffer(memoryview(raw), np.uint8).view(_Borrowed)
    array.owner = mapped
    borrowed: Bytes = array
    return borrowed


TOUCH_BYTES = 2 << 20
# Where the pages of a stretch begin; one page more for a stretch that is not aligned.
_PAGES = np.arange(TOUCH_BYTES // PAGE_BYTES + 1, dtype=np.uint64) * np.uint64(PAGE_BYTES)


class Toucher:
    """Touches mapped files for one thread, by having the kernel copy a byte of each page.

    Where a process that reads a page that is gone is ended by SIGBUS, the kernel says so.
    """

    def __init__(self) -> None:
        # An `iovec` for each page: its address, and one byte. https://man7.org/linux/man-pages/man3/iovec.3type.html
        self._pieces = np.ones((_PAGES.size, 2), np.uint64)
        self._sink = os.memfd_create("loadstone-touch") if hasattr(os, "memfd_create") else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._sink is not None:
            os.close(self._sink)

    def touch(self, array: Bytes) -> bool:
        """Bring in a stretch of a mapped file, and touch each of its pages.

        Args:
            array: at most `TOUCH_BYTES` bytes of a map.

        Returns:
            Whether all of it is there; not so if the file was cut short after it was mapped.
        """
        populate(array)
        if self._sink is None:
            array[::PAGE_BYTES].max(initial=0)
            return True
        begin = array.ctypes.data
        aligned = begin - begin % PAGE_BYTES
        count = -(-(begin + array.nbytes - aligned) // PAGE_BYTES)
        np.add(_PAGES, np.uint64(aligned), out=self._pieces[:, 0])
        os.lseek(self._sink, 0, os.SEEK_SET)
        return bool(_libc.writev(self._sink, self._pieces.ctypes.data, count) == count)


class Gatherer:
    """Copies elements that lie apart in a mapped file, for one thread, by having the kernel do it.

    Where a process that reads a page that is gone is ended by SIGBUS, the kernel copies less and says so.
    """

    def __init__(self) -> None:
        memory = getattr(os, "memfd_create", None)
        self._sink = memory("loadstone-gather") if memory else _unlinked_file()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back what the kernel copies into."""
        os.close(self._sink)

    def copy(self, view: NDArray[Any], destination: Bytes) -> bool:
        """Copy the elements of a view, in its order.

        Args:
            view: over a map, with any strides.
            destination: as many bytes as its elements take.

        Returns:
            Whether all of them are there; not so if the file was cut short after it was mapped.
        """
        if not view.size:
            return True
        addresses, run_bytes = _runs(view)
        done = 0
        for begin in range(0, addresses.size, _MAX_PIECES):
            some = addresses[begin : begin + _MAX_PIECES]
            # An `iovec` for each run: its address and its length.
            pieces = np.stack((some, np.full_like(some, run_bytes)), axis=1)
            place = destination[done : done + some.size * run_bytes]
            os.lseek(self._sink, 0, os.SEEK_SET)
            if _libc.writev(self._sink, pieces.ctypes.data, some.size) != place.size:
                return False
            os.preadv(self._sink, [place.data], 0)
            done += place.size
        return True


def _unlinked_file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _runs(view: NDArray[Any]) -> tuple[NDArray[np.uint64], int]:
    """The address of each run of neighbouring bytes of a view, in its order, and how long such a run is."""
    sides = [(size, stride) for size, stride in zip(view.shape, view.strides, strict=True) if size != 1]
    run_bytes = view.itemsize
    while sides and sides[-1][1] == run_bytes:
        run_bytes *= sides.pop()[0]
    addresses = np.array([view.ctypes.data], np.uint64)
    for size, stride in sides:
        steps = np.arange(size, dtype=np.uint64) * np.uint64(stride)
        addresses = np.add.outer(addresses, steps).reshape(-1)
    return addresses, run_bytes


def cached_part(array: Bytes) -> float:
    """The part of a map that is in the page cache, 0 to 1, told by pages spread over it; 0 where the system is silent.

    Asking about every page of gigabytes takes longer than building a model.
    """
    found = list(_probes(array, _NUM_PROBES))
    return sum(found) / max(1, len(found))


def _probes(array: Bytes, num_probes: int) -> Iterator[bool]:
    """Whether pages spread over a map are in the page cache."""
    page = ctypes.c_ubyte()
    where, aligned = ctypes.addressof(page), array.ctypes.data - array.ctypes.data % PAGE_BYTES
    stride = max(1, array.nbytes // PAGE_BYTES // num_probes) * PAGE_BYTES
    for offset in range(0, array.nbytes, stride):
        yield _libc.mincore(aligned + offset, PAGE_BYTES, where) == 0 and page.value & 1 == 1


def is_cached(array: Bytes, num_probes: int = _NUM_PROBES) -> bool:
    """Whether a map seems to be in the page cache as a whole; a page that is not ends the asking."""
    return all(_probes(array, num_probes))


def will_need(array: Bytes) -> None:
    """Have the pages of a mapped stretch read from the disk in the background.

    Args:
        array: bytes of a map; the kernel reads at most its readahead window (often 2 MB) for one call.
    """
    advise(array, mmap.MADV_WILLNEED)


class Arena:
    """Fresh zeroed memory: large tensors in a map of their own, small ones side by side in slabs.

    A large tensor can then be given back alone, and eighteen thousand small ones do not need as many maps.
    """

    def __init__(self) -> None:
        self._slab = np.empty(0, np.uint8)
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> Bytes:
        """`nbytes` zeroed bytes, aligned to 64."""
        if nbytes >= _SLAB_BYTES // 4:
            return anonymous(nbytes)
        with self._lock:
            if nbytes > self._slab.size:
                self._slab = anonymous(_SLAB_BYTES)
            taken, self._slab = self._slab[:nbytes], self._slab[-(-nbytes // _ALIGNMENT) * _ALIGNMENT :]
            return taken
