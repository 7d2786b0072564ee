"""Four-bit elements as torch has them: in pairs, so that the last dimension is half of what the file says.

Source: https://github.com/huggingface/safetensors/blob/main/bindings/python/src/lib.rs (F4 in `get_tensor`)
"""

from __future__ import annotations

from dataclasses import replace

from loadstone.checkpoint.values import Checkpoint, TensorInfo
from loadstone.dtypes import TORCH_PAIRS
from loadstone.errors import UnsupportedDtype


def in_torch_pairs(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its four-bit tensors in torch's dtype and shape; the bytes are the same.

    Raises:
        UnsupportedDtype: a last dimension is odd, so that a pair would reach into the next row.
    """
    if not any(info.dtype in TORCH_PAIRS for info in checkpoint.tensors.values()):
        return checkpoint
    return replace(checkpoint, tensors={name: _paired(info) for name, info in checkpoint.tensors.items()})


def _paired(info: TensorInfo) -> TensorInfo:
    dtype = TORCH_PAIRS.get(info.dtype)
    if dtype is None:
        return info
    *rows, last = info.shape or (1,)
    if last % 2:
        raise UnsupportedDtype(
            f"{info.file}, tensor {info.name!r}: expected an even last dimension, as torch keeps {info.dtype} in pairs "
            f"({dtype}), found shape {list(info.shape)}; leave the tensor out with select=."
        )
    return replace(info, dtype=dtype, shape=(*rows, last // 2))
