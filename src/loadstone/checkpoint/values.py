"""The values that describe a checkpoint: which tensors exist, where their bytes lie, and what the config says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import prod
from pathlib import Path
from typing import Any

from loadstone.dtypes import DTYPES


class Format(Enum):
    """How the weights are stored."""

    SAFETENSORS = "safetensors"
    TORCH_PICKLE = "torch pickle"
    GGUF = "GGUF"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies and how to read it.

    Attributes:
        name: its name in the checkpoint.
        dtype: a name of `loadstone.dtypes.DTYPES`; for block encodings the dtype that decoding gives, `float32`.
        shape: in torch's order (outermost first).
        file: the file that holds it.
        offset: of its first byte in that file, in bytes.
        nbytes: how many bytes it takes there.
        encoding: None for plain elements, else the name of the GGUF block format, `Q4_1`.
        strides: in elements, where they are not those of a contiguous tensor (torch pickles can hold views).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    encoding: str | None = None
    strides: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def is_aligned(self) -> bool:
        """Whether it begins at a multiple of its elements' size."""
        return self.offset % max(1, DTYPES[self.dtype].bits // 8) == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FileVersion:
    """What tells a file from one that took its place, and from itself after it was written to.

    Attributes:
        device: the number of its file system.
        inode: its number there.
        nbytes: its size.
        mtime_ns: when it was last written to, in nanoseconds.
    """

    device: int
    inode: int
    nbytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFile:
    """One weight file.

    Attributes:
        path: where it lies.
        nbytes: its size.
        version: which one it was when its header was read; None where nobody looked.
    """

    path: Path
    nbytes: int
    version: FileVersion | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Everything that is known from headers, before one byte of a tensor is read.

    Attributes:
        format: how the weights are stored.
        root: the folder that holds the files (config and tokenizer are looked for there).
        files: the weight files, in reading order.
        tensors: by name, in file order.
        metadata: what the headers say beside tensors; for GGUF all key-value pairs.
        config: the parsed config.json, or the one implied by GGUF metadata; None where there is none.
        generation_config: the parsed generation_config.json, if any.
        params: the parsed params.json, where the tensors have the names of Meta's layout.
        notes: what was noticed while opening, for the report.
    """

    format: Format
    root: Path
    files: tuple[CheckpointFile, ...]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    generation_config: Mapping[str, Any] | None = None
    params: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors as stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def num_parameters(self) -> int:
        """The number of elements of all tensors."""
        return sum(tensor.numel for tensor in self.tensors.values())
