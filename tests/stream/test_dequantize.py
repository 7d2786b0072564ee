"""Decoding GGUF blocks, bit by bit against gguf-py."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loadstone.dtypes import GGML_BLOCKS, BlockFormat
from loadstone.errors import UnsupportedFormat
from loadstone.stream.dequantize import STRIP_NUMEL, dequantize

INSIDE_GGML_ONLY = ("Q8_1", "Q8_K", "Q1_0")
BLOCKS = {block.name: block for block in GGML_BLOCKS.values()}
OWN = tuple(name for name in BLOCKS if name not in INSIDE_GGML_ONLY)

# Scales that are infinite, NaN (quiet, signalling, with a payload), zero of either sign, subnormal, largest.
ODD_HALVES = (0x7C00, 0xFC00, 0x7E00, 0x7D01, 0xFE55, 0x0000, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0x3C00)


def reference(raw: NDArray[np.uint8], name: str) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        return quants.dequantize(raw.reshape(1, -1), GGMLQuantizationType[name]).reshape(-1)


def decoded(raw: NDArray[np.uint8], block: BlockFormat) -> NDArray[np.float32]:
    out = np.full(raw.size // block.block_nbytes * block.block_numel, -7, np.float32)
    dequantize(raw, block.name, out)
    return out


def assert_same_bits(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("name", OWN)
def test_random_blocks_have_the_bits_of_gguf_py(name: str) -> None:
    raw = np.random.default_rng(7).integers(0, 256, 300 * BLOCKS[name].block_nbytes, dtype=np.uint8)
    assert_same_bits(decoded(raw, BLOCKS[name]), reference(raw, name))


@pytest.mark.parametrize("name", OWN)
def test_more_than_a_strip_has_the_bits_of_gguf_py(name: str) -> None:
    block = BLOCKS[name]
    raw = np.random.default_rng(8).integers(0, 256, (STRIP_NUMEL // block.block_numel + 3) * block.block_nbytes)
    raw = raw.astype(np.uint8)
    assert_same_bits(decoded(raw, block), reference(raw, name))


@pytest.mark.parametrize("name", OWN)
def test_odd_scales_have_the_bits_of_gguf_py(name: str) -> None:
    block = BLOCKS[name]
    raw = np.random.default_rng(9).integers(0, 256, (len(ODD_HALVES) ** 2, block.block_nbytes), dtype=np.uint8)
    pairs = np.array([(one, other) for one in ODD_HALVES for other in ODD_HALVES], "<u2").view(np.uint8)
    # d and dmin stand together, first or last, or d alone.
    for start in (0, block.block_nbytes - 4):
        raw[:, start : start + 4] = pairs
    assert_same_bits(decoded(raw.reshape(-1), block), reference(raw.reshape(-1), name))


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(OWN), data=st.data())
def test_any_bytes_have_the_bits_of_gguf_py(name: str, data: st.DataObject) -> None:
    block = BLOCKS[name]
    count = data.draw(st.integers(1, 3))
    raw = np.frombuffer(data.draw(st.binary(min_size=count * block.block_nbytes, max_size=count * block.block_nbytes)),
                        np.uint8)  # fmt: skip
    assert_same_bits(decoded(raw, block), reference(raw, name))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ1_0", "TQ2_0"])
def test_what_gguf_py_quantised_comes_back_close(name: str) -> None:
    values = np.random.default_rng(1).choice(np.array([-1, 0, 1], np.float32), (4, 256))
    raw = quants.quantize(values, GGMLQuantizationType[name]).reshape(-1)
    assert np.abs(decoded(raw, BLOCKS[name]) - values.reshape(-1)).max() < 0.13


@pytest.mark.parametrize("name", OWN)
def test_any_shape_of_output_is_filled(name: str) -> None:
    block = BLOCKS[name]
    raw = np.random.default_rng(2).integers(0, 256, 6 * block.block_nbytes, dtype=np.uint8)
    out = np.empty((2, 3, block.block_numel), np.float32)
    dequantize(raw.reshape(2, -1), name, out)
    assert_same_bits(out.reshape(-1), reference(raw, name))


@pytest.mark.parametrize("name", OWN)
def test_no_blocks_are_no_values(name: str) -> None:
    dequantize(np.empty(0, np.uint8), name, np.empty(0, np.float32))


@pytest.mark.parametrize("name", ["IQ1_M", "IQ2_S", "IQ4_XS", "MXFP4", "NVFP4", "TQ1_0"])
def test_every_scale_has_the_bits_of_gguf_py(name: str) -> None:
    block = BLOCKS[name]
    raw = np.random.default_rng(5).integers(0, 256, (256, block.block_nbytes), dtype=np.uint8)
    # In turn in every byte of a block: scales of all formats stand somewhere.
    for place in range(block.block_nbytes):
        raw[:, place] = np.arange(256)
        assert_same_bits(decoded(raw.reshape(-1), block), reference(raw.reshape(-1), name))


def test_read_only_source_is_left_alone() -> None:
    raw = np.random.default_rng(3).integers(0, 256, 64 * 256, dtype=np.uint8)
    kept = raw.copy()
    raw.flags.writeable = False
    for name in OWN:
        part = raw[: raw.size // BLOCKS[name].block_nbytes * BLOCKS[name].block_nbytes]
        decoded(part, BLOCKS[name])
    np.testing.assert_array_equal(raw, kept)


def test_threads_decode_side_by_side() -> None:
    raw = np.random.default_rng(4).integers(0, 256, 4 * 4000 * 144, dtype=np.uint8).reshape(4, -1)
    out = np.empty((4, 4000 * 256), np.float32)
    threads = [threading.Thread(target=dequantize, args=(raw[index], "Q4_K", out[index])) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same_bits(out.reshape(-1), reference(raw.reshape(-1), "Q4_K"))


def test_unknown_encoding_is_refused() -> None:
    with pytest.raises(UnsupportedFormat, match="block encoding Q9_X: expected one of Q4_0, "):
        dequantize(np.empty(0, np.uint8), "Q9_X", np.empty(0, np.float32))


@pytest.mark.parametrize("name", INSIDE_GGML_ONLY)
def test_encoding_without_a_decoder_is_refused(name: str) -> None:
    block = BLOCKS[name]
    with pytest.raises(UnsupportedFormat, match=f"block encoding {name}: gguf-py has no decoder for it"):
        dequantize(np.zeros(block.block_nbytes, np.uint8), name, np.empty(block.block_numel, np.float32))


def test_part_of_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="Q4_0: 19 bytes are not whole blocks of 18 bytes"):
        dequantize(np.empty(19, np.uint8), "Q4_0", np.empty(32, np.float32))


def test_output_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="Q4_0: 1 blocks hold 32 values, out has room for 31"):
        dequantize(np.empty(18, np.uint8), "Q4_0", np.empty(31, np.float32))


def test_strided_output_is_refused() -> None:
    with pytest.raises(ValueError, match="Q4_0: raw and out must be contiguous"):
        dequantize(np.empty(18, np.uint8), "Q4_0", np.empty(64, np.float32)[::2])
