"""The block formats of ggml whose values are evenly spaced: Q4_0 to Q8_0, the K-quants, and the ternary ones.

The order of the roundings is gguf-py's where it matters. It mostly does not: a float16 times the few bits of scale and
value is exact in a float32, so that they may be multiplied in another order; only the last subtraction or
addition rounds. A product of zero must keep its sign, though, so what may be negative is multiplied as a float.

Source: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/quants.py
"""

from __future__ import annotations

from loadstone.stream.dequantize_ops import Array, Kernel, Ops

# Masks over the four bytes of a word.
_LOW6, _LOW4, _LOW2, _MID2 = (mask * 0x01010101 for mask in (0x3F, 0x0F, 0x03, 0x30))


def _q4_0(ops: Ops, blocks: Array, out: Array) -> None:
    quants = ops.spread(ops.field(blocks, 2, 16), (0, 4), 15, 16)
    ops.scale(ops.centre(quants, 8), out, ops.half(blocks, 0))


def _q4_1(ops: Ops, blocks: Array, out: Array) -> None:
    ops.scale(ops.spread(ops.field(blocks, 4, 16), (0, 4), 15, 16), out, ops.half(blocks, 0))
    ops.lift(out, ops.half(blocks, 2))


def _five_bits(ops: Ops, blocks: Array, high: int, low: int) -> Array:
    """Quants of 5 bits: the fifth ones at byte `high`, the others at byte `low`."""
    quants = ops.spread(ops.field(blocks, low, 16), (0, 4), 15, 16)
    return ops.merge(quants, ops.digits(ops.field(blocks, high, 4), 1), 4)


def _q5_0(ops: Ops, blocks: Array, out: Array) -> None:
    ops.scale(ops.centre(_five_bits(ops, blocks, 2, 6), 16), out, ops.half(blocks, 0))


def _q5_1(ops: Ops, blocks: Array, out: Array) -> None:
    ops.scale(_five_bits(ops, blocks, 4, 8), out, ops.half(blocks, 0))
    ops.lift(out, ops.half(blocks, 2))


def _q8_0(ops: Ops, blocks: Array, out: Array) -> None:
    ops.scale(ops.signed(ops.field(blocks, 2, 32)), out, ops.half(blocks, 0))


def _q2_k(ops: Ops, blocks: Array, out: Array) -> None:
    pairs = ops.field(blocks, 0, 16)
    quants = ops.spread(ops.field(blocks, 16, 64), (0, 2, 4, 6), 3, 32)
    quants *= ops.repeat(pairs & 15)  # 4 bits of scale times 2 bits of value fit a byte
    ops.scale(quants, out, ops.half(blocks, 80))
    ops.lower(out, ops.half(blocks, 82) * ops.floats(pairs >> 4))


def _q3_k(ops: Ops, blocks: Array, out: Array) -> None:
    # 16 scales of 6 bits: four low bits each in the first eight bytes, two high bits each in the last four.
    packed = ops.words(ops.field(blocks, 96, 12), 4)
    scales = ops.bytes_of(
        [
            (packed[:, index % 2] >> index // 2 * 4) & _LOW4 | ((packed[:, 2] >> 2 * index) & _LOW2) << 4
            for index in range(4)
        ]
    )
    factor = ops.half(blocks, 108) * ops.floats(ops.centre(scales, 32))
    quants = ops.spread(ops.field(blocks, 32, 64), (0, 2, 4, 6), 3, 32)
    quants = ops.merge(quants, ops.spread(ops.field(blocks, 0, 32), (0, 1, 2, 3, 4, 5, 6, 7), 1, 32), 2)
    ops.scale(ops.centre(quants, 4), out, factor)


def _six_bit_pairs(ops: Ops, blocks: Array) -> tuple[Array, Array]:
    """The eight scales and eight minimums of Q4_K and Q5_K, times `d` and `dmin`."""
    words = ops.words(ops.field(blocks, 4, 12), 4)
    scales, minimums, rest = (words[:, index] for index in range(3))
    # The first four of each are whole, the last four have their low bits in the last word.
    scales = ops.bytes_of([scales & _LOW6, rest & _LOW4 | (scales >> 2) & _MID2])
    minimums = ops.bytes_of([minimums & _LOW6, (rest >> 4) & _LOW4 | (minimums >> 2) & _MID2])
    return ops.half(blocks, 0) * ops.floats(scales), ops.half(blocks, 2) * ops.floats(minimums)


def _q4_k(ops: Ops, blocks: Array, out: Array) -> None:
    factor, minimum = _six_bit_pairs(ops, blocks)
    ops.scale(ops.spread(ops.field(blocks, 16, 128), (0, 4), 15, 32), out, factor)
    ops.lower(out, minimum)


def _q5_k(ops: Ops, blocks: Array, out: Array) -> None:
    factor, minimum = _six_bit_pairs(ops, blocks)
    quants = ops.spread(ops.field(blocks, 48, 128), (0, 4), 15, 32)
    ops.scale(ops.merge(quants, ops.spread_high(ops.field(blocks, 16, 32), (0, 1, 2, 3), 16, 32)), out, factor)
    ops.lower(out, minimum)


def _q6_k(ops: Ops, blocks: Array, out: Array) -> None:
    factor = ops.half(blocks, 208) * ops.floats(ops.signed(ops.field(blocks, 192, 16)))
    quants = ops.spread(ops.field(blocks, 0, 128), (0, 4), 15, 64)
    quants = ops.merge(quants, ops.spread_high(ops.field(blocks, 128, 64), (0, 2), 48, 32))
    ops.scale(ops.centre(quants, 32), out, factor)


def _tq1_0(ops: Ops, blocks: Array, out: Array) -> None:
    # Five digits of base 3 as a fraction of 256; times 3, in a byte, drops the first of them.
    fractions = []
    for begin, nbytes, count in ((0, 32, 5), (32, 16, 5), (48, 4, 4)):
        packed = ops.field(blocks, begin, nbytes)
        for _ in range(count):
            fractions.append(packed)
            packed = packed * 3
    # The digit is the whole part of three times the fraction.
    fraction = ops.join(fractions)
    digit = ops.signed(fraction > 85) + ops.signed(fraction > 170)
    ops.scale(digit - 1, out, ops.half(blocks, 52))


def _tq2_0(ops: Ops, blocks: Array, out: Array) -> None:
    quants = ops.spread(ops.field(blocks, 0, 64), (0, 2, 4, 6), 3, 32)
    ops.scale(ops.centre(quants, 1), out, ops.half(blocks, 64))


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
