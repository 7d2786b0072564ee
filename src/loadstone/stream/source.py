"""One weight file, open for reads at any offset, in the way that suits what it lies on and what is cached of it.

Bytes that are cast or decoded are not used where the page cache holds them, so filling it only costs memory, which
must be found and first touched: bf16 -> float32 of 3.1 GB, cold, takes 2.4 s past the cache and 3.3 to 4.2 s through
it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from loadstone.checkpoint.files import check_version, unreadable, version_of
from loadstone.checkpoint.values import CheckpointFile, FileVersion
from loadstone.errors import LoadstoneError, TruncatedFile
from loadstone.hardware.memory import num_cores
from loadstone.hardware.pages import PAGE_BYTES, Bytes
from loadstone.hardware.storage import Storage, storages_of
from loadstone.stream.memory import cached_part, map_file

# What O_DIRECT asks of offsets, sizes and addresses on nearly every file system is this or less.
ALIGNMENT = max(4096, PAGE_BYTES)

# A file of which this part is cached takes as long through the cache (rest at 1 GB/s, hits at 8) as past it (2 GB/s).
_WORTH_CACHE = 0.6
_DIRECT_THREADS = 8
# Below this, splitting a read into blocks and what sticks out at both ends costs more calls than copying it.
_WORTH_BLOCKS = 64 * ALIGNMENT
_NETWORK_THREADS = 16


class Mode(Enum):
    """How the bytes of a file are read."""

    BUFFERED = "through the page cache"
    DIRECT = "past the page cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How one file is best read.

    Attributes:
        mode: through or past the page cache.
        num_threads: how many reads at a time.
        reason: what that follows from, for people.
    """

    mode: Mode
    num_threads: int
    reason: str


def choose_manner(storage: Storage, cached: float, cores: int) -> Manner:
    """How to read a file whose bytes are wanted elsewhere than in the page cache.

    Args:
        storage: what it lies on.
        cached: the part of it in the page cache, 0 to 1.
        cores: that this process may run on.
    """
    # As many threads as cores, at least 2: more hinder one another, and torch.
    copying = max(2, min(_DIRECT_THREADS, cores))
    buffered = Mode.BUFFERED
    if cached >= _WORTH_CACHE:
        return Manner(mode=buffered, num_threads=copying, reason=f"{cached:.0%} of it cached")
    if storage.network:
        # Every read waits for the other side, so many wait at once; direct reads there give up readahead and leases.
        return Manner(
            mode=buffered, num_threads=_NETWORK_THREADS, reason=f"{storage.file_system}, over a network or a program"
        )
    if storage.rotational:
        return Manner(mode=buffered, num_threads=1, reason="a disk that turns is read in order")
    if storage.direct_alignment == 0 or (storage.direct_alignment or 0) > ALIGNMENT:
        return Manner(mode=buffered, num_threads=copying, reason=f"{storage.file_system} takes no direct reads")
    return Manner(mode=Mode.DIRECT, num_threads=_DIRECT_THREADS, reason=f"{cached:.0%} of it cached")


def manners_of(paths: Iterable[Path]) -> dict[Path, Manner]:
    """How to read each file, as probed now; one that cannot be probed is read the plain way, which tells why."""
    manners = {}
    for path, storage in storages_of(paths).items():
        try:
            manners[path] = choose_manner(storage, cached_part(map_file(path)), num_cores())
        except (OSError, LoadstoneError):
            manners[path] = Manner(mode=Mode.BUFFERED, num_threads=1, reason="it cannot be probed")
    return manners


def streaming_manners(paths: Iterable[Path]) -> dict[Path, Manner]:
    """How to read files over and over: past the page cache wherever that can be, whatever is cached of them now.

    What the cache keeps of a file that is read in a circle is always what was read longest before it is wanted again.
    """
    return {path: choose_manner(storage, 0.0, num_cores()) for path, storage in storages_of(paths).items()}


def staging_bytes(nbytes: int) -> int:
    """How large a staging buffer must be for reads of `nbytes` at any offset."""
    return nbytes + 2 * ALIGNMENT


