"""GGUF blocks -> float32, in numpy alone and bit by bit what gguf-py gives.

A block is decoded in three steps that each run over a strip of blocks that fits the cache: its packed integers are
spread into one byte each (shifts and masks on 64-bit words), the bytes become floats,
and the floats are scaled. The order of the two roundings, `(d * q) + m`, is gguf-py's. numpy releases the GIL in all of
them, so callers decode different strips in different threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadstone.dtypes import GGML_BLOCKS
from loadstone.errors import UnsupportedFormat

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Kernel = Callable[[Bytes, Floats], None]

# The floats decoded at once: 1 MB of them, with their bytes, stay in a large second-level cache. Smaller strips make
# calls so short that threads spend their time handing each other the GIL.
STRIP_NUMEL = 262144

# Masks over the four bytes of a word: their low six, four and two bits, and bits 4-5.
_LOW6, _LOW4, _LOW2, _MID2 = (np.uint32(mask * 0x01010101) for mask in (63, 15, 3, 48))
_U2, _U4 = np.uint32(2), np.uint32(4)

_BLOCKS = {block.name: block for block in GGML_BLOCKS.values()}


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
    block = _BLOCKS.get(encoding)
    if block is None:
        raise UnsupportedFormat(f"block encoding {encoding}: expected one of {', '.join(_BLOCKS)}; upgrade Loadstone.")
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
    kernel = _KERNELS.get(encoding) or _reference_kernel(encoding)
    step = max(1, STRIP_NUMEL // block.block_numel)
    # Scales that are infinite or NaN decode to what IEEE arithmetic gives, in silence.
    with np.errstate(all="ignore"):
        for start in range(0, num_blocks, step):
            kernel(blocks[start : start + step], values[start : start + step])


def _reference_kernel(encoding: str) -> Kernel:
    """gguf-py's own decoder, for the formats that are rare."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[encoding]

    def decode(blocks: Bytes, out: Floats) -> None:
        try:
            out.reshape(-1)[...] = quants.dequantize(blocks.reshape(1, -1), kind)[0]
        except NotImplementedError as error:
            raise UnsupportedFormat(
                f"block encoding {encoding}: gguf-py has no decoder for it (it is used inside ggml only); "
                "use a file in another encoding."
            ) from error

    return decode


