"""Parameters as their files hold them: blocks of GGUF, or narrower numbers put together from several tensors.

They travel so, and become what is wanted only where it is computed with; see `loadstone.stream.expand`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from loadstone.architecture.gguf_layouts import is_exact, ordering_bytes
from loadstone.architecture.keymap import Assignment, Part, Target
from loadstone.checkpoint.values import TensorInfo
from loadstone.dtypes import DTYPES
from loadstone.plan.reserve import strip_bytes
from loadstone.stream.dequantize import KERNELS
from loadstone.stream.rearrange import target_nbytes
from loadstone.units import round_up

# Where the parts of one parameter begin: torch sees numbers only in memory that is aligned for them.
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPart:
    """One tensor of the files, for a parameter or a stretch or slice of it.

    Attributes:
        part: where it belongs.
        info: the tensor.
        begin: its first byte among those of the parameter.
    """

    part: Part
    info: TensorInfo
    begin: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """All tensors of one parameter, one after another.

    Attributes:
        parts: in the order in which they lie.
        nbytes: what they take.
    """

    parts: tuple[StoredPart, ...]
    nbytes: int

    @property
    def target(self) -> Target:
        """What lies there."""
        return Target(shape=(self.nbytes,), dtype="uint8")

    @property
    def expanding_bytes(self) -> int:
        """The most that a device needs to make the parameter of it, beside both."""
        return max(
            strip_bytes(one.info.numel)
            + ordering_bytes(one.part.layout, one.part.index, one.info.nbytes, one.info.numel)
            for one in self.parts
        )

    @property
    def pieces(self) -> list[tuple[Part, TensorInfo]]:
        """Its tensors as bytes that only move, and which of its bytes they are."""
        return [
            (
                Part(source=one.part.source, start=one.begin),
                replace(one.info, dtype="uint8", shape=(one.info.nbytes,), encoding=None),
            )
            for one in self.parts
        ]


def is_castable(stored: str, wanted: str) -> bool:
    """Whether any device casts from one dtype to another as the host does."""
    return DTYPES[stored].floating and DTYPES[stored].bits >= 8 and DTYPES[wanted].floating


def stored_form(assignment: Assignment, target: Target, tensors: Mapping[str, TensorInfo]) -> Stored | None:
    """A parameter as it lies in its files.

    Args:
        assignment: what fills it.
        target: what it must be.
        tensors: the checkpoint's, by name.

    Returns:
        None where that takes no less than the parameter itself, or where another device than the host cannot make the
        parameter of it, bit by bit.
    """
    parts: list[StoredPart] = []
    end = 0
    for part in assignment.parts:
        info = tensors[part.source]
        if not _can_expand(part, info, target):
            return None
        begin = round_up(end, _ALIGNMENT)
        parts.append(StoredPart(part=part, info=info, begin=begin))
        end = begin + info.nbytes
    return Stored(parts=tuple(parts), nbytes=end) if end < target_nbytes(target) else None


def _can_expand(part: Part, info: TensorInfo, target: Target) -> bool:
    if info.strides is not None or not info.is_aligned or not is_exact(part.layout):
        return False
    if info.encoding is not None:
        return info.encoding in KERNELS and DTYPES[target.dtype].floating
    return is_castable(info.dtype, target.dtype)
