"""The dtypes of checkpoints: their names, widths in bits and codes in each format. Names are torch's own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Dtype:
    """One element type.

    Attributes:
        name: torch's name, `bfloat16` for `torch.bfloat16`; that of ml_dtypes where torch has none.
        bits: the width of an element in bits; sub-byte types are packed.
        safetensors: the code in a safetensors header; None for what only torch has.
        floating: whether it is a floating-point type.
    """

    name: str
    bits: int
    safetensors: str | None
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
    Dtype(name="float4_e2m1fn", bits=4, safetensors="F4", floating=True),
    Dtype(name="float4_e2m1fn_x2", bits=8, safetensors=None, floating=True),
    Dtype(name="float6_e2m3fn", bits=6, safetensors="F6_E2M3", floating=True),
    Dtype(name="float6_e3m2fn", bits=6, safetensors="F6_E3M2", floating=True),
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
    Dtype(name="complex128", bits=128, safetensors=None, floating=True),
)

DTYPES: dict[str, Dtype] = {dtype.name: dtype for dtype in _TABLE}
SAFETENSORS_DTYPES: dict[str, Dtype] = {dtype.safetensors: dtype for dtype in _TABLE if dtype.safetensors}

# What a file counts one by one and torch in pairs: two elements are one of torch's, along the last dimension.
TORCH_PAIRS: dict[str, str] = {"float4_e2m1fn": "float4_e2m1fn_x2"}

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


def _block(code: int, name: str, block_numel: int, block_nbytes: int) -> BlockFormat:
    return BlockFormat(name=name, code=code, block_numel=block_numel, block_nbytes=block_nbytes)


# Source: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py (GGML_QUANT_SIZES) and
# https://github.com/ggml-org/ggml/blob/master/include/ggml.h (enum ggml_type)
_BLOCK_TABLE = (
    _block(2, "Q4_0", 32, 18),
    _block(3, "Q4_1", 32, 20),
    _block(6, "Q5_0", 32, 22),
    _block(7, "Q5_1", 32, 24),
    _block(8, "Q8_0", 32, 34),
    _block(9, "Q8_1", 32, 40),
    _block(10, "Q2_K", 256, 84),
    _block(11, "Q3_K", 256, 110),
    _block(12, "Q4_K", 256, 144),
    _block(13, "Q5_K", 256, 176),
    _block(14, "Q6_K", 256, 210),
    _block(15, "Q8_K", 256, 292),
    _block(16, "IQ2_XXS", 256, 66),
    _block(17, "IQ2_XS", 256, 74),
    _block(18, "IQ3_XXS", 256, 98),
    _block(19, "IQ1_S", 256, 50),
    _block(20, "IQ4_NL", 32, 18),
    _block(21, "IQ3_S", 256, 110),
    _block(22, "IQ2_S", 256, 82),
    _block(23, "IQ4_XS", 256, 136),
    _block(29, "IQ1_M", 256, 56),
    _block(34, "TQ1_0", 256, 54),
    _block(35, "TQ2_0", 256, 66),
    _block(39, "MXFP4", 32, 17),
    _block(40, "NVFP4", 64, 36),
    _block(41, "Q1_0", 128, 18),
)

# The codes of a GGUF tensor header: block encodings (also by their names), and plain elements.
GGML_BLOCKS: dict[int, BlockFormat] = {block.code: block for block in _BLOCK_TABLE}
GGML_BLOCKS_BY_NAME: dict[str, BlockFormat] = {block.name: block for block in _BLOCK_TABLE}
GGML_PLAIN: dict[int, Dtype] = {
    0: DTYPES["float32"],
    1: DTYPES["float16"],
    24: DTYPES["int8"],
    25: DTYPES["int16"],
    26: DTYPES["int32"],
    27: DTYPES["int64"],
    28: DTYPES["float64"],
    30: DTYPES["bfloat16"],
}
