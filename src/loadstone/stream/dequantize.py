"""GGUF blocks -> float32 on the host, in numpy alone and bit by bit what gguf-py gives.

Blocks are decoded a strip at a time: their packed integers are spread into one byte each, or looked up in the table of
their format, and become floats, which are scaled. numpy releases the GIL in all of it, so callers decode different
strips in different threads.
"""

from __future__ import annotations

import numpy as np

from loadstone.dtypes import GGML_BLOCKS_BY_NAME
from loadstone.errors import UnsupportedFormat
from loadstone.stream import dequantize_arrays, dequantize_blocks, dequantize_grids
from loadstone.stream.dequantize_arrays import STRIP_NUMEL, Bytes, Floats
from loadstone.stream.dequantize_ops import Kernel

# By the name of the encoding.
KERNELS: dict[str, Kernel] = {**dequantize_blocks.KERNELS, **dequantize_grids.KERNELS}


def dequantize(raw: Bytes, encoding: str, out: Floats) -> None:
    """Decode whole blocks.

    Args:
        raw: the blocks, one after the other, contiguous.
        encoding: ggml's name for their format, `Q4_K`.
        out: where the values go, contiguous, of any shape with as many elements as the blocks hold.

    Raises:
        ValueError: `raw` is not whole blocks, or `out` has another number of elements.
        UnsupportedFormat: there is no decoder for this encoding.

    Source: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/quants.py
    """
    block = GGML_BLOCKS_BY_NAME.get(encoding)
    if block is None:
        raise UnsupportedFormat(
            f"block encoding {encoding}: expected one of {', '.join(GGML_BLOCKS_BY_NAME)}; upgrade Loadstone."
        )
    num_blocks, rest = divmod(raw.size, block.block_nbytes)
    if rest:
        raise ValueError(f"{encoding}: {raw.size} bytes are not whole blocks of {block.block_nbytes} bytes")
    if out.size != num_blocks * block.block_numel:
        raise ValueError(
            f"{encoding}: {num_blocks} blocks hold {num_blocks * block.block_numel} values, out has room for {out.size}"
        )
    if not (raw.flags.c_contiguous and out.flags.c_contiguous):
        raise ValueError(f"{encoding}: raw and out must be contiguous")
    blocks = raw.reshape(num_blocks, block.block_nbytes)
    values = out.reshape(num_blocks, block.block_numel)
    kernel = KERNELS.get(encoding) or _reference_kernel(encoding)
    step = max(1, STRIP_NUMEL // block.block_numel)
    # Scales that are infinite or NaN decode to what IEEE arithmetic gives, in silence.
    with np.errstate(all="ignore"):
        for start in range(0, num_blocks, step):
            kernel(dequantize_arrays, blocks[start : start + step], values[start : start + step])


def _reference_kernel(encoding: str) -> Kernel:
    """gguf-py's own decoder, for formats that it has learnt since."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[encoding]

    def decode(_: object, blocks: Bytes, out: Floats) -> None:
        try:
            out.reshape(-1)[...] = quants.dequantize(blocks.reshape(1, -1), kind)[0]
        except NotImplementedError as error:
            raise UnsupportedFormat(
                f"block encoding {encoding}: gguf-py has no decoder for it (it is used inside ggml only); "
                "use a file in another encoding."
            ) from error

    return decode
