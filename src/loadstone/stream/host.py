"""Checkpoint tensors as host bytes: which can be used where they lie in the file, and which must be read and decoded.

Nothing here knows torch, so that it can begin while torch is still being imported.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from loadstone.checkpoint.files import unreadable
from loadstone.checkpoint.values import Checkpoint, TensorInfo
from loadstone.dtypes import DTYPES, GGML_BLOCKS_BY_NAME, nbytes_of
from loadstone.errors import TruncatedFile, UnreadableFile
from loadstone.events import Observer
from loadstone.hardware.pages import Bytes
from loadstone.hardware.storage import storages_of
from loadstone.stream.convert import Kernel, kernel_for, through
from loadstone.stream.dequantize import dequantize
from loadstone.stream.memory import TOUCH_BYTES, Arena, Toucher, map_file
from loadstone.stream.prefault import Prefault, Wait, at_once
from loadstone.stream.read import Batch, Reader
from loadstone.stream.spans import Fill

# One tensor per expert: such tensors become slices of a fused one, which the key map knows and this file does not.
# A gap between tensors that is shorter costs more to step over than to bring in.
_WORTH_SKIPPING = 1 << 16
_EXPERT = re.compile(r"\.experts?\.\d+\.")


class FileMaps:
    """Each weight file mapped once, on first use."""

    def __init__(self) -> None:
        self._maps: dict[Path, Bytes] = {}

    def whole(self, path: Path) -> Bytes:
        """All bytes of a file."""
        if path not in self._maps:
            self._maps[path] = map_file(path)
        return self._maps[path]

    def bytes_of(self, info: TensorInfo) -> Bytes:
        """The stored bytes of a tensor, as a view of the map."""
        mapped = self.whole(info.file)
        if info.offset + info.nbytes > mapped.size:
            raise _cut_short(info, mapped.size)
        return mapped[info.offset : info.offset + info.nbytes]


def lost(info: TensorInfo) -> TruncatedFile | UnreadableFile:
    """The fault of a tensor whose mapped bytes are not there any more."""
    try:
        found_bytes = info.file.stat().st_size
    except OSError as error:
        return unreadable(info.file, error)
    if found_bytes < info.offset + info.nbytes:
        return _cut_short(info, found_bytes)
    return unreadable(info.file, OSError(errno.EIO, os.strerror(errno.EIO)))


def _cut_short(info: TensorInfo, found_bytes: int) -> TruncatedFile:
    return TruncatedFile(
        f"{info.file}: {info.name} ends at byte {info.offset + info.nbytes:,}, but the file now has {found_bytes:,}; "
        "it was cut short after it was opened. Download it again."
    )


def is_mappable(info: TensorInfo, dtype: str) -> bool:
    """Whether the bytes in the file are what memory must hold: same dtype, plain, contiguous, aligned."""
    return info.encoding is None and info.dtype == dtype and info.strides is None and info.is_aligned


def stretches(infos: Iterable[TensorInfo]) -> list[tuple[Path, int, int]]:
    """The parts of files that hold tensors, as (file, begin, end): what lies between them is not brought in.

    A checkpoint of which a part is loaded, or one with optimizer states, has long stretches that nobody asks for.
    """
    places: dict[Path, list[tuple[int, int]]] = {}
    for info in infos:
        if info.nbytes:
            places.setdefault(info.file, []).append((info.offset, info.offset + info.nbytes))
    found: list[tuple[Path, int, int]] = []
    for path, spans in places.items():
        spans.sort()
        start, stop = spans[0]
        for begin, end in spans:
            if begin - stop > _WORTH_SKIPPING:
                found.append((path, start, stop))
                start = begin
            stop = max(stop, end)
        found.append((path, start, stop))
    return found


def fill_for(info: TensorInfo, dtype: str, destination: Bytes, *, fresh: bool = True) -> Fill | None:
    """How to read a tensor into `destination` as `dtype`.

    Args:
        info: the tensor.
        dtype: torch's name of the wanted dtype.
        destination: bytes, exactly as many as the tensor takes in that dtype.
        fresh: they are zeroed and were never touched.

    Returns:
        None where torch must do it: strided tensors, and casts that numpy does not have.
    """
    if info.strides is not None:
        return None
    if info.encoding is not None:
        block = GGML_BLOCKS_BY_NAME[info.encoding]
        kernel = _decoder(info.encoding, dtype)
        widths = (block.block_nbytes * 8, block.block_numel * DTYPES[dtype].bits)
    else:
        kernel = kernel_for(info.dtype, dtype, fresh=fresh)
        widths = (DTYPES[info.dtype].bits, DTYPES[dtype].bits)
    if kernel is None:
        return None
    return Fill(
        file=info.file,
        offset=info.offset,
        nbytes=info.nbytes,
        destination=destination,
        kernel=kernel,
        source_bits=widths[0],
        destination_bits=widths[1],
        fresh=fresh,
    )


@functools.cache  # neighbours with one and the same kernel can be read as one
def _decoder(encoding: str, dtype: str) -> Kernel | None:
    def to_float32(source: Bytes, destination: Bytes) -> None:
        dequantize(source, encoding, destination.view("<f4"))

    if dtype == "float32":
        return to_float32
    cast = kernel_for("float32", dtype)
    if cast is None:
        return None
    block = GGML_BLOCKS_BY_NAME[encoding]
    return through(
        to_float32,
        cast,
        source=block.block_nbytes,
        middle=4 * block.block_numel,
        destination=block.block_numel * DTYPES[dtype].bits // 8,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """A tensor that is being read into memory of its own."""

    dtype: str
    data: Bytes


class Ahead:
    """What can begin as soon as the headers are known: mapped bytes come in, casts and decoding run.

    Args:
        observer: is told of bytes.
        after: is waited for before mapped bytes come in beside the imports.

    Attributes:
        maps: the files.
        arena: where decoded tensors go.
        decoded: tensors under way or done, by checkpoint name.
        observer: who is told of bytes.
        reader: what reads them, and whatever else the load wants read.
    """

    def __init__(self, observer: Observer, after: Wait = at_once) -> None:
        self.maps = FileMaps()
        self._after = after
        self.arena = Arena()
        self.decoded: dict[str, Decoded] = {}
        self.observer = observer
        self.reader = Reader(observer=observer)
        self._batch: Batch | None = None
        self._unmapped: frozenset[Path] = frozenset()
        self._prefault: Prefault | None = None

    def begin(
        self,
        checkpoint: Checkpoint,
        wanted_dtype: Callable[[TensorInfo], str],
        *,
        decode: bool,
        skip: Collection[str] = (),
    ) -> None:
        """Start on every tensor; returns at once.

        Args:
            checkpoint: what is loaded.
            wanted_dtype: the dtype a tensor will most likely be wanted in.
            decode: whether to decode and cast now; without it only mapped bytes are brought in.
            skip: the names of tensors that are left alone.
        """
        fills, mapped = [], dict.fromkeys(file.path for file in checkpoint.files)
        # A page fault over a network is a round trip, and a lost connection ends the process.
        self._unmapped = frozenset(path for path, storage in storages_of(mapped).items() if storage.network)
        places: dict[tuple[Path, int, int, str], Decoded] = {}
        for info in checkpoint.tensors.values():
            dtype = wanted_dtype(info)
            if self.is_mappable(info, dtype) or not decode or info.name in skip or _EXPERT.search(info.name):
                continue
            if info.strides is not None:
                continue
            # Tied tensors of torch pickles are the same bytes under several names.
            place = (info.file, info.offset, info.nbytes, dtype)
            if place not in places:
                data = self.arena.take(nbytes_of(DTYPES[dtype], info.numel))
                fill = fill_for(info, dtype, data)
                if fill is None:
                    continue
                fills.append(fill)
                places[place] = Decoded(dtype=dtype, data=data)
            self.decoded[info.name] = places[place]
        decoded_files = {fill.file for fill in fills}
        self._batch = self.reader.submit(fills)
        ranges = [
            (path, self.maps.whole(path)[begin:end])
            for path, begin, end in stretches(info for info in checkpoint.tensors.values() if info.name not in skip)
            if path not in self._unmapped | decoded_files
        ]
        if ranges:
            self._prefault = Prefault(
                ranges, beside_imports="torch" not in sys.modules, after=self._after, observer=self.observer
            )

    def is_mappable(self, info: TensorInfo, dtype: str) -> bool:
        """Whether a tensor is used where it lies in its file."""
        return info.file not in self._unmapped and is_mappable(info, dtype)

    def stored(self, info: TensorInfo) -> Bytes:
        """The stored bytes of a tensor, for whoever works on them now: a view whose pages are there, or a copy.

        Raises:
            TruncatedFile: the file was cut short after it was opened.
            UnreadableFile: it cannot be read any more.
        """
        if info.file in self._unmapped:
            data = self.arena.take(info.nbytes)
            self.reader.submit([Fill(file=info.file, offset=info.offset, nbytes=info.nbytes, destination=data)]).wait()
            return data
        data = self.maps.bytes_of(info)
        with Toucher() as toucher:
            for begin in range(0, data.size, TOUCH_BYTES):
                if not toucher.touch(data[begin : begin + TOUCH_BYTES]):
                    raise lost(info)
        return data

    @property
    def read_bytes(self) -> int:
        """The bytes that were read so far, to be cast or decoded."""
        return self._batch.done_bytes if self._batch is not None else 0

    @property
    def read_s(self) -> float:
        """How long that took."""
        return self._batch.seconds if self._batch is not None else 0.0

    @property
    def paged_bytes(self) -> int:
        """The mapped bytes that have been brought in so far."""
        return self._prefault.done_bytes if self._prefault is not None else 0

    @property
    def paged_s(self) -> float:
        """How long it took to bring them in."""
        return self._prefault.seconds if self._prefault is not None else 0.0

    def wait(self) -> None:
        """Return when everything that was begun to decode is there; mapped bytes may still be coming in."""
        if self._batch is not None:
            self._batch.wait()

    def wait_for_pages(self) -> None:
        """Return when the mapped bytes are in memory too.

        Raises:
            TruncatedFile: a file was cut short meanwhile.
        """
        if self._prefault is not None:
            self._prefault.wait()

    def stop_paging(self) -> None:
        """Bring no more mapped bytes in."""
        if self._prefault is not None:
            self._prefault.stop()

    def close(self) -> None:
        """Stop what is under way and end the threads; what is there may be dropped."""
        self.reader.close()
        self.stop_paging()
