"""The block formats of ggml whose values come from a table: 4-bit floats, IQ4, and the grids of IQ1, IQ2 and IQ3.

A grid has rows of four or eight small integers. Signs are bytes of all ones where a value is negative. The grids are
taken out of gguf-py at their first use.

Source: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/quants.py and
https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
"""

from __future__ import annotations

from functools import cache

import numpy as np

from loadstone.stream.dequantize_ops import Array, Kernel, Ops, Table

# Source: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h (kvalues_iq4nl, kvalues_mxfp4)
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_VALUES_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
# Half of what an E8M0 exponent stands for; the two lowest are subnormal. (ggml_e8m0_to_fp32_half in ggml-impl.h)
_E8M0_HALVES = Table(np.array([1 << 21, 1 << 22, *(exponent << 23 for exponent in range(1, 255))], "<u4").view("<f4"))


def _unsigned_e4m3(code: int) -> float:
    """Half of an E4M3 number whose sign is ignored; 0x7F stands for zero (ggml_ue4m3_to_fp32 in ggml-impl.h)."""
    exponent, mantissa = code >> 3 & 15, code & 7
    value = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return 0.0 if code == 0x7F else value / 2


_UE4M3_HALVES = Table(np.array([_unsigned_e4m3(code) for code in range(256)], np.float32))


def _iq4_nl(ops: Ops, blocks: Array, out: Array) -> None:
    ops.look_up(ops.spread(ops.field(blocks, 2, 16), (0, 4), 15, 16), _IQ4_VALUES, out)
    ops.scale_in_place(out, ops.half(blocks, 0))


def _iq4_xs(ops: Ops, blocks: Array, out: Array) -> None:
    scales = ops.digits(ops.field(blocks, 4, 4), 4) | ops.digits(ops.field(blocks, 2, 2), 2) << 4
    factor = ops.half(blocks, 0) * ops.floats(ops.centre(scales, 32))
    ops.look_up(ops.spread(ops.field(blocks, 8, 128), (0, 4), 15, 16), _IQ4_VALUES, out)
    ops.scale_in_place(out, factor)


def _mxfp4(ops: Ops, blocks: Array, out: Array) -> None:
    ops.look_up(ops.spread(ops.field(blocks, 1, 16), (0, 4), 15, 16), _E2M1_VALUES_DOUBLED, out)
    ops.scale_in_place(out, ops.take(_E8M0_HALVES, ops.field(blocks, 0, 1)))


def _nvfp4(ops: Ops, blocks: Array, out: Array) -> None:
    ops.look_up(ops.spread(ops.field(blocks, 4, 32), (0, 4), 15, 8), _E2M1_VALUES_DOUBLED, out)
    ops.scale_in_place(out, ops.take(_UE4M3_HALVES, ops.field(blocks, 0, 4)))


@cache
def _grid(encoding: str) -> Table:
    """The rows of a grid of gguf-py."""
    from gguf import quants

    kind = getattr(quants, encoding)
    kind.init_grid()
    return Table(kind.grid.reshape(kind.grid_shape).astype(np.int8))


@cache
def _shifted_grid(encoding: str) -> Table:
    """Eight times a grid of -1, 0 and 1, plus one; then the same minus one. gguf-py adds and subtracts an eighth."""
    rows = _grid(encoding).entries * np.int8(8)
    return Table(np.concatenate([rows + np.int8(1), rows - np.int8(1)]))


