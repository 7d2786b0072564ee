"""Stretches of units that stay in memory compressed: they are read once, and expanded in each pass."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from loadstone.compression import kept_bytes, whole_grains
from loadstone.compressor import compress, expand
from loadstone.hardware.pages import Bytes, anonymous
from loadstone.stream.source import OpenFiles
from loadstone.stream.spans import CHUNK_BYTES, Fill, Prepared, Staging, spans_of


@dataclass(slots=True, eq=False)
class _Stretch:
    """What is read in one go, and compressed by itself.

    Attributes:
        begin: its first byte in the unit.
        fill: where it is read from.
        kept: its compressed bytes; None where it is not kept.
        is_settled: whether it is known if it can be.
    """

    begin: int
    fill: Fill
    kept: Bytes | None = None
    is_settled: bool = False

    def place(self, memory: Bytes) -> Bytes:
        return memory[self.begin : self.begin + self.fill.nbytes]


@dataclass(frozen=True, slots=True)
class _Expansion:
    """A stretch that comes from memory."""

    compressed: Bytes
    destination: Bytes
    nbytes: int = 0  # that are read

    def deliver(self, files: OpenFiles, staging: Staging) -> None:
        """Expand it to where it belongs."""
        del files, staging
        expand(self.compressed, self.destination)


def _stretches(begin: int, fill: Fill) -> Iterator[_Stretch]:
    """What is read in chunks; what is left of whole grains at the end is not kept."""
    whole = whole_grains(fill.nbytes)
    for at in (*range(0, whole, CHUNK_BYTES), *((whole,) if whole < fill.nbytes else ())):
        end = min(at + CHUNK_BYTES, whole) if at < whole else fill.nbytes
        part = replace(fill, offset=fill.offset + at, nbytes=end - at)
        yield _Stretch(begin + at, part, is_settled=at == whole)


class Compressed:
    """The part of one unit that is kept compressed.

    Args:
        parts: what is read for it, each with where it begins in the unit, all of them stretches of 16-bit numbers that
            only move.
    """

    def __init__(self, parts: Iterable[tuple[int, Fill]]) -> None:
        self._stretches = [stretch for begin, fill in parts for stretch in _stretches(begin, fill)]
        self._lock = threading.Lock()
        self._used_bytes = 0
        self._prepared: dict[tuple[int, int], Prepared] = {}
        # Sparse: what is not used of it is never touched.
        self._memory = anonymous(max(1, kept_bytes(self.nbytes)), sparse=True)

    @property
    def nbytes(self) -> int:
        """How much it is uncompressed."""
        return sum(stretch.fill.nbytes for stretch in self._stretches)

    @property
    def is_settled(self) -> bool:
        """Whether all of it is there that can be kept."""
        return all(stretch.is_settled for stretch in self._stretches)

    @property
    def read_bytes(self) -> int:
        """What is read of it each time, because it takes more memory than was planned for it."""
        return sum(stretch.fill.nbytes for stretch in self._stretches if stretch.is_settled and stretch.kept is None)

    def missing(self) -> list[Fill]:
        """What is read only to be kept."""
        return [
            replace(stretch.fill, kernel=partial(self._keep, stretch), fresh=False)
            for stretch in self._stretches
            if not stretch.is_settled
        ]

    def prepare(self, memory: Bytes, others: Sequence[Fill]) -> Prepared:
        """What brings all of it, and others, into the memory of the unit.

        What is read may be kept on the way.

        Args:
            memory: for all of the unit.
            others: what is read besides; as many are the same for the same memory.
        """
        if not self.is_settled:
            return self._pieces(memory, others)
        key = (memory.ctypes.data, len(others))
        if key not in self._prepared:
            self._prepared[key] = self._pieces(memory, others)
        return self._prepared[key]

    def forget(self, memory: Bytes) -> None:
        """Hold on to memory no longer."""
        for key in [key for key in self._prepared if key[0] == memory.ctypes.data]:
            del self._prepared[key]

    def _pieces(self, memory: Bytes, others: Sequence[Fill]) -> Prepared:
        fills = [*others, *(self._fill(stretch, memory) for stretch in self._stretches if stretch.kept is None)]
        kept = [(stretch.kept, stretch.place(memory)) for stretch in self._stretches if stretch.kept is not None]
        return Prepared(
            pieces=tuple(spans_of(fills)),
            total_bytes=sum(fill.nbytes for fill in fills),
            kept=tuple(_Expansion(compressed, place) for compressed, place in kept),
        )

    def _fill(self, stretch: _Stretch, memory: Bytes) -> Fill:
        kernel = stretch.fill.kernel if stretch.is_settled else partial(self._keep_and_copy, stretch)
        return replace(stretch.fill, kernel=kernel, destination=stretch.place(memory), fresh=False)

    def _keep(self, stretch: _Stretch, source: Bytes, _: object) -> None:
        if stretch.is_settled:
            return
        compressed = np.frombuffer(compress(source), np.uint8)
        with self._lock:
            begin, end = self._used_bytes, self._used_bytes + compressed.size
            if end <= self._memory.size:
                self._used_bytes = end
                kept = self._memory[begin:end]
                kept[:] = compressed
                stretch.kept = kept
            stretch.is_settled = True

    def _keep_and_copy(self, stretch: _Stretch, source: Bytes, destination: Bytes) -> None:
        destination[:] = source
        self._keep(stretch, source, destination)
