"""What new safetensors files will be, byte for byte, before one is written: shards, headers, offsets, the index.

Sources: https://github.com/huggingface/safetensors#format (the header, and its alignment to 8 bytes) and
https://github.com/huggingface/huggingface_hub/blob/main/src/huggingface_hub/serialization/_base.py (how tensors are
dealt out to shards)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from loadstone.checkpoint.safetensors import LENGTH_BYTES
from loadstone.dtypes import DTYPES, nbytes_of

INDEX_NAME = "model.safetensors.index.json"
_NAME = "model{part}.safetensors"
# What transformers asks of a file before it loads it.
_METADATA = {"format": "pt"}
_HEADER_ALIGNMENT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTensor:
    """A tensor that is to be written: its name, torch's name of its dtype, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes it takes in a file."""
        return nbytes_of(DTYPES[self.dtype], self.numel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A file that is to be written.

    Attributes:
        name: of the file.
        header: everything in front of the first tensor.
        tensors: in the order in which they lie in the file, one right behind the other.
    """

    name: str
    header: bytes
    tensors: tuple[NewTensor, ...]

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


def plan_shards(tensors: Iterable[NewTensor], max_shard_bytes: int) -> tuple[Shard, ...]:
    """Deal tensors out to files as huggingface_hub does: in their order, a new file when the next would not fit.

    Args:
        tensors: what is to be written.
        max_shard_bytes: the most bytes of tensors in a file; a larger tensor gets a file of its own.
    """
    groups: list[list[NewTensor]] = []
    current: list[NewTensor] = []
    room_bytes = max_shard_bytes
    for tensor in tensors:
        if tensor.nbytes > max_shard_bytes:
            groups.append([tensor])
            continue
        if tensor.nbytes > room_bytes:
            groups.append(current)
            current, room_bytes = [], max_shard_bytes
        current.append(tensor)
        room_bytes -= tensor.nbytes
    if current:
        groups.append(current)
    return tuple(_shard(_name(number, len(groups)), group) for number, group in enumerate(groups, 1))


def index_text(shards: Sequence[Shard]) -> str:
    """The content of `model.safetensors.index.json`."""
    by_name = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(by_name.items()))}
    return json.dumps(index, indent=2, ensure_ascii=False) + "\n"


def _name(number: int, count: int) -> str:
    return _NAME.format(part=f"-{number:05d}-of-{count:05d}" if count > 1 else "")


def _shard(name: str, tensors: Sequence[NewTensor]) -> Shard:
    # The widest first, so that each lies at a multiple of its width; beyond that as given, which is how they are read.
    ordered = tuple(sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].bits))
    entries: dict[str, object] = {"__metadata__": _METADATA}
    begin = 0
    for tensor in ordered:
        end = begin + tensor.nbytes
        entries[tensor.name] = {
            "dtype": DTYPES[tensor.dtype].safetensors,
            "shape": tensor.shape,
            "data_offsets": (begin, end),
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return Shard(name=name, header=len(text).to_bytes(LENGTH_BYTES, "little") + text, tensors=ordered)
