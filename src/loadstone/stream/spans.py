"""What is read in one call: ranges of files and where they go, cut into chunks and joined with their neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from loadstone.hardware.pages import Bytes, populate
from loadstone.stream.convert import copy
from loadstone.stream.source import ALIGNMENT, OpenFiles

# Large enough to amortise a system call, small enough that staging and source stay in the L2 cache.
CHUNK_BYTES = 1 << 20
# What is only moved does not pass through the caches; a unit of 24 MB should be read by eight threads all the same.
_COPY_CHUNK_BYTES = 2 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Fill:
    """One range of a file and where its elements go.

    Attributes:
        file: the file.
        offset: of the first byte.
        source_bits: the width of a stored element, or of a block.
        destination_bits: what such an element or block becomes.
        nbytes: how many bytes are read.
        destination: where they go: contiguous bytes, `nbytes * destination_bits / source_bits` of them, as an array, or
            as whatever else can be sliced and `kernel` understands (a tensor on a device).
        kernel: what is done on the way; called with the bytes read and the destination.
        fresh: the destination is host memory that was never touched.
        chunk_bytes: the most that is read at once and handed to `kernel`; staging must have room for it.
    """

    file: Path
    offset: int
    nbytes: int
    destination: Any
    kernel: Callable[[Bytes, Any], None] = copy
    source_bits: int = 8
    destination_bits: int = 8
    fresh: bool = True
    chunk_bytes: int = CHUNK_BYTES


class Staging(Protocol):
    """Where one thread's reads land before a kernel takes them on."""

    def next(self) -> Bytes:
        """Page-aligned bytes, `staging_bytes` of the largest chunk of them, that nobody reads any more."""


class Piece(Protocol):
    """What one thread does at a time."""

    @property
    def nbytes(self) -> int:
        """How much of it is read from files."""

    def deliver(self, files: OpenFiles, staging: Staging) -> None:
        """Bring bytes to where they belong.

        Args:
            files: those that may be read.
            staging: of the calling thread.

        Raises:
            TruncatedFile: a file ended early.
            UnreadableFile: a file could not be read.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Neighbouring fills of one file that are read in one call."""

    file: Path
    offset: int
    nbytes: int
    fills: tuple[Fill, ...]

    def deliver(self, files: OpenFiles, staging: Staging) -> None:
        """Read them; see `Piece`."""
        source, first = files.source(self.file), self.fills[0]
        if len(self.fills) == 1 and first.kernel is copy:
            _touch(first)
            source.read_into(self.offset, first.destination, staging.next())
            return
        staged = source.read(self.offset, self.nbytes, staging.next())
        for fill in self.fills:
            begin = fill.offset - self.offset
            _touch(fill)
            fill.kernel(staged[begin : begin + fill.nbytes], fill.destination)


def _touch(fill: Fill) -> None:
    """Fault in a large untouched destination with one system call rather than with one trap for each page."""
    if fill.fresh and fill.nbytes >= CHUNK_BYTES // 2:
        populate(fill.destination, write=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Fills that are read again and again: cut and joined once, from files that stay open.

    Attributes:
        pieces: what is read in one call each.
        total_bytes: that are read.
        kept: what comes from memory.
    """

    pieces: tuple[Piece, ...]
    total_bytes: int
    kept: tuple[Piece, ...] = ()


def prepare(fills: Sequence[Fill]) -> Prepared:
    """Do once what `Reader.submit` would do each time."""
    return Prepared(pieces=tuple(spans_of(fills)), total_bytes=sum(fill.nbytes for fill in fills))


def spans_of(fills: Iterable[Fill]) -> Iterator[Span]:
    """Cut large fills into chunks and join neighbouring small ones, in file order."""
    pending: list[Fill] = []
    for piece in _pieces(sorted(fills, key=lambda fill: (str(fill.file), fill.offset))):
        if pending and not _joins(pending, piece):
            yield _span(pending)
            pending = []
        pending.append(piece)
    if pending:
        yield _span(pending)


def _joins(pending: Sequence[Fill], piece: Fill) -> bool:
    last = pending[-1]
    adjacent = last.file == piece.file and last.offset + last.nbytes == piece.offset
    return adjacent and piece.offset + piece.nbytes - pending[0].offset <= pending[0].chunk_bytes


def _span(fills: Sequence[Fill]) -> Span:
    first, last = fills[0], fills[-1]
    return Span(
        file=first.file, offset=first.offset, nbytes=last.offset + last.nbytes - first.offset, fills=tuple(fills)
    )


def _pieces(fills: Iterable[Fill]) -> Iterator[Fill]:
    for fill in fills:
        begin = 0
        while begin < fill.nbytes:
            end = _cut(fill, begin)
            if end - begin == fill.nbytes:
                yield fill
            else:
                to, until = (at * fill.destination_bits // fill.source_bits for at in (begin, end))
                yield replace(
                    fill, offset=fill.offset + begin, nbytes=end - begin, destination=fill.destination[to:until]
                )
            begin = end


def _cut(fill: Fill, begin: int) -> int:
    """Where the piece that starts at `begin` ends: at an element, or at a block of the disk if bytes only move."""
    if fill.kernel is copy:
        end = (fill.offset + begin + _COPY_CHUNK_BYTES) // ALIGNMENT * ALIGNMENT - fill.offset
    else:
        unit = max(1, fill.source_bits // 8)
        end = begin + fill.chunk_bytes // unit * unit
    return min(end, fill.nbytes)
