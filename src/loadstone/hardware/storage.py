"""What a file lies on: its file system, whether that is a network's, whether it turns, and how it takes direct reads.

Asked of the kernel, never guessed from names of paths; where the kernel does not tell, the answer is None.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from loadstone.hardware.mounts import mounts
from loadstone.hardware.spec import Disk

_BLOCK_DEVICES = Path("/sys/dev/block")

# File systems whose bytes come over a wire or out of another program. A page fault there is a round trip, and a map
# was measured 30-50 times slower than reads.
# Source: https://www.kernel.org/doc/html/latest/filesystems/ (the types that /proc/filesystems names)
_NETWORK = re.compile(r"nfs\d*|cifs|smb\d*|ceph|9p|afs|lustre|gfs2|ocfs2|beegfs|gpfs|orangefs|fuse(\..+)?")

_VIRTUAL = re.compile(r"/(virtio|vbd|xen|virtual|vmbus)")

# Source: https://man7.org/linux/man-pages/man2/statx.2.html
_STATX_DIOALIGN = 0x2000
_STATX_NBYTES = 256
_DIOALIGN_OFFSET = 152  # stx_dio_mem_align and stx_dio_offset_align, 32 bits each
_AT_FDCWD = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """What one file lies on.

    Attributes:
        file_system: the kernel's name of its type, `ext4`; "" where it is not told.
        network: its bytes come over a network, or from another program.
        rotational: whether the disk turns; None where there is none to be seen, or only a virtual one, which says yes
            whatever lies beneath it.
        direct_alignment: what direct reads ask of offsets, sizes and addresses, in bytes; 0 if the file system does not
            take them, None where the kernel does not tell (try, with a page).
    """

    file_system: str = ""
    network: bool = False
    rotational: bool | None = None
    direct_alignment: int | None = None


def storage_of(path: Path) -> Storage:
    """Ask what `path` lies on.

    Raises:
        OSError: there is no such file.
    """
    device = path.stat().st_dev
    file_system = _file_system(path, device)
    return Storage(
        file_system=file_system,
        network=_NETWORK.fullmatch(file_system) is not None,
        rotational=_rotational(device),
        direct_alignment=_direct_alignment(path) if hasattr(os, "O_DIRECT") else 0,
    )


def storages_of(paths: Iterable[Path]) -> dict[Path, Storage]:
    """The same for many files, asked once for each device; what cannot be asked about is an unknown storage."""
    by_device: dict[int, Storage] = {}
    found = {}
    for path in paths:
        try:
            device = path.stat().st_dev
            if device not in by_device:
                by_device[device] = storage_of(path)
            found[path] = by_device[device]
        except OSError:
            found[path] = Storage()
    return found


def disk_under(folder: Path) -> Disk | None:
    """What a folder lies on, or will when it is made; None where that cannot be asked."""
    try:
        place = existing_parent(folder)
        device = place.stat().st_dev
        total, free = _space(place)
    except OSError:
        return None
    file_system = _file_system(place, device)
    return Disk(
        path=folder,
        file_system=file_system,
        network=_NETWORK.fullmatch(file_system) is not None,
        rotational=_rotational(device),
        total_bytes=total,
        free_bytes=free,
    )


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    absolute = path.absolute()
    for place in (absolute, *absolute.parents):
        try:
            place.stat()
        except OSError:  # also of a folder that one may not look into
            continue
        return place
    return Path(absolute.anchor)


def _space(path: Path) -> tuple[int, int]:
    """Total and free bytes of its file system, for this user."""
    if hasattr(os, "statvfs"):
        space = os.statvfs(path)
        return space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    import shutil  # it brings the compressors along, and Unix does not need it

    usage = shutil.disk_usage(path)
    return usage.total, usage.free


def _file_system(path: Path, device: int) -> str:
    """The type of the mount that `path` lies under: by device number, or by the longest path (overlays, btrfs)."""
    number = f"{os.major(device)}:{os.minor(device)}"
    resolved = path.resolve()
    best, depth = "", -1
    for mount in mounts():
        if mount.number == number:
            return mount.kind
        parts = len(mount.point.parts)
        if parts > depth and resolved.is_relative_to(mount.point):
            best, depth = mount.kind, parts
    return best


def _rotational(device: int) -> bool | None:
    folder = _BLOCK_DEVICES / f"{os.major(device)}:{os.minor(device)}"
    if _VIRTUAL.search(str(folder.resolve())):
        return None
    for queue in (folder / "queue", folder / ".." / "queue"):  # a partition's queue is its disk's
        try:
            return (queue / "rotational").read_text().strip() == "1"
        except OSError:
            continue
    return None


def _direct_alignment(path: Path) -> int | None:
    import ctypes  # what only asks about disks does without, and starts sooner

    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "statx"):
        return None
    buffer = (ctypes.c_uint8 * _STATX_NBYTES)()
    if libc.statx(_AT_FDCWD, os.fsencode(path), 0, _STATX_DIOALIGN, ctypes.byref(buffer)) != 0:
        return None
    told = ctypes.c_uint32.from_buffer(buffer, 0).value
    if not told & _STATX_DIOALIGN:  # kernels before 6.1, and file systems that do not say
        return None
    memory = ctypes.c_uint32.from_buffer(buffer, _DIOALIGN_OFFSET).value
    offset = ctypes.c_uint32.from_buffer(buffer, _DIOALIGN_OFFSET + 4).value
    return max(memory, offset)
