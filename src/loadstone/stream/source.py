"""One weight file, open for reads at any offset: through the page cache where it is in it, past it otherwise.

Bytes that are cast or decoded are not used where the page cache holds them, so filling it only costs memory, which
must be found and first touched: bf16 -> float32 of 3.1 GB, cold, takes 2.4 s past the cache and 3.3 to 4.2 s through
it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from loadstone.errors import TruncatedFile
from loadstone.stream.memory import PAGE_BYTES, Bytes, is_cached, map_file

# What O_DIRECT asks of offsets, sizes and addresses on every file system in use is this or less.
_ALIGNMENT = max(4096, PAGE_BYTES)


def staging_bytes(nbytes: int) -> int:
    """How large a staging buffer must be for reads of `nbytes` at any offset."""
    return nbytes + 2 * _ALIGNMENT


def reads_past_the_cache(path: Path) -> bool:
    """Whether a file is better read past the page cache: it is not in it, and the system can."""
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        return not is_cached(map_file(path))
    except (OSError, TruncatedFile):
        return False  # whoever opens it says what is wrong


class Source:
    """A file open for reading; close it.

    Args:
        path: the file.
        direct: read past the page cache, if its file system allows that.
    """

    def __init__(self, path: Path, *, direct: bool) -> None:
        self._path = path
        self._direct = False
        self._descriptor = -1
        if direct:
            with contextlib.suppress(OSError):
                self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
                self._direct = True
        if not self._direct:
            self._open_buffered()

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def read_into(self, offset: int, destination: Bytes, staging: Bytes) -> None:
        """Fill `destination` from `offset` on.

        Args:
            offset: in the file, in bytes.
            destination: bytes to fill.
            staging: page-aligned, `staging_bytes(destination.size)` or more; may be overwritten.

        Raises:
            TruncatedFile: the file ends before.
            OSError: it cannot be read.
        """
        if self._direct:
            destination[:] = self.read(offset, destination.size, staging)
        else:
            self._read_exactly(offset, destination)

    def read(self, offset: int, nbytes: int, staging: Bytes) -> Bytes:
        """The bytes from `offset` on, as a view of `staging`.

        Raises:
            TruncatedFile: the file ends before.
            OSError: it cannot be read.
        """
        begin = offset % _ALIGNMENT if self._direct else 0
        end = begin + nbytes
        if self._direct:
            try:
                done = self._read_blocks(offset - begin, staging[: -(-end // _ALIGNMENT) * _ALIGNMENT])
                if done < end:
                    raise self._cut_short(offset, nbytes, max(0, done - begin))
            except OSError as error:
                if error.errno != errno.EINVAL:  # a file system that took the flag but not the alignment
                    raise
                os.close(self._descriptor)
                self._open_buffered()
                return self.read(offset, nbytes, staging)
        else:
            self._read_exactly(offset, staging[:nbytes])
        return staging[begin:end]

    def _open_buffered(self) -> None:
        self._descriptor = os.open(self._path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._direct = False

    def _read_exactly(self, offset: int, into: Bytes) -> None:
        view, done = into.data, 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], offset + done)
            if count == 0:
                raise self._cut_short(offset, len(view), done)
            done += count

    def _read_blocks(self, offset: int, into: Bytes) -> int:
        """Read whole aligned blocks; says how many bytes there were, fewer at the end of the file."""
        done = 0
        while done < into.size:
            count = os.preadv(self._descriptor, [into.data[done:]], offset + done)
            done += count
            # A read that ends off a block has met the end of the file; the next one would not be aligned.
            if count == 0 or count % _ALIGNMENT:
                break
        return done

    def _cut_short(self, offset: int, wanted: int, found: int) -> TruncatedFile:
        return TruncatedFile(
            f"{self._path}: expected {wanted:,} bytes at offset {offset:,}, found {found:,}; the file was cut short "
            "while it was read. Download it again."
        )
