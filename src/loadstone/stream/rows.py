"""A table of which only the rows that are looked up are read: an embedding that is not kept in memory.

The table is as large as ever and lies in memory that the system has only promised: rows are read to where they belong,
so that whoever looks them up needs to know nothing of it, and pages without a row that was wanted do not exist.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from loadstone.architecture.keymap import Target
from loadstone.checkpoint.files import check_unchanged
from loadstone.checkpoint.values import TensorInfo
from loadstone.dtypes import DTYPES, GGML_BLOCKS_BY_NAME, nbytes_of
from loadstone.hardware.pages import PAGE_BYTES, Bytes, anonymous, give_back
from loadstone.stream.host import fill_for
from loadstone.stream.read import HostStaging, read_now
from loadstone.stream.rearrange import is_rearranged, target_nbytes
from loadstone.stream.refill import Refill, Wanted
from loadstone.stream.spans import Fill, prepare

# Rows of earlier passes that stay; the words that a text repeats are most of it.
_KEPT_BYTES = 4 << 20
# So many stretches are read by the thread that wants them, one after another: the row of a decoding pass.
_FEW_SPANS = 2
_NOWHERE = np.empty(0, np.uint8)
_BLOCK_NUMEL = {name: block.block_numel for name, block in GGML_BLOCKS_BY_NAME.items()}


def has_rows(wanted: Wanted, tensors: dict[str, TensorInfo] | Any) -> bool:
    """Whether a parameter's rows can be read one by one: one whole tensor, and whole blocks in each row."""
    part, *others = wanted.assignment.parts
    info, target = tensors[part.source], wanted.target
    if others or len(target.shape) != 2 or info.shape != target.shape or is_rearranged(part, info):
        return False
    whole_blocks = target.shape[1] % _BLOCK_NUMEL.get(info.encoding or "", 1) == 0
    return whole_blocks and fill_for(info, target.dtype, _NOWHERE, fresh=False) is not None


def rows_fill(info: TensorInfo, target: Target, table: Bytes, rows: range) -> Fill:
    """What reads some rows of a table to where they belong.

    Args:
        info: the tensor.
        target: shape and dtype of the table.
        table: the memory of all of it, shape (nbytes,).
        rows: their numbers, one after another.
    """
    whole = fill_for(info, target.dtype, table, fresh=False)
    if whole is None:
        raise ValueError(f"{info.name}: its rows cannot be read one by one")
    stored, row_bytes = info.nbytes // target.shape[0], nbytes_of(DTYPES[target.dtype], target.shape[1])
    return replace(
        whole,
        offset=info.offset + rows.start * stored,
        nbytes=len(rows) * stored,
        destination=table[rows.start * row_bytes : rows.stop * row_bytes],
    )


class Table(Protocol):
    """A table on the host of which rows are looked up.

    Attributes:
        read_bytes: how much was read so far.
    """

    read_bytes: int

    def bring(self, ids: NDArray[np.int64]) -> None:
        """Return when the rows of these numbers are there."""

    def trim(self) -> None:
        """Nothing that lies in the table is used any more."""


class WholeTable:
    """A table that is in memory as a whole."""

    def __init__(self) -> None:
        self.read_bytes = 0

    def bring(self, ids: NDArray[np.int64]) -> None:
        """All rows are there."""

    def trim(self) -> None:
        """And stay."""


class Rows:
    """The table, of which rows can be brought in.

    Args:
        wanted: the parameter; it `has_rows`.
        info: its tensor.
        refill: what reads.

    Attributes:
        target: its shape and dtype.
        data: the bytes of the table.
        read_bytes: how much was read so far.
    """

    def __init__(self, wanted: Wanted, info: TensorInfo, refill: Refill) -> None:
        self.target: Target = wanted.target
        self.data = anonymous(target_nbytes(wanted.target), sparse=True)
        self.read_bytes = 0
        self._info = info
        self._refill = refill
        self._staging = HostStaging()
        self._versions = refill.versions([wanted])
        self._present = np.zeros(wanted.target.shape[0], np.bool_)
        self._row_bytes = nbytes_of(DTYPES[wanted.target.dtype], wanted.target.shape[1])

    def bring(self, ids: NDArray[np.int64]) -> None:
        """Return when the rows of these numbers are there; numbers that are none are left alone.

        Raises:
            LoadstoneError: the file cannot be read, or is not the one whose header was read.
        """
        wanted = np.unique(ids)
        wanted = wanted[(wanted >= 0) & (wanted < self._present.size)]
        missing = wanted[~self._present[wanted]]
        if missing.size:
            runs = np.split(missing, np.flatnonzero(np.diff(missing) != 1) + 1)
            stretches = (range(int(run[0]), int(run[-1]) + 1) for run in runs)
            prepared = prepare([rows_fill(self._info, self.target, self.data, rows) for rows in stretches])
            if len(prepared.pieces) <= _FEW_SPANS:
                # The reader's threads are in the midst of long reads, which would have to end first.
                read_now(prepared, self._refill.files, self._staging)
            else:
                self._refill.reader.repeat(prepared, self._refill.files, priority=-1, label=self._info.name).wait()
            self.read_bytes += prepared.total_bytes
            self._present[missing] = True
        try:
            check_unchanged(self._versions)
        except BaseException:
            self._forget()  # the right file may be put back
            raise

    def trim(self) -> None:
        """Drop the rows once they take more than a few megabytes."""
        pages_of_row = -(-self._row_bytes // PAGE_BYTES) + (self._row_bytes % PAGE_BYTES != 0)
        if int(self._present.sum()) * pages_of_row * PAGE_BYTES > _KEPT_BYTES:
            self._forget()

    def _forget(self) -> None:
        give_back(self.data)
        self._present[:] = False
