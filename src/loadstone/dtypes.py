"""The dtypes of checkpoints: their names, widths in bits and codes in each format. Names are torch's own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Dtype:
    """One element type.

    Attributes:
        name: torch's name, `bfloat16` for `torch.bfloat16`.
        bits: the width of an element in bits; sub-byte types are packed.
        safetensors: the code in a safetensors header.
        floating: whether it is a floating-point type.
    """

    name: str
    bits: int
    safetensors: str
    floating: bool = False


# Source: https://github.com/huggingface/safetensors/blob/main/safetensors/src/tensor.rs (enum Dtype)
_TABLE = (
    Dtype(name="bool", bits=8, safetensors="BOOL"),
    Dtype(name="uint8", bits=8, safetensors="U8"),
    Dtype(name="int8", bits=8, safetensors="I8"),
    Dtype(name="uint16", bits=16, safetensors="U16"),
    Dtype(name="int16", bits=16, safetensors="I16"),
    Dtype(name="uint32", bits=32, safetensors="U32"),
    Dtype(name="int32", bits=32, safetensors="I32"),
    Dtype(name="uint64", bits=64, safetensors="U64"),
    Dtype(name="int64", bits=64, safetensors="I64"),
    Dtype(name="float4_e2m1fn_x2", bits=4, safetensors="F4", floating=True),
    Dtype(name="float8_e4m3fn", bits=8, safetensors="F8_E4M3", floating=True),
    Dtype(name="float8_e5m2", bits=8, safetensors="F8_E5M2", floating=True),
    Dtype(name="float8_e4m3fnuz", bits=8, safetensors="F8_E4M3FNUZ", floating=True),
    Dtype(name="float8_e5m2fnuz", bits=8, safetensors="F8_E5M2FNUZ", floating=True),
    Dtype(name="float8_e8m0fnu", bits=8, safetensors="F8_E8M0", floating=True),
    Dtype(name="float16", bits=16, safetensors="F16", floating=True),
    Dtype(name="bfloat16", bits=16, safetensors="BF16", floating=True),
    Dtype(name="float32", bits=32, safetensors="F32", floating=True),
    Dtype(name="float64", bits=64, safetensors="F64", floating=True),
    Dtype(name="complex64", bits=64, safetensors="C64", floating=True),
)

DTYPES: dict[str, Dtype] = {dtype.name: dtype for dtype in _TABLE}
SAFETENSORS_DTYPES: dict[str, Dtype] = {dtype.safetensors: dtype for dtype in _TABLE}

# The words people type for a dtype, beside torch's own names.
ALIASES: dict[str, str] = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "fp64": "float64",
    "f64": "float64",
    "double": "float64",
}


def nbytes_of(dtype: Dtype, numel: int) -> int:
    """The bytes that `numel` packed elements take, a last partial byte counted whole."""
    return (dtype.bits * numel + 7) // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat:
    """A GGUF block encoding.

    Attributes:
        name: ggml's name, `Q4_1`.
        code: the number in a GGUF tensor header.
        block_numel: the elements of a block.
        block_nbytes: the bytes of a block.
    """

    name: str
    code: int
    block_numel: int
    block_nbytes: int
