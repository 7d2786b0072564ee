"""How much host memory a load takes at its peak: computed from headers and key map, before a tensor is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

from loadstone.architecture.keymap import Assignment, Conversion, KeyMap, Target
from loadstone.checkpoint.values import TensorInfo
from loadstone.dtypes import DTYPES, nbytes_of

# The staging buffers of all reading threads with what their decoders work in, and a last slab that is half empty.
FIXED_BYTES = 64_000_000
# Names, infos, parameters and views of one tensor, in Python and in torch.
TENSOR_BYTES = 12_000

IsMappable = Callable[[TensorInfo, str], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPeak:
    """An upper bound of the host memory of one load, above what the process had when everything was imported.

    Attributes:
        weight_bytes: anonymous memory of tensors that are cast, decoded, rearranged or put together.
        mapped_bytes: tensors used where they lie in their files, which the kernel can drop and read again.
        workspace_bytes: buffers, what lies between two steps, and what Python keeps of the tensors.
        streaming_bytes: slots of what is streamed, what stays of it, and the room that experts share.
    """

    weight_bytes: int
    mapped_bytes: int
    workspace_bytes: int
    streaming_bytes: int = 0

    @property
    def anonymous_bytes(self) -> int:
        """All of it that cannot be dropped."""
        return self.weight_bytes + self.workspace_bytes + self.streaming_bytes


def load_peak(
    keymap: KeyMap, tensors: Mapping[str, TensorInfo], targets: Mapping[str, Target], is_mappable: IsMappable
) -> LoadPeak:
    """Bound the host memory of a load to the CPU.

    Args:
        keymap: what fills what.
        tensors: the checkpoint's, by name.
        targets: shape and dtype of each assigned tensor, by fqn.
        is_mappable: whether a tensor can be used in its file as that dtype.
    """
    weights = mapped = largest = 0
    for assignment in keymap.assignments:
        target = targets[assignment.target]
        infos = [tensors[part.source] for part in assignment.parts]
        if len(infos) == 1 and assignment.is_plain and is_mappable(infos[0], target.dtype):
            mapped += infos[0].nbytes
            continue
        made = nbytes_of(DTYPES[target.dtype], prod(target.shape))
        if assignment.is_plain:
            weights += made
        else:  # all are decoded to float32 before the first is rearranged
            weights += max(made, _float32_bytes(infos))
        largest = max(largest, _between(assignment, infos, made))
    for conversion in keymap.conversions:
        taken = _taken_bytes(conversion, tensors)
        weights += taken
        largest = max(largest, 2 * taken)  # as given to the operations, and what the first of them makes
    return LoadPeak(
        weight_bytes=weights,
        mapped_bytes=mapped,
        workspace_bytes=FIXED_BYTES + TENSOR_BYTES * len(tensors) + largest,
    )


def _between(assignment: Assignment, infos: Iterable[TensorInfo], made_bytes: int) -> int:
    """What one tensor takes beside its place while it is made."""
    if not assignment.is_plain:
        return made_bytes + _float32_bytes(infos)
    # Views are gathered, and what lies askew in its file is copied, by torch and not by the reader.
    return max(
        (made_bytes + info.nbytes for info in infos if info.strides is not None or not info.is_aligned), default=0
    )


def _float32_bytes(infos: Iterable[TensorInfo]) -> int:
    return sum(4 * info.numel for info in infos)


def _taken_bytes(conversion: Conversion, tensors: Mapping[str, TensorInfo]) -> int:
    infos = [tensors[name] for name in conversion.sources]
    return sum(
        nbytes_of(DTYPES[dtype or info.dtype], info.numel) for info, dtype in zip(infos, conversion.dtypes, strict=True)
    )