def _half(blocks: Bytes, offset: int) -> Floats:
    """The float16 at byte `offset` of every block, as a column of float32. Every block has an even size."""
    return blocks.view("<f2")[:, offset // 2, None].astype(np.float32)


def _field(blocks: Bytes, offset: int, nbytes: int) -> Bytes:
    """`nbytes` of every block from `offset` on, made contiguous; moved as one item per block, which is much faster."""
    item = f"V{nbytes}"
    packed = np.empty((len(blocks), nbytes), np.uint8)
    packed.view(item)[:, 0] = blocks[:, offset : offset + nbytes].view(item)[:, 0]
    return packed


def _spread(field: Bytes, shifts: tuple[int, ...], mask: int, item: int) -> Bytes:
    """The bit fields of bytes: every run of `item` bytes becomes one run for each of `shifts`.

    Shifting words moves bits across bytes; the mask drops them. It is done in few calls on many words: each call takes
    the GIL again, and with two threads that would cost more than the work.
    """
    num_blocks, runs = len(field), field.shape[1] // item
    mask_word = np.uint64(mask * 0x0101010101010101)
    if item == 16:
        return _spread_nibbles(field, mask_word)
    packed = field.view(np.uint64).reshape(num_blocks, runs, 1, item // 8)
    words = np.right_shift(packed, np.array(shifts, np.uint64)[:, None])
    np.bitwise_and(words, mask_word, out=words)
    return words.view(np.uint8).reshape(num_blocks, -1)


def _spread_nibbles(field: Bytes, mask_word: np.uint64) -> Bytes:
    """The same for blocks of 16 bytes, too short for loops over their words: moved as one item each."""
    out = np.empty((len(field), 32), np.uint8)
    places = out.view("V16")
    packed = field.view(np.uint64)
    places[:, 0] = np.bitwise_and(packed, mask_word).view("V16")[:, 0]
    words = np.right_shift(packed, _U4.astype(np.uint64))
    places[:, 1] = np.bitwise_and(words, mask_word, out=words).view("V16")[:, 0]
    return out


def _merge(low: Bytes, high: Bytes, shift: int) -> Bytes:
    """`low | high << shift`, in place in `low`; `high` is spoilt."""
    words = high.view(np.uint64)
    np.left_shift(words, np.uint64(shift), out=words)
    np.bitwise_or(low.view(np.uint64), words, out=low.view(np.uint64))
    return low


def _centre(quants: Bytes, zero: int) -> NDArray[np.int8]:
    signed = quants.view(np.int8)
    np.subtract(signed, np.int8(zero), out=signed)
    return signed


def _scale(quants: NDArray[Any], out: Floats, factor: Floats, *, minimum: Floats | None = None) -> None:
    """`out = factor * quants - minimum`, where factor and minimum have a value for each group of a block."""
    np.copyto(out, quants)
    groups = out.reshape(len(out), factor.shape[1], -1)
    np.multiply(groups, factor[:, :, None], out=groups)
    if minimum is not None:
        np.subtract(groups, minimum[:, :, None], out=groups)


def _q4_0(blocks: Bytes, out: Floats) -> None:
    _scale(_centre(_spread(_field(blocks, 2, 16), (0, 4), 15, 16), 8), out, _half(blocks, 0))


def _q4_1(blocks: Bytes, out: Floats) -> None:
    _scale(_spread(_field(blocks, 4, 16), (0, 4), 15, 16), out, _half(blocks, 0))
    np.add(out, _half(blocks, 2), out=out)


def _fifth_bits(blocks: Bytes, offset: int, low: Bytes) -> Bytes:
    high = np.unpackbits(_field(blocks, offset, 4).reshape(-1), bitorder="little")
    return _merge(low, high.reshape(low.shape), 4)


def _q5_0(blocks: Bytes, out: Floats) -> None:
    quants = _fifth_bits(blocks, 2, _spread(_field(blocks, 6, 16), (0, 4), 15, 16))
    _scale(_centre(quants, 16), out, _half(blocks, 0))


def _q5_1(blocks: Bytes, out: Floats) -> None:
    _scale(_fifth_bits(blocks, 4, _spread(_field(blocks, 8, 16), (0, 4), 15, 16)), out, _half(blocks, 0))
    np.add(out, _half(blocks, 2), out=out)


def _q8_0(blocks: Bytes, out: Floats) -> None:
    _scale(_field(blocks, 2, 32).view(np.int8), out, _half(blocks, 0))


def _q2_k(blocks: Bytes, out: Floats) -> None:
    scales = _field(blocks, 0, 16)
    factor = _half(blocks, 80) * (scales & np.uint8(15)).astype(np.float32)
    minimum = _half(blocks, 82) * (scales >> np.uint8(4)).astype(np.float32)
    _scale(_spread(_field(blocks, 16, 64), (0, 2, 4, 6), 3, 32), out, factor, minimum=minimum)


def _q3_k(blocks: Bytes, out: Floats) -> None:
    # 16 scales of 6 bits: four low bits each in the first eight bytes, two high bits each in the last four.
    first, second, high = _field(blocks, 96, 12).view("<u4").T
    scales = np.empty((len(blocks), 4), "<u4")
    for index, low in enumerate((first, second, first >> _U4, second >> _U4)):
        scales[:, index] = (low & _LOW4) | (((high >> np.uint32(2 * index)) & _LOW2) << _U4)
    factor = _half(blocks, 108) * _centre(scales.view(np.uint8), 32).astype(np.float32)
    quants = _spread(_field(blocks, 32, 64), (0, 2, 4, 6), 3, 32)
    quants = _merge(quants, _spread(_field(blocks, 0, 32), tuple(range(8)), 1, 32), 2)
    _scale(_centre(quants, 4), out, factor)


def _six_bit_pairs(blocks: Bytes) -> tuple[Floats, Floats]:
    """The eight scales and eight minimums of Q4_K and Q5_K, times `d` and `dmin`, four to a 32-bit word."""
    first, second, both = _field(blocks, 4, 12).view("<u4").T
    words = np.empty((2, len(blocks), 2), "<u4")
    words[0, :, 0], words[1, :, 0] = first & _LOW6, second & _LOW6
    words[0, :, 1] = (both & _LOW4) | ((first >> _U2) & _MID2)
    words[1, :, 1] = ((both >> _U4) & _LOW4) | ((second >> _U2) & _MID2)
    scales, minimums = words.view(np.uint8).astype(np.float32)
    return _half(blocks, 0) * scales, _half(blocks, 2) * minimums


def _q4_k(blocks: Bytes, out: Floats) -> None:
    factor, minimum = _six_bit_pairs(blocks)
    _scale(_spread(_field(blocks, 16, 128), (0, 4), 15, 32), out, factor, minimum=minimum)


def _q5_k(blocks: Bytes, out: Floats) -> None:
    factor, minimum = _six_bit_pairs(blocks)
    quants = _spread(_field(blocks, 48, 128), (0, 4), 15, 32)
    quants = _merge(quants, _spread(_field(blocks, 16, 32), tuple(range(8)), 1, 32), 4)
    _scale(quants, out, factor, minimum=minimum)


def _q6_k(blocks: Bytes, out: Floats) -> None:
    factor = _half(blocks, 208) * _field(blocks, 192, 16).view(np.int8).astype(np.float32)
    quants = _spread(_field(blocks, 0, 128), (0, 4), 15, 64)
    quants = _merge(quants, _spread(_field(blocks, 128, 64), (0, 2, 4, 6), 3, 32), 4)
    _scale(_centre(quants, 32), out, factor)


_KERNELS: dict[str, Kernel] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
