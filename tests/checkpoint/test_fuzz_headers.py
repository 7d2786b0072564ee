"""Damaged files and structured garbage: each is read as tensors inside the file, or refused by name, at once.

A few hundred examples run here, the same ones each time. `LOADSTONE_FUZZ_EXAMPLES=100000 pytest
tests/checkpoint/test_fuzz_headers.py` draws as many new ones for each test; `tests/fuzz_headers.py` follows branches.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import malformed_pickles
from fuzz_headers import meet, parsers, seeds
from gguf_builders import Gguf, Stored, Typed
from malformed_base import safetensors

EXAMPLES = int(os.environ.get("LOADSTONE_FUZZ_EXAMPLES", "0"))
FEW = settings(
    max_examples=EXAMPLES or 120,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
PARSERS = parsers()
SEEDS = {name: list(seeds(name)) for name in PARSERS}

# The numbers at which lengths, counts and offsets go wrong.
EDGES = [0, 1, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
NUMBERS = st.sampled_from(EDGES) | st.integers(0, 300)


@st.composite
def damaged(draw: st.DrawFn, parser: str) -> bytes:
    """A file of the corpus with up to four damages."""
    data = bytearray(draw(st.sampled_from(SEEDS[parser])))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(0, 16))
        match draw(st.sampled_from(["flip", "cut", "drop", "insert", "number", "splice", "repeat"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + length]
            case "insert":
                data[at:at] = draw(st.binary(max_size=16))
            case "number":
                packed = struct.pack(draw(st.sampled_from(["<Q", ">Q"])), draw(NUMBERS))
                data[at : at + 8] = packed[: draw(st.sampled_from([1, 2, 4, 8]))]
            case "splice":
                data[at:] = draw(st.sampled_from(SEEDS[parser]))[at:]
            case "repeat":
                data[at:at] = data[at : at + length] * draw(st.integers(1, 50))
    return bytes(data)


JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "F4", "BOOL"]) | JSON,
        "shape": st.lists(NUMBERS, max_size=4) | JSON,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON,
    }
)


@pytest.mark.parametrize("parser", PARSERS)
@FEW
@given(data=st.data())
def test_damaged_file_is_read_or_refused(parser: str, tmp_path: Path, data: st.DataObject) -> None:
    meet(PARSERS[parser], data.draw(damaged(parser)), tmp_path / "input")


@FEW
@given(header=st.dictionaries(st.text(max_size=8), ENTRIES | JSON, max_size=4) | JSON, data=st.binary(max_size=40))
def test_any_json_is_a_safetensors_header_or_refused(header: Any, data: bytes, tmp_path: Path) -> None:
    content = safetensors(json.dumps(header).encode(), data)
    meet(PARSERS["safetensors"], content, tmp_path / "input")


OPCODES = st.one_of(
    st.sampled_from([bytes((code,)) for code in range(256)]),
    st.sampled_from([malformed_pickles.tensor(), malformed_pickles.storage(), malformed_pickles.text("a")]),
    st.builds(malformed_pickles.name, st.sampled_from(["torch", "collections", "os"]), st.sampled_from(["Size", "x"])),
    st.binary(max_size=6),
    NUMBERS.map(malformed_pickles.plain),
)


@FEW
@given(opcodes=st.lists(OPCODES, max_size=30), zipped=st.booleans())
def test_any_opcodes_are_a_pickle_or_refused(opcodes: list[bytes], zipped: bool, tmp_path: Path) -> None:
    root = b"\x80\x02" + b"".join(opcodes) + b"."
    content = malformed_pickles.torch_zip(root) if zipped else malformed_pickles.legacy(root)
    meet(PARSERS["torch_pickle"], content, tmp_path / "input")


VALUES = st.one_of(
    st.booleans(),
    st.integers(0, 2**31),
    st.text(max_size=8),
    st.lists(st.integers(0, 9), max_size=4),
    st.builds(Typed, st.integers(0, 14), st.binary(max_size=20)),
)
STORED = st.builds(
    Stored,
    st.lists(NUMBERS, max_size=5),
    st.integers(0, 45),
    st.just(b"") | st.binary(max_size=64),
    st.none() | NUMBERS,
)


@FEW
@given(
    metadata=st.dictionaries(st.sampled_from(["general.alignment", "split.count", "a", "ö"]), VALUES),
    tensors=st.dictionaries(st.text(max_size=4), STORED, max_size=4),
    num_tensors=st.none() | NUMBERS,
    num_pairs=st.none() | NUMBERS,
)
def test_any_gguf_header_is_read_or_refused(
    metadata: dict[str, Any],
    tensors: dict[str, Stored],
    num_tensors: int | None,
    num_pairs: int | None,
    tmp_path: Path,
) -> None:
    path = Gguf(metadata, tensors, num_tensors=num_tensors, num_pairs=num_pairs).write(tmp_path / "input.gguf")
    meet(PARSERS["gguf"], path.read_bytes(), path)
