"""Checkpoint tensors -> new files at known offsets, in memory that does not grow with the tensors.

A file is made of pieces, in order. Threads read, cast and decode some pieces ahead, each into a slot of its own; one
thread writes the piece whose turn it is while another one hashes it. A tensor that is larger than a slot comes in
several pieces. Only a tensor that must be rearranged as a whole, as some of GGUF are, gets memory of its own, and one
at a time. Several files are written at once, because one core hashes no faster than 0.4 to 2 GB/s.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice

from loadstone.architecture.keymap import Assignment
from loadstone.checkpoint.files import write_at
from loadstone.checkpoint.new_folder import NewFolder
from loadstone.checkpoint.values import TensorInfo
from loadstone.checkpoint.write import Shard
from loadstone.events import BytesMoved, Observer, ignore
from loadstone.hardware.memory import num_cores
from loadstone.hardware.pages import Bytes, anonymous
from loadstone.stream.host import FileMaps
from loadstone.stream.memory import Gatherer
from loadstone.stream.pieces import Piece, Room, compose_bytes, gather_bytes, pieces_of
from loadstone.stream.read import Reader
from loadstone.stream.source import ALIGNMENT, staging_bytes
from loadstone.stream.spans import CHUNK_BYTES

STAGE = "write"
SLOT_BYTES = 8 << 20
# One that is written, and enough behind it that readers never wait for it.
_NUM_SLOTS = 3
_READ_THREADS = 8
_MAX_FILES_AT_ONCE = 4
# What a kernel takes beside its source and destination, of which a thread runs one at a time.
_KERNEL_BYTES = 8 << 20
# What is kept for each tensor: its entries in headers, its plan, its fills.
_TENSOR_BYTES = 4096
# The interpreter's own: thread stacks, allocator's slack, numpy's caches.
_FIXED_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where new tensors come from.

    Attributes:
        tensors: the checkpoint's, by name.
        assignments: what fills each new tensor, by the new tensor's name.
    """

    tensors: Mapping[str, TensorInfo]
    assignments: Mapping[str, Assignment]


def bound_bytes(shards: Sequence[Shard], sources: Sources, cores: int) -> int:
    """The most anonymous memory that `rewrite` takes, known before a byte is read.

    Args:
        shards: what is to be written.
        sources: where it comes from.
        cores: that this process may run on.
    """
    slots = _files_at_once(shards, cores) * _NUM_SLOTS * (SLOT_BYTES + ALIGNMENT)
    threads = _READ_THREADS * (staging_bytes(CHUNK_BYTES) + _KERNEL_BYTES)
    composed = max(
        (
            compose_bytes(tensor, sources.assignments[tensor.name], sources.tensors)
            for shard in shards
            for tensor in shard.tensors
        ),
        default=0,
    )
    gathered = _files_at_once(shards, cores) * gather_bytes(sources.tensors.values())
    described = _TENSOR_BYTES * sum(len(shard.tensors) for shard in shards)
    return slots + threads + composed + gathered + described + _FIXED_BYTES


def rewrite(shards: Sequence[Shard], sources: Sources, folder: NewFolder, observer: Observer = ignore) -> None:
    """Write files into a new folder, and tell it when each is finished.

    Args:
        shards: the files; each is finished as soon as it is on the disk.
        sources: where their tensors come from.
        folder: where they go.
        observer: is told of the bytes written, as stage `write`.

    Raises:
        TruncatedFile: a source ended early.
        OSError: something could not be read or written.
    """
    run = _Run(sources=sources, folder=folder, observer=observer, total_bytes=sum(shard.nbytes for shard in shards))
    with ThreadPoolExecutor(_files_at_once(shards, num_cores()) or 1, "loadstone-write") as workers:
        files = [workers.submit(run.write, shard) for shard in shards]
        try:
            wait(files, return_when=FIRST_EXCEPTION)
        finally:
            run.stopped.set()
            workers.shutdown(cancel_futures=True)
            run.reader.close()
    for file in files:
        if not file.cancelled():
            file.result()


def _files_at_once(shards: Sequence[Shard], cores: int) -> int:
    return min(len(shards), cores, _MAX_FILES_AT_ONCE)


@dataclass(slots=True, kw_only=True)
class _Run:
    """What the files that are written at once share."""

    sources: Sources
    folder: NewFolder
    observer: Observer
    total_bytes: int
    reader: Reader = field(default_factory=lambda: Reader(num_threads=_READ_THREADS))
    maps: FileMaps = field(default_factory=FileMaps)
    stopped: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    alone: threading.Lock = field(default_factory=threading.Lock)
    done_bytes: int = 0

    def write(self, shard: Shard) -> None:
        """Write one file to its end, unless another one failed."""
        digest = hashlib.sha256(shard.header)
        # Not the module's open(): a descriptor is written at offsets, and nothing is buffered.
        fd = os.open(self.folder.path / shard.name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            with ThreadPoolExecutor(1, "loadstone-hash") as hasher, Gatherer() as gatherer:
                write_at(fd, memoryview(shard.header), 0)
                self._tell(len(shard.header))
                for offset, data in self._produced(shard, gatherer):
                    hashed = hasher.submit(digest.update, data.data)
                    try:
                        write_at(fd, data.data, offset)
                    finally:
                        hashed.result()
                    self._tell(data.size)
        finally:
            os.close(fd)
        if not self.stopped.is_set():
            with self.lock:
                self.folder.finish(shard.name, digest.hexdigest())

    def _produced(self, shard: Shard, gatherer: Gatherer) -> Iterator[tuple[int, Bytes]]:
        """The pieces of a file in order, with some more being read behind the one that is given."""
        pieces = pieces_of(shard, self.sources.assignments, self.sources.tensors, SLOT_BYTES)
        free = [anonymous(SLOT_BYTES + ALIGNMENT) for _ in range(_NUM_SLOTS)]
        ahead: deque[tuple[Piece, Bytes, Callable[[], Bytes]]] = deque()
        while not self.stopped.is_set():
            for piece in islice(pieces, len(free)):
                slot = free.pop()
                room = Room(slot=slot, reader=self.reader, maps=self.maps, gatherer=gatherer)
                ahead.append((piece, slot, piece.begin(room)))
            if not ahead:
                return
            piece, slot, finish = ahead.popleft()
            if piece.alone:
                with self.alone:
                    yield piece.offset, finish()
            else:
                yield piece.offset, finish()
            free.append(slot)
            del piece, finish  # what has memory of its own gives it back before the next one begins

    def _tell(self, nbytes: int) -> None:
        with self.lock:
            self.done_bytes += nbytes
            event = BytesMoved(stage=STAGE, done_bytes=self.done_bytes, total_bytes=self.total_bytes)
        self.observer(event)
