"""GGUF files: which tensors and which metadata they hold, from their headers alone.

The header is walked in bytes that were read, not mapped (a file cut short must not kill the process), in chunks that
double: at most twice
what the header takes is read. Every count and length is checked
against the bytes that are left before anything is built from it.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from loadstone.checkpoint.files import version_of
from loadstone.checkpoint.gguf_split import join_parts, part_paths
from loadstone.checkpoint.values import Checkpoint, CheckpointFile, Format, TensorInfo
from loadstone.dtypes import GGML_BLOCKS, GGML_PLAIN, nbytes_of
from loadstone.errors import InvalidHeader, SourceNotFound, TruncatedFile, UnsupportedFormat

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# The largest headers in use are near 16 MB (vocabularies of 260,000 tokens); beyond this a header lies.
MAX_HEADER_BYTES = 1 << 26
MAX_STRING_BYTES = 1 << 24
MAX_KEY_BYTES = (1 << 16) - 1
MAX_DIMS = 4
MAX_ARRAY_DEPTH = 4
FIRST_READ_BYTES = 1 << 20

# Value types of metadata: struct format and numpy dtype of an element.
# Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (gguf_metadata_value_type)
_SCALARS = {
    0: (struct.Struct("<B"), "u1"),
    1: (struct.Struct("<b"), "i1"),
    2: (struct.Struct("<H"), "<u2"),
    3: (struct.Struct("<h"), "<i2"),
    4: (struct.Struct("<I"), "<u4"),
    5: (struct.Struct("<i"), "<i4"),
    6: (struct.Struct("<f"), "<f4"),
    7: (struct.Struct("<?"), "?"),
    10: (struct.Struct("<Q"), "<u8"),
    11: (struct.Struct("<q"), "<i8"),
    12: (struct.Struct("<d"), "<f8"),
}
_STRING, _ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_ARRAY_HEAD = struct.Struct("<IQ")

# The least bytes that a key-value pair (key length, one-byte key, type, one-byte value) and a tensor (name length,
# number of dimensions, type, offset) can take.
_LEAST_PAIR_BYTES, _LEAST_TENSOR_BYTES = 14, 24

# Facts of the architecture that some converters store as a tensor: read with the header, kept beside the metadata.
# Source: https://github.com/ggml-org/llama.cpp/blob/master/conversion/llama.py (generate_extra_tensors)
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_MAX_ROPE_FACTORS = 4096


def read_gguf(path: Path) -> Checkpoint:
    """Read the header of a GGUF file, and of the other parts if it is one of several.

    Args:
        path: the file; any part of a split model (`name-00001-of-00003.gguf`).

    Returns:
        The checkpoint: tensors in file order, all key-value pairs as metadata (those of the first part, for a split
        model), and the values of rotary factor tensors under the tensors' names. Its config is None.

    Raises:
        SourceNotFound: there is no such file.
        UnsupportedFormat: not GGUF, another version, big-endian, or an element type that is not known.
        TruncatedFile: the file ends before its header, or before its last tensor.
        InvalidHeader: the header contradicts itself or the file's size.
        MissingShard: a part of a split model is missing.
    """
    first = _read_part(path)
    num_parts = first.metadata.get("split.count", 1)
    if not isinstance(num_parts, int) or num_parts <= 1:
        return first
    return join_parts([_read_part(part) for part in part_paths(path, num_parts)])


def _read_part(path: Path) -> Checkpoint:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            header = _Header(path=path, file=file, file_nbytes=status.st_size)
            num_tensors, num_pairs = header.read_preamble()
            metadata = header.read_metadata(num_pairs)
            rows = header.read_tensors(num_tensors)
            tensors = _place(header, rows, _alignment(header, metadata))
            metadata |= _read_rope_factors(header, tensors)
    except FileNotFoundError:
        raise SourceNotFound(f"{path}: there is no such file.") from None
    return Checkpoint(
        format=Format.GGUF,
        root=path.parent,
        files=(CheckpointFile(path=path, nbytes=status.st_size, version=version_of(status)),),
        tensors=tensors,
        metadata=metadata,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A tensor as the header gives it: shape in torch's order, type code, offset from the start of the data."""

    name: str
    shape: tuple[int, ...]
    code: int
    offset: int


