"""The block formats of ggml whose values are evenly spaced: Q4_0 to Q8_0, the K-quants, and the ternary ones.

The order of the roundings is gguf-py's where it matters. It mostly does not: a float16 times the few bits of scale and
value is exact in a float32, so that they may be multiplied in another order; only the last subtraction or
addition rounds. A product of zero must keep its sign, though, so what may be negative is multiplied as a float.

Source: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/quants.py
"""

from __future__ import annotations

import numpy as np

from loadstone.stream.dequantize_bits import (
    Bytes,
    Floats,
    Kernel,
    centre,
    field,
    half,
    lower,
    merge,
    scale,
    spread,
    spread_high,
)

# Masks over the four bytes of a word.
_LOW6, _LOW4, _LOW2, _MID2 = (np.uint32(mask * 0x01010101) for mask in (0x3F, 0x0F, 0x03, 0x30))
# Every byte sixteen times.
_SIXTEEN_TIMES = np.arange(256, dtype=np.uint8).repeat(16).view("V16")


def _q4_0(blocks: Bytes, out: Floats) -> None:
    scale(centre(spread(field(blocks, 2, 16), (0, 4), 15, 16), 8), out, half(blocks, 0))


def _q4_1(blocks: Bytes, out: Floats) -> None:
    scale(spread(field(blocks, 4, 16), (0, 4), 15, 16), out, half(blocks, 0))
    np.add(out, half(blocks, 2), out=out)


def _fifth_bits(blocks: Bytes, offset: int, low: Bytes) -> Bytes:
    high = np.unpackbits(field(blocks, offset, 4).reshape(-1), bitorder="little").reshape(low.shape)
    return merge(low, high, 4)


def _q5_0(blocks: Bytes, out: Floats) -> None:
    quants = _fifth_bits(blocks, 2, spread(field(blocks, 6, 16), (0, 4), 15, 16))
    scale(centre(quants, 16), out, half(blocks, 0))


def _q5_1(blocks: Bytes, out: Floats) -> None:
    scale(_fifth_bits(blocks, 4, spread(field(blocks, 8, 16), (0, 4), 15, 16)), out, half(blocks, 0))
    np.add(out, half(blocks, 2), out=out)


def _q8_0(blocks: Bytes, out: Floats) -> None:
    scale(field(blocks, 2, 32).view(np.int8), out, half(blocks, 0))


def _q2_k(blocks: Bytes, out: Floats) -> None:
    pairs = field(blocks, 0, 16)
    # 4 bits of scale times 2 bits of value fit a byte, and are multiplied as bytes.
    scales = np.take(_SIXTEEN_TIMES, pairs & np.uint8(15)).view(np.uint8)
    quants = spread(field(blocks, 16, 64), (0, 2, 4, 6), 3, 32)
    np.multiply(quants, scales, out=quants)
    scale(quants, out, half(blocks, 80))
    lower(out, half(blocks, 82) * (pairs >> np.uint8(4)).astype(np.float32))


def _q3_k(blocks: Bytes, out: Floats) -> None:
    # 16 scales of 6 bits: four low bits each in the first eight bytes, two high bits each in the last four.
    packed = field(blocks, 96, 12).view("<u4")
    scales = np.empty((len(blocks), 4), "<u4")
    for index in range(4):
        low = (packed[:, index % 2] >> np.uint32(index // 2 * 4)) & _LOW4
        scales[:, index] = low | (((packed[:, 2] >> np.uint32(2 * index)) & _LOW2) << np.uint32(4))
    factor = half(blocks, 108) * centre(scales.view(np.uint8), 32).astype(np.float32)
    quants = spread(field(blocks, 32, 64), (0, 2, 4, 6), 3, 32)
    quants = merge(quants, spread(field(blocks, 0, 32), (0, 1, 2, 3, 4, 5, 6, 7), 1, 32), 2)
    scale(centre(quants, 4), out, factor)


def _six_bit_pairs(blocks: Bytes) -> tuple[Floats, Floats]:
    """The eight scales and eight minimums of Q4_K and Q5_K, times `d` and `dmin`."""
    header = field(blocks, 0, 16)
    scales, minimums, rest = (header.view("<u4")[:, index] for index in (1, 2, 3))
    # Words of four scales or four minimums: the first four are whole, the last four have their low bits in `rest`.
    words = np.empty((2, len(blocks), 2), "<u4")
    for kind, (first, low) in enumerate(((scales, rest), (minimums, rest >> np.uint32(4)))):
        np.bitwise_and(first, _LOW6, out=words[kind, :, 0])
        np.bitwise_or(low & _LOW4, (first >> np.uint32(2)) & _MID2, out=words[kind, :, 1])
    floats = words.view(np.uint8).astype(np.float32).reshape(2, -1)
    factors = header.view("<f2")[:, :2].T.astype(np.float32)
    np.multiply(floats, np.repeat(factors, 8).reshape(2, -1), out=floats)
    factor, minimum = floats.reshape(2, len(blocks), 8)
    return factor, minimum


def _q4_k(blocks: Bytes, out: Floats) -> None:
    factor, minimum = _six_bit_pairs(blocks)
    scale(spread(field(blocks, 16, 128), (0, 4), 15, 32), out, factor)
    lower(out, minimum)


def _q5_k(blocks: Bytes, out: Floats) -> None:
    factor, minimum = _six_bit_pairs(blocks)
    quants = spread(field(blocks, 48, 128), (0, 4), 15, 32)
    scale(merge(quants, spread_high(field(blocks, 16, 32), (0, 1, 2, 3), 16, 32)), out, factor)
    lower(out, minimum)


def _q6_k(blocks: Bytes, out: Floats) -> None:
    factor = half(blocks, 208) * field(blocks, 192, 16).view(np.int8).astype(np.float32)
    quants = spread(field(blocks, 0, 128), (0, 4), 15, 64)
    quants = merge(quants, spread_high(field(blocks, 128, 64), (0, 2), 48, 32))
    scale(centre(quants, 32), out, factor)


def _tq1_0(blocks: Bytes, out: Floats) -> None:
    digits = np.empty((len(blocks), 256), np.uint8)
    # Five digits of base 3 as a fraction of 256; times 3, in a byte, drops the first of them.
    for begin, item, count, start in ((0, 32, 5, 0), (32, 16, 5, 160), (48, 4, 4, 240)):
        packed = field(blocks, begin, item)
        for index in range(count):
            at = start + index * item
            digits[:, at : at + item].view(f"V{item}")[:, 0] = packed.view(f"V{item}")[:, 0]
            np.multiply(packed, np.uint8(3), out=packed)
    # The digit is the whole part of three times the fraction.
    values = np.greater(digits, np.uint8(85)).view(np.int8)
    np.add(values, np.greater(digits, np.uint8(170)).view(np.int8), out=values)
    scale(centre(values.view(np.uint8), 1), out, half(blocks, 52))


def _tq2_0(blocks: Bytes, out: Floats) -> None:
    scale(centre(spread(field(blocks, 0, 64), (0, 2, 4, 6), 3, 32), 1), out, half(blocks, 64))


KERNELS: dict[str, Kernel] = {
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
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
}
