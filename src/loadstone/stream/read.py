"""The engine of byte ranges: what is wanted of files into memory, coalesced, in file order, by a few threads.

A `Reader` takes batches of fills. The batch of the lowest priority number comes first, and within it the order of the
files; neighbouring small ranges become one read, large ones are cut into chunks that stay in a core's cache while
they are cast or decoded. Each batch can be waited for and cancelled by itself, and the first error of a batch is raised
to whoever waits for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from loadstone.events import NO_TRACE, BytesMoved, Observer, Tracer, ignore
from loadstone.hardware.memory import num_cores
from loadstone.hardware.pages import Bytes, anonymous
from loadstone.stream.busy import Busy
from loadstone.stream.crew import Crew
from loadstone.stream.source import OpenFiles, manners_of, staging_bytes
from loadstone.stream.spans import CHUNK_BYTES, Fill, Piece, Prepared, Staging, spans_of

_TELL_BYTES = 64 << 20
# The threads that compute come first where they are awake, the ones that expand run while they wait.
_NICENESS = 10


class HostStaging:
    """One buffer over and over: kernels on the host are done with it when they return."""

    def __init__(self) -> None:
        # A map of its own is page-aligned, as reads past the page cache require.
        self._buffer = anonymous(staging_bytes(CHUNK_BYTES))

    def next(self) -> Bytes:
        """The buffer."""
        return self._buffer


def read_now(prepared: Prepared, files: OpenFiles, staging: Staging) -> None:
    """Read in the calling thread, beside whatever a `Reader` has begun: for a little that is waited for.

    Args:
        prepared: what is wanted.
        files: the files it lies in, which stay open.
        staging: of the calling thread.

    Raises:
        TruncatedFile: a file ended early.
        UnreadableFile: a file could not be read.
    """
    for piece in (*prepared.pieces, *prepared.kept):
        piece.deliver(files, staging)


class Batch:
    """Fills that were submitted together.

    Attributes:
        total_bytes: to be read.
        num_kept: pieces that come from memory.
        done_bytes: read and delivered so far.
        files: where it is read from.
        label: what a trace calls it.
    """

    def __init__(
        self,
        pieces: Iterable[Piece],
        total_bytes: int,
        files: OpenFiles,
        *,
        kept: Sequence[Piece] = (),
        close_files: bool,
    ) -> None:
        self.label = ""
        self.total_bytes = total_bytes
        self.num_kept = len(kept)
        self.done_bytes = 0
        self.files = files
        self._lock = threading.Lock()
        self._pieces: Iterator[Piece] = iter(pieces)
        self._kept: Iterator[Piece] = iter(kept)
        self._close_files = close_files
        self._num_running = 0
        self._num_open = bool(total_bytes) + bool(kept)
        self._is_given_up = False
        self._error: BaseException | None = None
        self._over = threading.Event()
        self._begin_s = self._end_s = time.perf_counter()

    @property
    def seconds(self) -> float:
        """From the start to the last byte so far."""
        return self._end_s - self._begin_s

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to wait for."""
        return self._over.is_set()

    def wait(self) -> None:
        """Return when every byte is where it belongs.

        Raises:
            TruncatedFile: a file ended early.
            UnreadableFile: a file could not be read.
        """
        self._over.wait()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Give up what has not begun; returns when nothing of this batch is under way."""
        self._give_up(None)
        self._over.wait()

    def _take(self) -> Piece | None:
        """The next piece to be read, which must be followed by `_run`; None, once, when there is none left."""
        return self._next_of(self._pieces)

    def _take_kept(self) -> Piece | None:
        """The same of what comes from memory."""
        return self._next_of(self._kept)

    def _next_of(self, pieces: Iterator[Piece]) -> Piece | None:
        with self._lock:
            piece = None if self._is_given_up else next(pieces, None)
            if piece is None:
                self._num_open -= 1
                self._finish_if_done()
            else:
                self._num_running += 1
            return piece

    def _run(self, piece: Piece, staging: Staging, tell: Callable[[Batch, int, float], None]) -> None:
        """Bring a piece to where it belongs."""
        begin_s = time.perf_counter()
        try:
            piece.deliver(self.files, staging)
            tell(self, piece.nbytes, begin_s)
        except BaseException as error:  # carried to the thread that waits, and raised there
            self._give_up(error)
        with self._lock:
            self._num_running -= 1
            if self._error is None:
                self.done_bytes += piece.nbytes
                self._end_s = time.perf_counter()
            self._finish_if_done()

    def _give_up(self, error: BaseException | None) -> None:
        with self._lock:
            self._error = self._error or error
            self._is_given_up = True
            self._finish_if_done()

    def _finish_if_done(self) -> None:
        if (self._is_given_up or not self._num_open) and not self._num_running and not self._over.is_set():
            if self._close_files:
                self.files.close()
            self._over.set()


def batch_of(prepared: Prepared, files: OpenFiles, label: str = "") -> Batch:
    """What `Reader.begin` begins; it can be cancelled before."""
    batch = Batch(prepared.pieces, prepared.total_bytes, files, kept=prepared.kept, close_files=False)
    batch.label = label
    return batch


class Reader:
    """Runs batches on threads of its own, which end by themselves when there is nothing to do.

    What is read and what comes from memory have threads each: the disk never waits for the processor.

    Args:
        observer: is told of bytes, of all batches together.
        stage: the name of the stage in those events.
        staging: makes the staging of one thread.
        num_threads: at most; by default what suits the files.

    Attributes:
        tracer: keeps when each thread read what.
    """

    def __init__(
        self,
        *,
        observer: Observer = ignore,
        stage: str = "read",
        staging: Callable[[], Staging] = HostStaging,
        num_threads: int | None = None,
    ) -> None:
        self._observer = observer
        self._stage = stage
        self._max_threads = num_threads
        self._num_cores = num_cores()
        self._lock = threading.Lock()
        self._reading = Crew(Batch._take, self._read, staging, name="loadstone-read")
        self._expanding = Crew(Batch._take_kept, self._expand, staging, name="loadstone-expand", niceness=_NICENESS)
        self._done_bytes = self._told_bytes = self._total_bytes = 0
        self._busy = Busy()
        self.tracer: Tracer = NO_TRACE

    @property
    def done_bytes(self) -> int:
        """How many bytes have arrived, of all batches."""
        return self._done_bytes

    @property
    def busy_s(self) -> float:
        """How long at least one thread was reading."""
        return self._busy.seconds

    @property
    def threads(self) -> tuple[threading.Thread, ...]:
        """Those there are now."""
        return (*self._reading.threads, *self._expanding.threads)

    def submit(self, fills: Sequence[Fill], *, priority: int = 0) -> Batch:
        """Begin to read; returns at once.

        Args:
            fills: what is wanted.
            priority: batches with a lower number come first; of equal ones the earlier.
        """
        files = OpenFiles(manners_of({fill.file: None for fill in fills}))
        total_bytes = sum(fill.nbytes for fill in fills)
        return self.begin(Batch(spans_of(fills), total_bytes, files, close_files=True), priority)

    def repeat(self, prepared: Prepared, files: OpenFiles, *, priority: int = 0, label: str = "") -> Batch:
        """Begin to read what was prepared; returns at once.

        Args:
            prepared: what is wanted.
            files: the files it lies in, which stay open.
            priority: as for `submit`.
            label: what a trace calls it.
        """
        return self.begin(batch_of(prepared, files, label), priority)

    def begin(self, batch: Batch, priority: int = 0) -> Batch:
        """Begin to read a batch that was made before; returns it at once."""
        with self._lock:
            self._total_bytes += batch.total_bytes
        if batch.total_bytes:
            threads = min(batch.files.num_threads, self._max_threads or batch.files.num_threads)
            wanted = min(threads, -(-batch.total_bytes // CHUNK_BYTES))
            self._reading.begin(batch, priority, wanted)
        if batch.num_kept:
            self._expanding.begin(batch, priority, min(self._num_cores, batch.num_kept))
        if not batch.total_bytes and not batch.num_kept:
            batch.cancel()
        return batch

    def close(self) -> None:
        """Cancel every batch and end the threads; whoever begins another has threads again."""
        self._reading.close(Batch.cancel)
        self._expanding.close(Batch.cancel)

    def _read(self, batch: Batch, piece: Piece, staging: Staging) -> None:
        self._busy.begin()
        batch._run(piece, staging, self._tell)
        self._busy.end()

    def _expand(self, batch: Batch, piece: Piece, staging: Staging) -> None:
        batch._run(piece, staging, self._tell_expanded)

    def _tell(self, batch: Batch, nbytes: int, begin_s: float) -> None:
        self.tracer.span("read", batch.label, begin_s, nbytes)
        with self._lock:
            self._done_bytes += nbytes
            if self._done_bytes - self._told_bytes < _TELL_BYTES and self._done_bytes != self._total_bytes:
                return
            self._told_bytes = self._done_bytes
            event = BytesMoved(stage=self._stage, done_bytes=self._done_bytes, total_bytes=self._total_bytes)
        self._observer(event)

    def _tell_expanded(self, batch: Batch, nbytes: int, begin_s: float) -> None:
        self.tracer.span("expand", batch.label, begin_s, nbytes)
