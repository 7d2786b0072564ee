"""Host memory whose pages adjoin, for what is read from disks past the page cache.

A disk is asked for pieces that adjoin in physical memory. Pages of 4 kB that are found one by one come from all over
it: on a virtual machine the same disk then gives 1.1 to 2.2 GB/s, as chance will have it, and 2.6 to 3.2 into huge
pages.
"""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np
from numpy.typing import NDArray

from loadstone.units import round_up

PAGE_BYTES = mmap.PAGESIZE
# What is usual; where huge pages are larger, the system finds none in so little and keeps to small ones.
HUGE_BYTES = 2 << 20
# From include/uapi/linux/mman.h and asm-generic/mman-common.h; Python's mmap module lacks some of them.
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
MAP_FIXED = 0x10
_MADV_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", 14)
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_MADV_COLLAPSE = 25

Bytes = NDArray[np.uint8]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mmap.restype = ctypes.c_void_p


def anonymous(nbytes: int, *, sparse: bool = False) -> Bytes:
    """Fresh zeroed page-aligned memory in a map of its own.

    Args:
        nbytes: how much.
        sparse: only a little of it will be touched, so that it may be more than there is.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (MAP_NORESERVE if sparse else 0)
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=flags), np.uint8)


def adjoining(nbytes: int, *, touch: bool = True) -> Bytes:
    """Fresh zeroed page-aligned memory in huge pages, where the system has some.

    Finding them takes longer than small ones where a virtual machine must get them from its host, so this is for
    memory that is read into again and again.

    Args:
        nbytes: how much.
        touch: find all of it now, in one go; else when it is used.
    """
    found = aligned(nbytes)
    advise(found[: nbytes // HUGE_BYTES * HUGE_BYTES], _MADV_HUGEPAGE)
    if touch:
        populate(found, write=True)
    return found


def aligned(nbytes: int, at: int = 0) -> Bytes:
    """Fresh zeroed memory that takes nothing before it is touched.

    Args:
        nbytes: how much; at least 1.
        at: what begins where a huge page can; whole small pages.
    """
    whole = anonymous(nbytes + HUGE_BYTES, sparse=True)
    begin = -(whole.ctypes.data + at) % HUGE_BYTES
    return whole[begin : begin + nbytes]


def shared(descriptor: int, nbytes: int) -> Bytes:
    """The first bytes of a file in memory, found in one go, in huge pages where the system has some.

    Args:
        descriptor: of the file, from `os.memfd_create`, empty.
        nbytes: whole pages.

    Raises:
        OSError: the memory is not there.
    """
    os.posix_fallocate(descriptor, 0, nbytes)
    place = aligned(nbytes)
    map_over(place, descriptor)
    # Nothing but this makes huge pages of such memory where the administrator has not allowed all programs to.
    advise(place[: nbytes // HUGE_BYTES * HUGE_BYTES], _MADV_COLLAPSE)
    return place


def populate(array: Bytes, *, write: bool = False) -> None:
    """Fault in the pages of `array` in one system call; a hint that older kernels ignore.

    Args:
        array: bytes of a map.
        write: make them writable, as fresh memory must be, instead of only reading them in.
    """
    advise(array, _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ)


def map_over(place: Bytes, descriptor: int | None) -> None:
    """Have other pages be seen in a place, instead of what was there.

    Args:
        place: whole pages of anonymous memory.
        descriptor: of a file, whose first bytes are seen and written to; None for nothing, zeros that take no memory.

    Raises:
        OSError: the system has no more room for maps.
    """
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE if descriptor is None else mmap.MAP_SHARED
    address, protection = place.ctypes.data, mmap.PROT_READ | mmap.PROT_WRITE
    found = _libc.mmap(address, place.size, protection, kind | MAP_FIXED, -1 if descriptor is None else descriptor, 0)
    if found != address:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def whole_pages(nbytes: int) -> int:
    """The bytes of the pages that so many bytes take."""
    return round_up(nbytes, PAGE_BYTES)


def give_back(array: Bytes) -> None:
    """Let the system have the pages of anonymous memory; they read as zeros from now on."""
    advise(array, mmap.MADV_DONTNEED)


def unmap_clean(address: int, nbytes: int) -> None:
    """Let the pages of a stretch of a mapped file go that nothing else lies in; whoever touches them gets them anew.

    Args:
        address: of the stretch, which was not written to.
        nbytes: of it.
    """
    begin, end = round_up(address, PAGE_BYTES), (address + nbytes) // PAGE_BYTES * PAGE_BYTES
    if begin < end:
        _libc.madvise(begin, end - begin, mmap.MADV_DONTNEED)


def advise(array: Bytes, advice: int) -> None:
    """Tell the system something about all pages that bytes of a map lie in; it may not know the advice."""
    begin = array.ctypes.data
    first = begin - begin % PAGE_BYTES
    _libc.madvise(first, begin + array.nbytes - first, advice)
