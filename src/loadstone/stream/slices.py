"""A matrix of which slices of its rows come and go, seen as a whole: a head that does not fit.

Two windows take turns: with the one is computed while the other is read. The memory of a window is shown behind itself
again and again, as far as the matrix reaches. A stretch of the matrix that is no longer than the window therefore lies
where it belongs, wherever it begins, and what is around it are the same bytes once more. So whoever multiplies with the
whole matrix gets the products of that stretch as if all of it were there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from loadstone.hardware.pages import PAGE_BYTES, Bytes, aligned, map_over, whole_pages
from loadstone.plan.values import NUM_WINDOWS
from loadstone.stream.fronts import SharedSlot
from loadstone.stream.read import Batch
from loadstone.stream.rearrange import target_nbytes
from loadstone.stream.refill import Refill, Tensors, Wanted
from loadstone.stream.rows import has_rows, rows_fill
from loadstone.stream.spans import Prepared, prepare


def can_slice(wanted: Wanted, tensors: Tensors, window_bytes: int) -> bool:
    """Whether a parameter is one matrix of which rows can be read by themselves, and fit into a window."""
    return has_rows(wanted, tensors) and target_nbytes(wanted.target) // wanted.target.shape[0] <= _room(window_bytes)


def _room(window_bytes: int) -> int:
    """What rows may take: they begin and end within pages, of which whole ones are read."""
    return window_bytes - 2 * PAGE_BYTES


class _Window:
    """Memory that is seen from the first byte of a matrix to its last; close it.

    Args:
        nbytes: of the matrix.
        window_bytes: of the memory; whole pages.

    Attributes:
        data: all that is seen, shape (nbytes,).
    """

    def __init__(self, nbytes: int, window_bytes: int) -> None:
        self._slot = SharedSlot(window_bytes)
        self._whole = aligned(whole_pages(nbytes))
        self.data = self._whole[:nbytes]
        try:
            for begin in range(0, self._whole.size, window_bytes):
                self._slot.show_at(self._whole[begin : begin + window_bytes])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the memory back; zeros are seen."""
        map_over(self._whole, None)
        self._slot.close()


class Slices:
    """The slices of one matrix, in their order, again and again; close it.

    Args:
        wanted: the matrix; it `can_slice`.
        unit: what holds it and nothing else, as `refill` knows it.
        refill: what reads.
        window_bytes: how much of it is in memory at a time, twice; whole pages.

    Attributes:
        target: its shape and dtype.
        begin: where it begins in what is seen.
        rows: of each slice.
        read_bytes: how much was read so far.
    """

    def __init__(self, wanted: Wanted, unit: str, refill: Refill, window_bytes: int) -> None:
        self.target = wanted.target
        # What is only moved lies as it does in its file, so that the disk writes it where it is used.
        self._is_moved = refill.recipes[unit].is_moved
        self.begin = refill.recipes[unit].places[0].begin if self._is_moved else 0
        num_rows = self.target.shape[0]
        self._nbytes = self.begin + target_nbytes(self.target)
        self._row_bytes = target_nbytes(self.target) // num_rows
        count = _room(window_bytes) // self._row_bytes
        self.rows = tuple(range(begin, min(begin + count, num_rows)) for begin in range(0, num_rows, count))
        self.read_bytes = 0
        self._unit, self._info, self._refill = unit, refill.info(wanted), refill
        self._windows = [_Window(self._nbytes, window_bytes) for _ in range(NUM_WINDOWS)]
        self._prepared: dict[tuple[int, int], Prepared] = {}
        self._coming: deque[Batch] = deque()
        self._num_done = 0
        self._is_settled = True

    def each(self) -> Iterator[tuple[range, Bytes]]:
        """Every slice once it is there; the next one is asked for when nobody uses it any more.

        Yields:
            Its rows, and the memory in which the matrix is seen; only those rows of it are right.

        Raises:
            LoadstoneError: the file cannot be read, or is not the one whose header was read.
        """
        if not self._is_settled:  # the last time ended in the midst of it, or of beginning a read
            self.drop()
        self._is_settled = False
        for rows in self.rows:
            while len(self._coming) < NUM_WINDOWS:
                self._begin()
            window = self._windows[self._num_done % NUM_WINDOWS]
            try:
                self._coming[0].wait()
                self._refill.check(self._unit)
            except BaseException:
                self.drop()  # the right file may be put back
                raise
            self.read_bytes += self._coming[0].total_bytes
            yield rows, window.data
            self._coming.popleft()
            self._num_done += 1
            self._begin()
        self._is_settled = True

    def drop(self) -> None:
        """Begin anew with the first slice; nothing that was read is used."""
        while self._coming:
            self._coming[-1].cancel()
            self._coming.pop()
        self._num_done = 0

    def close(self) -> None:
        """Read nothing any more, and give the memory back."""
        self.drop()
        self._prepared.clear()
        for window in self._windows:
            window.close()

    def _begin(self) -> None:
        """Begin to read the first slice that is neither there nor on its way, into the window whose turn it is."""
        number = self._num_done + len(self._coming)
        key = number % len(self.rows), number % NUM_WINDOWS
        if key not in self._prepared:
            self._prepared[key] = self._prepare(self.rows[key[0]], self._windows[key[1]].data)
        batch = self._refill.batch_of(self._unit, self._prepared[key])
        self._coming.append(batch)  # before it runs: an interrupt can come at any line
        self._refill.reader.begin(batch)

    def _prepare(self, rows: range, memory: Bytes) -> Prepared:
        if not self._is_moved:
            return prepare([rows_fill(self._info, self.target, memory, rows)])
        begin, end = (self.begin + row * self._row_bytes for row in (rows.start, rows.stop))
        first, last = begin // PAGE_BYTES * PAGE_BYTES, min(self._nbytes, whole_pages(end))
        return self._refill.recipes[self._unit].prepare_part(first, last, memory)
