"""The block formats of ggml whose values come from a table: 4-bit floats, IQ4, and the grids of IQ1, IQ2 and IQ3.

A grid has rows of four or eight small integers, which move as one item of so many bytes. Signs are bytes of all ones
where a value is negative. The grids are taken out of gguf-py at their first use.

Source: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/quants.py and
https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadstone.stream.dequantize_bits import Bytes, Floats, Kernel, field, half, nibbles, scale, scale_in_place, spread

# Source: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h (kvalues_iq4nl, kvalues_mxfp4)
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_VALUES_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def _pairs_of(values: Sequence[int]) -> NDArray[np.uint64]:
    """Two floats for every word of two nibbles, 0x0000 to 0x0F0F, as one item."""
    floats = np.zeros((0x1000, 2), np.float32)
    nibble = np.arange(16)
    for high in range(16):
        floats[high << 8 | nibble] = np.stack([np.take(values, nibble), np.full(16, values[high])], axis=1)
    return floats.view(np.uint64)[:, 0]


_IQ4_PAIRS, _E2M1_PAIRS = _pairs_of(_IQ4_VALUES), _pairs_of(_E2M1_VALUES_DOUBLED)
# Half of what an E8M0 exponent stands for; the two lowest are subnormal. (ggml_e8m0_to_fp32_half in ggml-impl.h)
_E8M0_HALVES = np.array([1 << 21, 1 << 22, *(exponent << 23 for exponent in range(1, 255))], "<u4").view("<f4")


def _unsigned_e4m3(code: int) -> float:
    """Half of an E4M3 number whose sign is ignored; 0x7F stands for zero (ggml_ue4m3_to_fp32 in ggml-impl.h)."""
    exponent, mantissa = code >> 3 & 15, code & 7
    value = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return 0.0 if code == 0x7F else value / 2


_UE4M3_HALVES = np.array([_unsigned_e4m3(code) for code in range(256)], np.float32)


def _look_up(codes: Bytes, pairs: NDArray[np.uint64], out: Floats) -> None:
    """The values of nibbles, two at a time."""
    words = codes.view("<u2").astype(np.intp)
    # No index is out of bounds; other modes than "clip" would be checked or buffered.
    np.take(pairs, words, out=out.view(np.uint64), mode="clip")


def _iq4_nl(blocks: Bytes, out: Floats) -> None:
    _look_up(spread(field(blocks, 2, 16), (0, 4), 15, 16), _IQ4_PAIRS, out)
    scale_in_place(out, half(blocks, 0))


def _iq4_xs(blocks: Bytes, out: Floats) -> None:
    high = (blocks[:, 2:4].copy().view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)).astype(np.uint8)
    scales = nibbles(field(blocks, 4, 4)) | ((high & np.uint8(3)) << np.uint8(4))
    factor = half(blocks, 0) * (scales.view(np.int8) - np.int8(32)).astype(np.float32)
    _look_up(spread(field(blocks, 8, 128), (0, 4), 15, 16), _IQ4_PAIRS, out)
    scale_in_place(out, factor)


def _mxfp4(blocks: Bytes, out: Floats) -> None:
    _look_up(spread(field(blocks, 1, 16), (0, 4), 15, 16), _E2M1_PAIRS, out)
    scale_in_place(out, np.take(_E8M0_HALVES, blocks[:, :1]))


def _nvfp4(blocks: Bytes, out: Floats) -> None:
    _look_up(spread(field(blocks, 4, 32), (0, 4), 15, 8), _E2M1_PAIRS, out)
    scale_in_place(out, np.take(_UE4M3_HALVES, blocks[:, :4]))


@cache
def _grid(encoding: str) -> NDArray[Any]:
    """The rows of a grid of gguf-py, as items of as many bytes as they have values."""
    from gguf import quants

    kind = getattr(quants, encoding)
    kind.init_grid()
    rows: NDArray[np.int8] = kind.grid.reshape(kind.grid_shape).astype(np.int8)
    return rows.view(f"u{rows.shape[1]}")[:, 0]


@cache
def _shifted_grid(encoding: str) -> NDArray[Any]:
    """Eight times a grid of -1, 0 and 1, plus one; then the same minus one. gguf-py adds and subtracts an eighth."""
    rows = _grid(encoding).view(np.int8).reshape(-1, 8) * np.int8(8)
    return np.concatenate([rows + np.int8(1), rows - np.int8(1)]).view(np.uint64)[:, 0]


# For each byte of sign bits, lowest first, eight bytes; and the same for seven bits, which an eighth makes even.
_SIGN_BYTES = np.negative(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").view(np.int8)
).view(np.uint64)[:, 0]
_EVEN_SIGN_BYTES = _SIGN_BYTES[[code | (code.bit_count() & 1) << 7 for code in range(128)]]


def _signed(rows: NDArray[Any], signs: NDArray[np.uint64]) -> NDArray[np.int8]:
    """Rows of a grid, negative where the sign bytes say so; `signs` is spoilt."""
    masks = signs.view(np.int8).reshape(-1)
    values = np.bitwise_xor(rows.view(np.uint64).reshape(-1), signs.reshape(-1)).view(np.int8)
    return np.subtract(values, masks, out=values)


def _seven_bits(words: NDArray[np.uint32]) -> NDArray[np.intp]:
    """Four times seven bits of each word, as indices."""
    out = np.empty((*words.shape, 4), np.intp)
    for index in range(4):
        out[..., index] = (words >> np.uint32(7 * index)) & np.uint32(127)
    return out


def _iq2_xxs(blocks: Bytes, out: Floats) -> None:
    groups = field(blocks, 2, 64).view("<u4").reshape(len(blocks), 8, 2)
    rows = np.take(_grid("IQ2_XXS"), groups[..., 0].copy().view(np.uint8))
    words = groups[..., 1].copy()
    signs = np.take(_EVEN_SIGN_BYTES, _seven_bits(words))
    factor = half(blocks, 0) * (np.float32(0.5) + (words >> np.uint32(28)).astype(np.float32)) * np.float32(0.25)
    scale(_signed(rows, signs).reshape(out.shape), out, factor)


def _quarter_scales(blocks: Bytes, packed: Bytes) -> Floats:
    return half(blocks, 0) * (np.float32(0.5) + nibbles(packed).astype(np.float32)) * np.float32(0.25)


def _iq2_xs(blocks: Bytes, out: Floats) -> None:
    words = field(blocks, 2, 64).view("<u2")
    rows = np.take(_grid("IQ2_XS"), words & np.uint16(511))
    signs = np.take(_EVEN_SIGN_BYTES, words >> np.uint16(9))
    scale(_signed(rows, signs).reshape(out.shape), out, _quarter_scales(blocks, field(blocks, 66, 8)))


def _iq2_s(blocks: Bytes, out: Floats) -> None:
    high = spread(field(blocks, 66, 8), (0, 2, 4, 6), 3, 8)
    # (bit pair, byte) -> (byte, bit pair)
    high = high.reshape(len(blocks), 4, 8).swapaxes(1, 2).reshape(len(blocks), 32)
    rows = np.take(_grid("IQ2_S"), field(blocks, 2, 32) | high.astype(np.uint16) << np.uint16(8))
    signs = np.take(_SIGN_BYTES, field(blocks, 34, 32))
    scale(_signed(rows, signs).reshape(out.shape), out, _quarter_scales(blocks, field(blocks, 74, 8)))


def _iq3_xxs(blocks: Bytes, out: Floats) -> None:
    rows = np.take(_grid("IQ3_XXS"), field(blocks, 2, 64))
    words = field(blocks, 66, 32).view("<u4")
    signs = np.take(_EVEN_SIGN_BYTES, _seven_bits(words))
    factor = half(blocks, 0) * (np.float32(0.5) + (words >> np.uint32(28)).astype(np.float32)) * np.float32(0.5)
    scale(_signed(rows, signs).reshape(out.shape), out, factor)


def _iq3_s(blocks: Bytes, out: Floats) -> None:
    high = np.unpackbits(field(blocks, 66, 8), axis=1, bitorder="little")
    rows = np.take(_grid("IQ3_S"), field(blocks, 2, 64) | high.astype(np.uint16) << np.uint16(8))
    signs = np.take(_SIGN_BYTES, field(blocks, 74, 32))
    factor = half(blocks, 0) * (nibbles(field(blocks, 106, 4)) * np.uint8(2) + np.uint8(1)).astype(np.float32)
    scale(_signed(rows, signs).reshape(out.shape), out, factor)


def _iq1_s(blocks: Bytes, out: Floats) -> None:
    words = field(blocks, 34, 16).view("<u2")
    index = np.empty((len(blocks), 8, 4), np.uint16)
    for place in range(4):
        index[..., place] = (words >> np.uint16(3 * place) & np.uint16(7)) << np.uint16(8)
    # The highest bit chooses the half of the table whose eighths are negative.
    index |= (words >> np.uint16(15) << np.uint16(11))[..., None]
    index = index.reshape(len(blocks), 32) | field(blocks, 2, 32)
    factor = half(blocks, 0) * ((words >> np.uint16(12) & np.uint16(7)) * np.uint16(2) + np.uint16(1))
    rows = np.take(_shifted_grid("IQ1_S"), index)
    scale(rows.view(np.int8), out, factor * np.float32(0.125))


def _iq1_m(blocks: Bytes, out: Floats) -> None:
    words = field(blocks, 48, 8).view("<u2")
    # A quarter of the float16 scale stands in the highest bits of each word, the lowest quarter first.
    high = words & np.uint16(0xF000)
    d = (high[:, 0] >> np.uint16(12) | high[:, 1] >> np.uint16(8) | high[:, 2] >> np.uint16(4) | high[:, 3])[:, None]
    scales = np.empty((len(blocks), 4, 4), np.uint16)
    for place in range(4):
        scales[..., place] = words >> np.uint16(3 * place) & np.uint16(7)
    factor = d.view("<f2").astype(np.float32) * (scales.reshape(len(blocks), 16) * np.uint16(2) + np.uint16(1))
    # Three high bits of the row and, above them, the half of the table whose eighths are negative.
    index = field(blocks, 0, 32) | nibbles(field(blocks, 32, 16)).astype(np.uint16) << np.uint16(8)
    rows = np.take(_shifted_grid("IQ1_M"), index)
    scale(rows.view(np.int8), out, factor * np.float32(0.125))


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
