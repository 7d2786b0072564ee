"""Small GGUF files, written byte by byte so that each can be wrong in one way."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from loadstone.dtypes import GGML_BLOCKS, GGML_PLAIN, nbytes_of

F32, F16 = 0, 1
U8, U32, I32, F32_VALUE, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10


@dataclass(frozen=True)
class Typed:
    """A metadata value whose type is not the obvious one."""

    kind: int
    raw: bytes


@dataclass(frozen=True)
class Stored:
    """A tensor: shape in torch's order, type code, data (zeros where None), offset (the next free where None)."""

    shape: Sequence[int]
    code: int = F32
    data: bytes | None = None
    offset: int | None = None


@dataclass
class Gguf:
    """A GGUF file; every count can be overridden by a lie."""

    metadata: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Stored] | Sequence[tuple[str, Stored]] = field(default_factory=dict)
    magic: bytes = b"GGUF"
    version: int = 3
    num_tensors: int | None = None
    num_pairs: int | None = None
    alignment: int = 32
    extra_pairs: bytes = b""
    num_extra_pairs: int = 0

    def header(self) -> tuple[bytes, list[bytes]]:
        pairs = list(self.tensors.items()) if isinstance(self.tensors, Mapping) else list(self.tensors)
        num_pairs = len(self.metadata) + self.num_extra_pairs if self.num_pairs is None else self.num_pairs
        num_tensors = len(pairs) if self.num_tensors is None else self.num_tensors
        out = self.magic + struct.pack("<IQQ", self.version, num_tensors, num_pairs)
        for key, value in self.metadata.items():
            out += text(key) + value_bytes(value)
        out += self.extra_pairs
        offset, chunks = 0, []
        for name, tensor in pairs:
            data = bytes(stored_nbytes(tensor)) if tensor.data is None else tensor.data
            out += text(name) + struct.pack("<I", len(tensor.shape))
            out += b"".join(struct.pack("<Q", size) for size in reversed(tensor.shape))
            out += struct.pack("<IQ", tensor.code, offset if tensor.offset is None else tensor.offset)
            padded = data + bytes(-len(data) % self.alignment)
            chunks.append(padded)
            offset += len(padded)
        return out, chunks

    def write(self, path: Path, *, cut: int = 0) -> Path:
        header, chunks = self.header()
        whole = header + bytes(-len(header) % self.alignment) + b"".join(chunks)
        path.write_bytes(whole[: len(whole) - cut])
        return path


def text(string: str | bytes) -> bytes:
    raw = string if isinstance(string, bytes) else string.encode()
    return struct.pack("<Q", len(raw)) + raw


def value_bytes(value: Any) -> bytes:
    if isinstance(value, Typed):
        return struct.pack("<I", value.kind) + value.raw
    if isinstance(value, list):
        return struct.pack("<I", ARRAY) + array_bytes(value)
    kind, raw = scalar_bytes(value)
    return struct.pack("<I", kind) + raw


def array_bytes(values: list[Any]) -> bytes:
    if values and isinstance(values[0], list):
        return struct.pack("<IQ", ARRAY, len(values)) + b"".join(array_bytes(value) for value in values)
    # Whole numbers in lists are signed, as llama.cpp wants the types of tokens.
    signed = [(I32, struct.pack("<i", value)) if type(value) is int else scalar_bytes(value) for value in values]
    kind = signed[0][0] if signed else I32
    return struct.pack("<IQ", kind, len(values)) + b"".join(raw for _, raw in signed)


def scalar_bytes(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return (U32, struct.pack("<I", value)) if value >= 0 else (I32, struct.pack("<i", value))
    if isinstance(value, float):
        return F32_VALUE, struct.pack("<f", value)
    return STRING, text(value)


def stored_nbytes(tensor: Stored) -> int:
    if tensor.code in GGML_BLOCKS:
        block = GGML_BLOCKS[tensor.code]
        return prod(tensor.shape) // block.block_numel * block.block_nbytes
    return nbytes_of(GGML_PLAIN[tensor.code], prod(tensor.shape)) if tensor.code in GGML_PLAIN else 0


def stored_array(array: np.ndarray[Any, Any]) -> Stored:
    return Stored(array.shape, F32, np.ascontiguousarray(array, np.float32).tobytes())