@dataclass(slots=True, kw_only=True)
class _Header:
    """The front of a file, read as far as it was needed, and a position in it."""

    path: Path
    file: BinaryIO
    file_nbytes: int
    buffer: bytes = b""
    position: int = 0

    def invalid(self, what: str) -> InvalidHeader:
        return InvalidHeader(f"{self.path}: {what}; the file is damaged or not GGUF, download it again.")

    def need(self, nbytes: int, what: str) -> None:
        """Have `nbytes` from the position on in the buffer."""
        end = self.position + nbytes
        if end <= len(self.buffer):
            return
        if end > self.file_nbytes:
            raise TruncatedFile(
                f"{self.path}: the header ends at byte {self.file_nbytes} in the middle of {what}, which needs "
                f"{nbytes} bytes from byte {self.position} on; the file was cut short, download it again."
            )
        if end > MAX_HEADER_BYTES:
            raise self.invalid(f"the header is larger than {MAX_HEADER_BYTES} bytes ({what} ends at byte {end})")
        wanted = max(end, FIRST_READ_BYTES, len(self.buffer) * 2)
        self.buffer += self.file.read(wanted - len(self.buffer))
        if end > len(self.buffer):
            raise TruncatedFile(f"{self.path}: only {len(self.buffer)} of {self.file_nbytes} bytes could be read.")

    def left(self) -> int:
        """The bytes of the file behind the position."""
        return self.file_nbytes - self.position

    def number(self, kind: struct.Struct, what: str) -> Any:
        self.need(kind.size, what)
        (value,) = kind.unpack_from(self.buffer, self.position)
        self.position += kind.size
        return value

    def read_preamble(self) -> tuple[int, int]:
        """Check magic and version; return the numbers of tensors and of key-value pairs."""
        self.need(4, "the magic")
        if self.buffer[:4] != MAGIC:
            raise UnsupportedFormat(
                f'{self.path}: expected a GGUF file, which begins with the bytes "GGUF", found {self.buffer[:4]!r}.'
            )
        self.position = 4
        version = self.number(_U32, "the version")
        if version & 0xFFFF == 0 and version:
            raise UnsupportedFormat(
                f"{self.path}: a big-endian GGUF file; only little-endian ones are read. "
                "Convert it with gguf-py's gguf-convert-endian."
            )
        if version not in VERSIONS:
            raise UnsupportedFormat(
                f"{self.path}: GGUF version {version}; versions {' and '.join(map(str, VERSIONS))} are read. "
                "Convert the model again with a current llama.cpp."
            )
        num_tensors = self.number(_U64, "the number of tensors")
        num_pairs = self.number(_U64, "the number of metadata pairs")
        if num_pairs * _LEAST_PAIR_BYTES + num_tensors * _LEAST_TENSOR_BYTES > self.left():
            raise self.invalid(
                f"{num_tensors} tensors and {num_pairs} metadata pairs cannot lie in a file of {self.file_nbytes} bytes"
            )
        return num_tensors, num_pairs

    def read_metadata(self, num_pairs: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self.read_string("a metadata key", MAX_KEY_BYTES)
            if key in metadata:
                raise self.invalid(f"the metadata key {key!r} stands there twice")
            metadata[key] = self.read_value(self.number(_U32, f"the type of {key!r}"), key)
        return metadata

    def read_string(self, what: str, most: int = MAX_STRING_BYTES) -> str:
        nbytes = self.number(_U64, f"the length of {what}")
        if nbytes > most:
            raise self.invalid(f"{what} at byte {self.position} would take {nbytes} bytes, more than {most}")
        self.need(nbytes, what)
        end = self.position + nbytes
        raw = self.buffer[self.position : end]
        self.position = end
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.invalid(f"{what} at byte {end - nbytes} is not UTF-8: {raw[:40]!r}") from None

    def read_value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind][0], f"the value of {key!r}")
        if kind == _STRING:
            return self.read_string(f"the value of {key!r}")
        if kind != _ARRAY:
            raise self.invalid(f"the metadata value {key!r} has the unknown type {kind}")
        if depth == MAX_ARRAY_DEPTH:
            raise self.invalid(f"the metadata value {key!r} nests arrays deeper than {MAX_ARRAY_DEPTH}")
        self.need(_ARRAY_HEAD.size, f"the array {key!r}")
        kind, count = _ARRAY_HEAD.unpack_from(self.buffer, self.position)
        self.position += _ARRAY_HEAD.size
        least = _SCALARS[kind][0].size if kind in _SCALARS else 8
        if count * least > self.left():
            raise self.invalid(f"the array {key!r} of {count} elements does not fit into {self.left()} bytes")
        if kind in _SCALARS:
            return self.read_numbers(_SCALARS[kind][1], count, key)
        if kind == _STRING:
            return self.read_strings(count, key)
        return [self.read_value(kind, key, depth + 1) for _ in range(count)]

    def read_numbers(self, dtype: str, count: int, key: str) -> list[Any]:
        nbytes = count * np.dtype(dtype).itemsize
        self.need(nbytes, f"the array {key!r}")
        values: list[Any] = np.frombuffer(self.buffer, dtype, count, self.position).tolist()
        self.position += nbytes
        return values

    def read_strings(self, count: int, key: str) -> list[str]:
        """A vocabulary: the one loop here that must be tight."""
        spans: list[bytes] = []
        keep, length_at = spans.append, _U64.unpack_from
        buffer, position, end = self.buffer, self.position, len(self.buffer)
        for _ in range(count):
            start = position + 8
            stop = start + length_at(buffer, position)[0] if start <= end else end + 1
            if stop > end:
                self.position = position
                nbytes = self.number(_U64, f"a string of {key!r}")
                if nbytes > MAX_STRING_BYTES:
                    raise self.invalid(f"a string of {key!r} at byte {start} would take {nbytes} bytes")
                self.need(nbytes, f"a string of {key!r}")
                buffer, end, stop = self.buffer, len(self.buffer), start + nbytes
            keep(buffer[start:stop])
            position = stop
        self.position = position
        # llama.cpp takes any bytes as a token; a byte that is not UTF-8 is kept as a lone surrogate.
        return [span.decode("utf-8", "surrogateescape") for span in spans]

    def read_tensors(self, num_tensors: int) -> list[_Row]:
        rows = []
        names = set()
        for index in range(num_tensors):
            name = self.read_string(f"the name of tensor {index}", MAX_KEY_BYTES)
            if name in names:
                raise self.invalid(f"two tensors have the name {name!r}")
            names.add(name)
            num_dims = self.number(_U32, f"the number of dimensions of {name!r}")
            if num_dims > MAX_DIMS:
                raise self.invalid(f"tensor {name!r} has {num_dims} dimensions, more than {MAX_DIMS}")
            dims = [self.number(_U64, f"the shape of {name!r}") for _ in range(num_dims)]
            code = self.number(_U32, f"the type of {name!r}")
            offset = self.number(_U64, f"the offset of {name!r}")
            rows.append(_Row(name=name, shape=tuple(reversed(dims)), code=code, offset=offset))
        return rows


