"""The values of the 8-bit floating-point formats, as tables of float32 that torch's casts agree with bit by bit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def _table(mantissa_bits: int, bias: int, special: dict[int, int]) -> Floats:
    """All values of a format with a sign.

    Args:
        mantissa_bits: its width; the exponent takes the rest of seven bits.
        bias: of the exponent.
        special: the bits of a float32 for each code that is not a number.
    """
    code = np.arange(128)
    exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    subnormal = exponent == 0
    significand = np.where(subnormal, mantissa, mantissa + (1 << mantissa_bits))
    positive = np.ldexp(significand.astype(np.float32), np.maximum(exponent, 1) - bias - mantissa_bits)
    return _with(np.concatenate([positive, -positive]), special)


def _with(values: Floats, special: dict[int, int]) -> Floats:
    bits = values.astype("<f4").view("<u4")
    for code, pattern in special.items():
        bits[code] = pattern
    return bits.view("<f4")


def _both_signs(special: dict[int, int]) -> dict[int, int]:
    return {**special, **{code | 0x80: bits | 1 << 31 for code, bits in special.items()}}


# What is not a number has the bits that torch gives it.
# Source: https://github.com/pytorch/pytorch/tree/main/torch/headeronly/util (Float8_e4m3fn.h and its neighbours)
FLOAT8_VALUES: dict[str, Floats] = {
    "float8_e4m3fn": _table(3, 7, _both_signs({0x7F: 0x7FF00000})),
    "float8_e5m2": _table(2, 15, _both_signs({0x7C: 0x7F800000, 0x7D: 0x7FE00000, 0x7E: 0x7FC00000, 0x7F: 0x7FE00000})),
    "float8_e4m3fnuz": _table(3, 8, {0x80: 0x7F800001}),
    "float8_e5m2fnuz": _table(2, 16, {0x80: 0x7F800001}),
    "float8_e8m0fnu": _with(np.ldexp(np.float32(1), np.minimum(np.arange(256), 254) - 127), {0xFF: 0x7F800001}),
}