class Source:
    """A file open for reading by any number of threads; close it.

    Args:
        path: the file.
        mode: where its file system refuses direct reads, the page cache is used all the same.

    Raises:
        UnreadableFile: it is gone, or may not be read any more.
    """

    def __init__(self, path: Path, mode: Mode) -> None:
        self._path = path
        try:
            # O_NONBLOCK: what was a file when its header was read may be a pipe now, which is waited for otherwise.
            self._buffered = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise unreadable(path, error) from error
        self._direct: int | None = None
        if mode is Mode.DIRECT and hasattr(os, "O_DIRECT"):
            with contextlib.suppress(OSError):
                self._direct = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        self._refused = self._direct is None

    @property
    def is_direct(self) -> bool:
        """Whether reads go past the page cache."""
        return not self._refused

    def versions(self) -> list[FileVersion]:
        """Which file each descriptor is of: the path may lead to another one from one moment to the next."""
        opened = (self._buffered, self._direct)
        return [version_of(os.fstat(descriptor)) for descriptor in opened if descriptor is not None]

    def close(self) -> None:
        """Close the file."""
        os.close(self._buffered)
        if self._direct is not None:
            os.close(self._direct)

    def read_into(self, offset: int, destination: Bytes, staging: Bytes) -> None:
        """Fill `destination` from `offset` on.

        Args:
            offset: in the file, in bytes.
            destination: bytes to fill.
            staging: page-aligned, larger than `staging_bytes(0)`; may be overwritten.

        Raises:
            TruncatedFile: the file ends before.
            UnreadableFile: it cannot be read.
        """
        if not self.is_direct:
            self._read_exactly(offset, destination)
            return
        # Whole blocks go straight to where they belong if that address is aligned as the file is; else by staging.
        end = offset + destination.size
        first, last = -(-offset // ALIGNMENT) * ALIGNMENT, end // ALIGNMENT * ALIGNMENT
        step = staging.size - 2 * ALIGNMENT
        if last - first >= _WORTH_BLOCKS and (destination.ctypes.data - offset) % ALIGNMENT == 0:
            done = self._read_blocks(first, destination[first - offset : last - offset])
            if done is None:
                self._read_exactly(offset, destination)
                return
            if done < last - first:
                raise self._cut_short(offset, destination.size, first - offset + done)
        else:
            first = last = end
        for begin, stop in ((offset, first), (last, end)):
            for at in range(begin, stop, step):
                nbytes = min(step, stop - at)
                destination[at - offset : at - offset + nbytes] = self.read(at, nbytes, staging)

    def read(self, offset: int, nbytes: int, staging: Bytes) -> Bytes:
        """The bytes from `offset` on, as a view of `staging`.

        Raises:
            TruncatedFile: the file ends before.
            UnreadableFile: it cannot be read.
        """
        if self.is_direct:
            begin = offset % ALIGNMENT
            end = begin + nbytes
            done = self._read_blocks(offset - begin, staging[: -(-end // ALIGNMENT) * ALIGNMENT])
            if done is not None:
                if done < end:
                    raise self._cut_short(offset, nbytes, max(0, done - begin))
                return staging[begin:end]
        self._read_exactly(offset, staging[:nbytes])
        return staging[:nbytes]

    def _read_exactly(self, offset: int, into: Bytes) -> None:
        view, done = into.data, 0
        while done < len(view):
            try:
                count = os.preadv(self._buffered, [view[done:]], offset + done)
            except OSError as error:
                raise unreadable(self._path, error) from error
            if count == 0:
                raise self._cut_short(offset, len(view), done)
            done += count

    def _read_blocks(self, offset: int, into: Bytes) -> int | None:
        """Read whole aligned blocks, past the page cache.

        Returns:
            How many bytes there were, fewer at the end of the file; None if the file system took the flag but not the
            read, and direct reads are over.
        """
        done = 0
        while done < into.size:
            try:
                count = os.preadv(self._direct or 0, [into.data[done:]], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise unreadable(self._path, error) from error
                self._refused = True
                return None
            done += count
            # A read that ends off a block has met the end of the file; the next one would not be aligned.
            if count == 0 or count % ALIGNMENT:
                break
        return done

    def _cut_short(self, offset: int, wanted: int, found: int) -> TruncatedFile:
        return TruncatedFile(
            f"{self._path}: expected {wanted:,} bytes at offset {offset:,}, found {found:,}; the file was cut short "
            "while it was read. Download it again."
        )


class OpenFiles:
    """Weight files, each opened when it is first read from, for any number of threads; close them.

    Args:
        manners: how each file is read.
        expected: files that are used only if they are those whose headers were read, when they are opened.
    """

    def __init__(self, manners: Mapping[Path, Manner], expected: Iterable[CheckpointFile] = ()) -> None:
        self.manners = manners
        self._expected = {file.path: file for file in expected}
        self._lock = threading.Lock()
        self._sources: dict[Path, Source] = {}

    @property
    def num_threads(self) -> int:
        """How many reads at a time suit these files."""
        return max((manner.num_threads for manner in self.manners.values()), default=0)

    def source(self, path: Path) -> Source:
        """The open file.

        Raises:
            UnreadableFile: it is gone, or may not be read any more.
            FileChanged: it is another one than was expected; it is not kept open.
        """
        with self._lock:
            if path not in self._sources:
                self._sources[path] = self._opened(path)
            return self._sources[path]

    def add(self, files: Sequence[CheckpointFile]) -> None:
        """Know more files, which are read over and over."""
        self.manners = {**self.manners, **streaming_manners(file.path for file in files)}
        self._expected |= {file.path: file for file in files}

    def _opened(self, path: Path) -> Source:
        source = Source(path, self.manners[path].mode)
        try:
            expected = self._expected.get(path)
            if expected is not None and expected.version is not None:
                for found in source.versions():
                    # What was written to the same file is found out whenever it is used, and can be undone.
                    if (found.device, found.inode) != (expected.version.device, expected.version.inode):
                        check_version(expected, found)
        except BaseException:
            source.close()
            raise
        return source

    def close(self) -> None:
        """Close what is open."""
        with self._lock:
            for source in self._sources.values():
                source.close()
            self._sources.clear()
