"""Byte ranges of files into host memory: coalesced, in file order, by a few threads, cast on the way."""

from __future__ import annotations

import contextlib
import mmap
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loadstone.events import BytesMoved, Observer
from loadstone.hardware.memory import num_cores
from loadstone.stream.convert import Kernel, copy
from loadstone.stream.memory import Bytes, populate
from loadstone.stream.source import Source, reads_past_the_cache, staging_bytes

# Large enough to amortise a system call, small enough that staging and source stay in the L2 cache.
CHUNK_BYTES = 1 << 20
_MIN_STEP_BYTES = 64 << 20
_MAX_THREADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Fill:
    """One range of a file and where its elements go.

    Attributes:
        file: the file.
        offset: of the first byte.
        source_bits: the width of a stored element, or of a block.
        destination_bits: what such an element or block becomes.
        nbytes: how many bytes are read.
        destination: where they go: contiguous bytes, `nbytes * destination_bits / source_bits` of them.
        kernel: what is done on the way.
        fresh: the destination was never touched.
    """

    file: Path
    offset: int
    nbytes: int
    destination: Bytes
    kernel: Kernel = copy
    source_bits: int = 8
    destination_bits: int = 8
    fresh: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """Neighbouring fills of one file that are read in one call."""

    file: Path
    offset: int
    nbytes: int
    fills: tuple[Fill, ...]


class Reader:
    """Runs fills on threads of its own; the first error is raised to whoever waits."""

    def __init__(self, *, num_threads: int | None = None, observer: Observer, stage: str = "read") -> None:
        self._num_threads = num_threads
        self._observer = observer
        self._stage = stage
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._error: BaseException | None = None
        self._done_bytes = 0
        self._told_bytes = 0
        self._total_bytes = 0
        self._spans: Iterator[_Span] = iter(())
        self._direct: dict[Path, bool] = {}
        self._begin_s = 0.0
        self._end_s = 0.0

    @property
    def seconds(self) -> float:
        """From the start to the last byte so far."""
        return self._end_s - self._begin_s

    @property
    def done_bytes(self) -> int:
        """How many bytes have arrived."""
        return self._done_bytes

    def start(self, fills: Sequence[Fill]) -> None:
        """Begin; returns at once."""
        self._total_bytes = sum(fill.nbytes for fill in fills)
        self._begin_s = self._end_s = time.perf_counter()
        self._spans = _spans(fills)
        self._direct = {path: reads_past_the_cache(path) for path in {fill.file for fill in fills}}
        num_threads = self._num_threads or reader_threads(direct=any(self._direct.values()))
        for index in range(num_threads if fills else 0):
            thread = threading.Thread(target=self._work, name=f"loadstone-read-{index}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def wait(self) -> None:
        """Return when every byte has arrived.

        Raises:
            TruncatedFile: a file ended early.
            OSError: a file could not be read.
        """
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Stop after the ranges that are under way."""
        with self._lock:
            self._spans = iter(())
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _work(self) -> None:
        # A map of its own is page-aligned, as reads past the page cache require.
        staging = np.frombuffer(mmap.mmap(-1, staging_bytes(CHUNK_BYTES)), np.uint8)
        with contextlib.ExitStack() as stack:
            opened: dict[Path, Source] = {}
            try:
                while (span := self._next()) is not None:
                    if span.file not in opened:
                        opened[span.file] = Source(span.file, direct=self._direct[span.file])
                        stack.callback(opened[span.file].close)
                    _run(span, opened[span.file], staging)
                    self._tell(span.nbytes)
            except BaseException as error:  # carried to the thread that waits, and raised there
                with self._lock:
                    self._error = self._error or error
                    self._spans = iter(())

    def _next(self) -> _Span | None:
        with self._lock:
            return next(self._spans, None)

    def _tell(self, nbytes: int) -> None:
        with self._lock:
            self._done_bytes += nbytes
            self._end_s = time.perf_counter()
            if self._done_bytes - self._told_bytes < _MIN_STEP_BYTES and self._done_bytes != self._total_bytes:
                return
            self._told_bytes = self._done_bytes
            event = BytesMoved(stage=self._stage, done_bytes=self._done_bytes, total_bytes=self._total_bytes)
        self._observer(event)


def reader_threads(*, direct: bool) -> int:
    """As many as there are cores to run on, at least 2; past the page cache 8, most of which wait for the disk."""
    return _MAX_THREADS if direct else max(2, min(_MAX_THREADS, num_cores()))


def _spans(fills: Iterable[Fill]) -> Iterator[_Span]:
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
    return adjacent and piece.offset + piece.nbytes - pending[0].offset <= CHUNK_BYTES


def _span(fills: Sequence[Fill]) -> _Span:
    first, last = fills[0], fills[-1]
    return _Span(
        file=first.file, offset=first.offset, nbytes=last.offset + last.nbytes - first.offset, fills=tuple(fills)
    )


def _pieces(fills: Iterable[Fill]) -> Iterator[Fill]:
    for fill in fills:
        if fill.nbytes <= CHUNK_BYTES:
            if fill.nbytes:
                yield fill
            continue
        unit = max(1, fill.source_bits // 8)
        step = CHUNK_BYTES // unit * unit
        for begin in range(0, fill.nbytes, step):
            nbytes = min(step, fill.nbytes - begin)
            to = begin * fill.destination_bits // fill.source_bits
            yield Fill(
                file=fill.file,
                offset=fill.offset + begin,
                nbytes=nbytes,
                destination=fill.destination[to : to + nbytes * fill.destination_bits // fill.source_bits],
                kernel=fill.kernel,
                source_bits=fill.source_bits,
                destination_bits=fill.destination_bits,
                fresh=fill.fresh,
            )


def _run(span: _Span, source: Source, staging: Bytes) -> None:
    first = span.fills[0]
    if len(span.fills) == 1 and first.kernel is copy:
        _touch(first)
        source.read_into(span.offset, first.destination, staging)
        return
    staged = source.read(span.offset, span.nbytes, staging)
    for fill in span.fills:
        begin = fill.offset - span.offset
        _touch(fill)
        fill.kernel(staged[begin : begin + fill.nbytes], fill.destination)


def _touch(fill: Fill) -> None:
    """Fault in a large untouched destination with one system call rather than with one trap for each page."""
    if fill.fresh and fill.nbytes >= CHUNK_BYTES // 2:
        populate(fill.destination, write=True)
