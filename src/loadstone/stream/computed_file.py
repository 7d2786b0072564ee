"""Files of weights that torch had to compute, kept in the cache: written once, then read like any checkpoint's.

A file is named by what went into it. It is written under another name and renamed when it is whole; processes that want
to write take turns, and whoever uses a file holds a shared lock on it, so that making room never takes it away.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from loadstone.checkpoint.files import write_at
from loadstone.checkpoint.write import NewTensor, Shard, plan_shards
from loadstone.errors import DestinationError
from loadstone.units import format_bytes

_SUFFIX = ".safetensors"
_UNFINISHED = ".unfinished"
# Of the disk, what is left to others whatever the limit says.
_SPARE_BYTES = 1 << 30


@dataclass(slots=True)
class InUse:
    """A file that stays for as long as this is open.

    Attributes:
        path: of it.
    """

    path: Path
    _fd: int

    def close(self) -> None:
        """Others may remove it from now on."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class ComputedFiles:
    """The files of one folder.

    Args:
        folder: made when something is written.
        limit_bytes: what all of them may take together.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes

    def find(self, key: str) -> InUse | None:
        """The file of a key, if there is one; it counts as used now."""
        path = self._folder / f"{key}{_SUFFIX}"
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        with contextlib.suppress(OSError):  # a file system without locks: nobody makes room there either
            fcntl.flock(fd, fcntl.LOCK_SH)
        with contextlib.suppress(OSError):
            os.utime(fd)
        try:
            is_there = os.path.samestat(os.fstat(fd), path.stat())
        except OSError:
            is_there = False
        if not is_there:  # it was removed before it was locked
            os.close(fd)
            return None
        return InUse(path, fd)

    def write(self, key: str, tensors: Sequence[NewTensor], values: Iterable[dict[str, torch.Tensor]]) -> InUse:
        """Write a file, unless another process has done so meanwhile.

        Args:
            key: of it.
            tensors: what it holds.
            values: the tensors by name, a few at a time, each once, with the shapes and dtypes that were told.

        Raises:
            DestinationError: there is no room for it, or it cannot be written; nothing is left of it.
        """
        (shard,) = plan_shards(tensors, max_shard_bytes=sum(tensor.nbytes for tensor in tensors) + 1)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                found = self.find(key)
                if found is None:
                    self._make_room(shard.nbytes)
                    self._write(key, shard, values)
                    found = self.find(key)
        except OSError as error:
            raise DestinationError(
                f"{self._folder}: expected to write computed weights there, found: {error.strerror or error}; set "
                "LOADSTONE_CACHE to a folder that may be written to."
            ) from None
        if found is None:
            raise DestinationError(f"{self._folder}: expected the file that was written, found it gone; try again.")
        return found

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from writing; the lock ends with its holder, however that ends."""
        fd = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            with contextlib.suppress(OSError):  # a file system without locks: the rename still lets only one win
                fcntl.flock(fd, fcntl.LOCK_EX)
            for left in self._folder.glob(f"*{_UNFINISHED}"):
                left.unlink(missing_ok=True)
            yield
        finally:
            os.close(fd)

    def _make_room(self, nbytes: int) -> None:
        """Remove what was not used for longest, as far as nobody uses it."""
        by_age = sorted(self._folder.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime)
        taken = sum(path.stat().st_size for path in by_age)
        for path in by_age:
            if taken + nbytes <= self._limit_bytes and self._is_room(nbytes):
                break
            taken -= _remove_unused(path)
        if taken + nbytes > self._limit_bytes or not self._is_room(nbytes):
            raise DestinationError(
                f"{self._folder}: expected room for {format_bytes(nbytes)} of computed weights, found a limit of "
                f"{format_bytes(self._limit_bytes)} for all of them and "
                f"{format_bytes(shutil.disk_usage(self._folder).free)} free on the disk."
            )

    def _is_room(self, nbytes: int) -> bool:
        return shutil.disk_usage(self._folder).free >= nbytes + _SPARE_BYTES

    def _write(self, key: str, shard: Shard, values: Iterable[dict[str, torch.Tensor]]) -> None:
        begins: dict[str, int] = {}
        end = len(shard.header)
        for tensor in shard.tensors:
            begins[tensor.name] = end
            end += tensor.nbytes
        path = self._folder / f"{key}.{os.getpid()}{_UNFINISHED}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            write_at(fd, memoryview(shard.header), 0)
            for some in values:
                for name, value in some.items():
                    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                    write_at(fd, flat.numpy().data, begins.pop(name))
            if begins:
                raise RuntimeError(f"{', '.join(begins)}: told of, but not given")
            os.fsync(fd)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            path.replace(self._folder / f"{key}{_SUFFIX}")
        finally:
            os.close(fd)
            path.unlink(missing_ok=True)


def _remove_unused(path: Path) -> int:
    """Remove a file that nobody uses; gives the bytes that it took, 0 where it stays."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return 0
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        nbytes = os.fstat(fd).st_size
        path.unlink()
    except OSError:
        return 0
    finally:
        os.close(fd)
    return nbytes
