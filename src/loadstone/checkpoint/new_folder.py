"""A folder that appears whole or not at all.

Everything is written into a hidden folder beside the destination, forced to the disk, and put in place by one rename.
A process that is killed leaves the destination as it was; the hidden folder stays, and whoever makes the same thing of
the same source again goes on from there. A process that fails or is interrupted removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from loadstone.checkpoint.manifest import NAME as MANIFEST
from loadstone.checkpoint.manifest import format_manifest, read_manifest
from loadstone.errors import DestinationBusy, DestinationError, DestinationExists, DiskFull, LoadstoneError
from loadstone.units import format_bytes

# The manifest of what is finished, from which another process goes on.
_RECORD = ".finished"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LOCKED = (errno.EWOULDBLOCK, errno.EAGAIN)


class NewFolder:
    """The hidden folder while it is being filled; made by `new_folder`.

    Attributes:
        path: where to write.
        destination: where it will be.
        sums: the SHA-256 of each file that is finished, in hex, by name.
        is_published: whether the folder is in its place.
    """

    def __init__(self, path: Path, destination: Path) -> None:
        self.path = path
        self.destination = destination
        self.sums: dict[str, str] = {}
        self.is_published = False

    def resume(self, sizes: Mapping[str, int]) -> tuple[str, ...]:
        """Keep what another process finished before it was killed, and remove what it did not.

        Args:
            sizes: in bytes, of each file that is kept if it is finished.

        Returns:
            The names of the files that need not be written again.
        """
        recorded: Mapping[str, str] = {}
        with contextlib.suppress(LoadstoneError):  # there is no record yet, or one that cannot be used
            recorded = read_manifest(self.path / _RECORD)
        for path in self.path.iterdir():
            name = path.name
            if name in recorded and sizes.get(name) == path.stat().st_size:
                self.sums[name] = recorded[name]
            elif name != _RECORD:
                path.unlink()
        return tuple(self.sums)

    def require(self, nbytes: int) -> None:
        """Check that the disk has room for so much more.

        Raises:
            DiskFull: it does not.
        """
        free = shutil.disk_usage(self.path).free
        if nbytes > free:
            raise DiskFull(
                f"{self.destination}: {format_bytes(nbytes)} are to be written, but the disk has {format_bytes(free)} "
                "free; nothing was left on it. Make room, or choose another disk."
            )

    def finish(self, name: str, digest: str) -> None:
        """Force a written file to the disk, and remember that it is finished.

        Args:
            name: of the file.
            digest: its SHA-256 in hex.
        """
        _force(self.path / name)
        self.sums[name] = digest
        _write(self.path / f"{_RECORD}.next", format_manifest(self.sums).encode())
        (self.path / f"{_RECORD}.next").replace(self.path / _RECORD)

    def add(self, name: str, content: bytes) -> None:
        """Write a small file, of a name that may have folders in it."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, content)
        self.sums[name] = hashlib.sha256(content).hexdigest()

    def publish(self) -> None:
        """Add the manifest and put the folder in place.

        Raises:
            DestinationExists: something has come to be there meanwhile.
        """
        _write(self.path / MANIFEST, format_manifest(self.sums).encode())
        (self.path / _RECORD).unlink(missing_ok=True)
        for folder in [self.path, *(path for path in self.path.rglob("*") if path.is_dir())]:
            _force(folder)
        try:
            self.path.rename(self.destination)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise _exists(self.destination) from None
            raise
        self.is_published = True
        _force(self.destination.parent)


def check_destination(destination: Path) -> Path:
    """The real path of a folder that can be made: nothing is there, or an empty folder; the folder around it is.

    Raises:
        DestinationExists: something is there.
        DestinationError: there is no folder to make it in, or it cannot be replaced.
    """
    real = Path(os.path.realpath(destination))
    if not real.parent.is_dir():
        raise DestinationError(
            f"{destination}: expected a folder {real.parent} to write into, found none; make it first."
        )
    if real.is_dir():
        if os.path.ismount(real):
            raise DestinationError(
                f"{destination}: a file system is mounted there, which a finished folder cannot take the place of; "
                "name a folder inside it."
            )
        if next(real.iterdir(), None) is None:
            return real
    if os.path.lexists(real):
        raise _exists(destination)
    return real


@contextmanager
def new_folder(destination: Path, fingerprint: str) -> Iterator[NewFolder]:
    """A hidden folder beside the destination; what is in it at the end without `publish` is removed.

    Args:
        destination: what `check_destination` gave.
        fingerprint: of everything that decides what will be in it: only the same is ever resumed.

    Raises:
        DestinationBusy: another process is writing it.
        DiskFull: there was no room.
        DestinationError: the folder around it cannot be written.
    """
    path = destination.parent / f"{_prefix(destination)}{fingerprint}"
    _refuse_others(path, destination)
    with _locked(path, destination):
        folder = NewFolder(path, destination)
        try:
            yield folder
        except OSError as error:
            raise _disk_full(destination, error) if error.errno in _FULL else error from error
        finally:
            if not folder.is_published:
                shutil.rmtree(path, ignore_errors=True)


def leftovers(destination: Path) -> tuple[Path, ...]:
    """The hidden folders that killed processes left beside a destination."""
    prefix = _prefix(destination)
    return tuple(sorted(path for path in destination.parent.iterdir() if path.name.startswith(prefix)))


def _prefix(destination: Path) -> str:
    # A name may have 255 bytes, of which one character can be four.
    return f".{destination.name[:48]}.partial-"


def _refuse_others(path: Path, destination: Path) -> None:
    """Whoever writes the same destination in another way holds another folder."""
    for other in leftovers(destination):
        if other == path:
            continue
        try:
            fd = os.open(other, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            _lock(fd, destination)
        finally:
            os.close(fd)


@contextmanager
def _locked(path: Path, destination: Path) -> Iterator[None]:
    """Make the folder, or take the one that is there, and hold it alone."""
    while True:
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            if error.errno in _FULL:
                raise _disk_full(destination, error) from None
            raise DestinationError(
                f"{destination}: the folder {destination.parent} cannot be written ({error.strerror}); choose another."
            ) from None
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # its owner has just put it in place
        try:
            _lock(fd, destination)
            if not _is_same(fd, path):
                continue
            _check_again(path, destination)
            yield
            return
        finally:
            os.close(fd)


def _check_again(path: Path, destination: Path) -> None:
    """Another process may have been done meanwhile; what was made for nothing is removed."""
    try:
        check_destination(destination)
    except DestinationError:
        with contextlib.suppress(OSError):
            path.rmdir()
        raise


def _is_same(fd: int, path: Path) -> bool:
    """Whether a folder is still where it was opened."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _lock(fd: int, destination: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _LOCKED:
            raise DestinationBusy(
                f"{destination}: another process is writing it; wait for that one, or name another folder."
            ) from None
        # A file system without locks: the rename at the end still lets only one of them win.


def _disk_full(destination: Path, error: OSError) -> DiskFull:
    free = shutil.disk_usage(destination.parent).free
    return DiskFull(
        f"{destination}: the disk was full while it was written ({error.strerror}, {format_bytes(free)} free); nothing "
        "was left on it. Make room, or choose another disk."
    )


def _exists(destination: Path) -> DestinationExists:
    kind = "a folder that is not empty" if destination.is_dir() else "a file"
    return DestinationExists(
        f"{destination}: expected nothing there or an empty folder, found {kind}; name another, or remove it."
    )


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _force(path: Path) -> None:
    """Force a file or the names in a folder to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