# For each byte of sign bits, lowest first, eight bytes; and the same for seven bits, which an eighth makes even.
_SIGNS = Table(
    np.negative(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").view(np.int8))
)
_EVEN_SIGNS = Table(_SIGNS.entries[[code | (code.bit_count() & 1) << 7 for code in range(128)]])


def _scale_signed(ops: Ops, rows: Array, signs: Array, out: Array, factor: Array) -> None:
    """Rows of a grid, negative where the sign bytes say so, times their factors."""
    rows, signs = rows.reshape(len(out), -1), signs.reshape(len(out), -1)
    ops.scale((rows ^ signs) - signs, out, factor)


def _seven_bits(ops: Ops, words: Array) -> Array:
    """Four times seven bits of each word."""
    return ops.stack([words >> 7 * index & 127 for index in range(4)])


def _iq2_xxs(ops: Ops, blocks: Array, out: Array) -> None:
    packed = ops.field(blocks, 2, 64)
    words = ops.words(packed, 4)[:, 1::2]
    rows = ops.take(_grid("IQ2_XXS"), packed.reshape(len(blocks), 8, 8)[:, :, :4])
    factor = ops.half(blocks, 0) * (0.5 + ops.floats(words >> 28)) * 0.25
    _scale_signed(ops, rows, ops.take(_EVEN_SIGNS, _seven_bits(ops, words)), out, factor)


def _quarter_scales(ops: Ops, blocks: Array, offset: int) -> Array:
    """A scale of 4 bits for each sixteen values, from byte `offset` on."""
    return ops.half(blocks, 0) * (0.5 + ops.floats(ops.digits(ops.field(blocks, offset, 8), 4))) * 0.25


def _iq2_xs(ops: Ops, blocks: Array, out: Array) -> None:
    words = ops.words(ops.field(blocks, 2, 64), 2)
    rows, signs = ops.take(_grid("IQ2_XS"), words & 511), ops.take(_EVEN_SIGNS, words >> 9)
    _scale_signed(ops, rows, signs, out, _quarter_scales(ops, blocks, 66))


def _iq2_s(ops: Ops, blocks: Array, out: Array) -> None:
    high = ops.wide(ops.digits(ops.field(blocks, 66, 8), 2))
    rows = ops.take(_grid("IQ2_S"), ops.wide(ops.field(blocks, 2, 32)) | high << 8)
    signs = ops.take(_SIGNS, ops.field(blocks, 34, 32))
    _scale_signed(ops, rows, signs, out, _quarter_scales(ops, blocks, 74))


def _iq3_xxs(ops: Ops, blocks: Array, out: Array) -> None:
    words = ops.words(ops.field(blocks, 66, 32), 4)
    rows = ops.take(_grid("IQ3_XXS"), ops.field(blocks, 2, 64))
    factor = ops.half(blocks, 0) * (0.5 + ops.floats(words >> 28)) * 0.5
    _scale_signed(ops, rows, ops.take(_EVEN_SIGNS, _seven_bits(ops, words)), out, factor)


def _iq3_s(ops: Ops, blocks: Array, out: Array) -> None:
    high = ops.wide(ops.digits(ops.field(blocks, 66, 8), 1))
    rows = ops.take(_grid("IQ3_S"), ops.wide(ops.field(blocks, 2, 64)) | high << 8)
    factor = ops.half(blocks, 0) * ops.floats(ops.digits(ops.field(blocks, 106, 4), 4) * 2 + 1)
    _scale_signed(ops, rows, ops.take(_SIGNS, ops.field(blocks, 74, 32)), out, factor)


def _iq1_s(ops: Ops, blocks: Array, out: Array) -> None:
    words = ops.words(ops.field(blocks, 34, 16), 2)
    # The highest bit chooses the half of the table whose eighths are negative.
    half = words >> 15 << 11
    index = ops.stack([(words >> 3 * place & 7) << 8 | half for place in range(4)]).reshape(len(blocks), 32)
    rows = ops.take(_shifted_grid("IQ1_S"), index | ops.wide(ops.field(blocks, 2, 32)))
    factor = ops.half(blocks, 0) * ops.floats((words >> 12 & 7) * 2 + 1)
    ops.scale(rows.reshape(len(blocks), -1), out, factor * 0.125)


def _iq1_m(ops: Ops, blocks: Array, out: Array) -> None:
    words = ops.words(ops.field(blocks, 48, 8), 2)
    # A quarter of the float16 scale stands in the highest bits of each word, the lowest quarter first.
    high = words & 0xF000
    d = (high[:, 0] >> 12 | high[:, 1] >> 8 | high[:, 2] >> 4 | high[:, 3])[:, None]
    scales = ops.stack([words >> 3 * place & 7 for place in range(4)]).reshape(len(blocks), 16)
    factor = ops.as_half(d) * ops.floats(scales * 2 + 1)
    # Three high bits of the row and, above them, the half of the table whose eighths are negative.
    high = ops.wide(ops.digits(ops.field(blocks, 32, 16), 4))
    rows = ops.take(_shifted_grid("IQ1_M"), ops.wide(ops.field(blocks, 0, 32)) | high << 8)
    ops.scale(rows.reshape(len(blocks), -1), out, factor * 0.125)


KERNELS: dict[str, Kernel] = {
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
}