def _alignment(header: _Header, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise header.invalid(f"general.alignment is {alignment!r}, expected a power of two")
    return alignment


def _place(header: _Header, rows: Iterable[_Row], alignment: int) -> dict[str, TensorInfo]:
    """The tensors where they lie in the file, in file order; none past its end, none over another."""
    start = -(-header.position // alignment) * alignment
    tensors = []
    for row in rows:
        if row.offset % alignment:
            raise header.invalid(f"the offset {row.offset} of tensor {row.name!r} is not a multiple of {alignment}")
        tensors.append(_tensor(header, row, start + row.offset))
    tensors.sort(key=lambda tensor: tensor.offset)
    for tensor in tensors:
        end = tensor.offset + tensor.nbytes
        if end > header.file_nbytes:
            raise TruncatedFile(
                f"{header.path}: tensor {tensor.name!r} takes bytes {tensor.offset} to {end}, but the file has "
                f"{header.file_nbytes} bytes; it was cut short, download it again."
            )
    for before, after in pairwise(tensor for tensor in tensors if tensor.nbytes):
        if before.offset + before.nbytes > after.offset:
            raise header.invalid(f"tensors {before.name!r} and {after.name!r} overlap at byte {after.offset}")
    return {tensor.name: tensor for tensor in tensors}


def _tensor(header: _Header, row: _Row, offset: int) -> TensorInfo:
    numel = prod(row.shape)
    if row.code in GGML_PLAIN:
        dtype = GGML_PLAIN[row.code]
        nbytes, dtype_name, encoding = nbytes_of(dtype, numel), dtype.name, None
    elif row.code in GGML_BLOCKS:
        block = GGML_BLOCKS[row.code]
        if not row.shape or row.shape[-1] % block.block_numel:
            raise header.invalid(
                f"tensor {row.name!r} of shape {row.shape} cannot be {block.name}: its rows are not whole blocks of "
                f"{block.block_numel}"
            )
        nbytes, dtype_name, encoding = numel // block.block_numel * block.block_nbytes, "float32", block.name
    else:
        raise UnsupportedFormat(
            f"{header.path}: tensor {row.name!r} has the ggml type {row.code}, which is not known (types that ggml has "
            "withdrawn are not read); convert the model again with a current llama.cpp, or upgrade Loadstone."
        )
    return TensorInfo(
        name=row.name,
        dtype=dtype_name,
        shape=row.shape,
        file=header.path,
        offset=offset,
        nbytes=nbytes,
        encoding=encoding,
    )


def _read_rope_factors(header: _Header, tensors: Mapping[str, TensorInfo]) -> dict[str, list[float]]:
    factors: dict[str, list[float]] = {}
    for name in ROPE_FACTORS:
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype != "float32" or tensor.encoding or tensor.numel > _MAX_ROPE_FACTORS:
            continue
        header.file.seek(tensor.offset)
        factors[name] = np.frombuffer(header.file.read(tensor.nbytes), "<f4").tolist()
    return factors
