"""Malformed GGUF files."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

from gguf_builders import ARRAY, F32, STRING, U8, U32, Gguf, Stored, Typed, text
from loadstone.checkpoint.gguf import MAX_HEADER_BYTES
from loadstone.errors import (
    InvalidConfig,
    InvalidHeader,
    InvalidTemplate,
    LoadstoneError,
    MissingShard,
    NotACheckpoint,
    TruncatedFile,
    UnknownArchitecture,
    UnsupportedFormat,
)
from malformed_base import Case, Content, Control, Through, Writer
from malformed_folders import TEMPLATES

NAME = "model.gguf"
Q4_0 = 2
ONE = {"a": Stored((4, 8))}


def _writer(content: Gguf | Content, cut: int = 0) -> Writer:
    def write(folder: Path) -> Path:
        path = folder / NAME
        if isinstance(content, Gguf):
            content.write(path, cut=cut)
        else:
            path.write_bytes(content() if callable(content) else content)
        return path

    return write


def _case(
    title: str, content: Gguf | Content, message: str, error: type[LoadstoneError] = InvalidHeader, cut: int = 0
) -> Case:
    return Case(name=f"gguf: {title}", write=_writer(content, cut), error=error, message=message)


def _pair(title: str, raw: bytes, message: str, error: type[LoadstoneError] = InvalidHeader) -> Case:
    """A file with one good tensor and the metadata pair `k`."""
    return _case(title, Gguf({}, ONE, extra_pairs=text("k") + raw, num_extra_pairs=1), message, error)


def _tensors(title: str, tensors: Any, message: str, error: type[LoadstoneError] = InvalidHeader) -> Case:
    return _case(title, Gguf({}, tensors), message, error)


def _sparse_array(title: str, kind: int, count: int, nbytes: int, message: str) -> Case:
    """An array of zeros that takes no room on the disk."""

    def write(folder: Path) -> Path:
        head = _preamble(0, 1) + text("k") + struct.pack("<IIQ", ARRAY, kind, count)
        with (folder / NAME).open("wb") as file:
            file.write(head)
            file.truncate(len(head) + nbytes)
        return folder / NAME

    return Case(name=f"gguf: {title}", write=write, error=InvalidHeader, message=message)


def _preamble(num_tensors: int, num_pairs: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_pairs)


HEADERS = (
    _case("only the magic", b"GGUF", "middle of the version", TruncatedFile),
    _case("wrong magic", Gguf({}, ONE, magic=b"GGML"), "found b'GGML'", UnsupportedFormat),
    _case("version 0", Gguf({}, ONE, version=0), "GGUF version 0", UnsupportedFormat),
    _case("version 1", Gguf({}, ONE, version=1), "GGUF version 1", UnsupportedFormat),
    _case("version 2^32-1", Gguf({}, ONE, version=2**32 - 1), "GGUF version 4294967295", UnsupportedFormat),
    _case("big-endian", Gguf({}, ONE, version=3 << 24), "a big-endian GGUF file", UnsupportedFormat),
    _case("tensor count of 2^64-1", Gguf({}, ONE, num_tensors=2**64 - 1), "cannot lie in a file"),
    _case("pair count of 2^64-1", Gguf({}, ONE, num_pairs=2**64 - 1), "cannot lie in a file"),
    _case("one tensor too many", Gguf({}, ONE, num_tensors=2), "tensors 'a' and '' overlap"),
    _case("one pair too many", Gguf({}, ONE, num_pairs=1), "the name of tensor 0"),
    _case("300,000 tensors", lambda: _preamble(300_000, 0) + bytes(24) * 300_000, "at most 100,000 tensors"),
    _case("300,000 pairs", lambda: _preamble(0, 300_000) + bytes(14) * 300_000, "20,000 metadata pairs"),
    _pair("string length of 2^64-1", struct.pack("<IQ", STRING, 2**64 - 1), "would take 18446744073709551615 bytes"),
    _pair("string past the end", struct.pack("<IQ", STRING, 10_000), "the value of 'k'", TruncatedFile),
    _case(
        "key length of 2^63",
        Gguf({}, ONE, extra_pairs=struct.pack("<QIQ", 2**63, U32, 0), num_extra_pairs=1),
        "would take 9223372036854775808 bytes",
    ),
    _pair("value not UTF-8", struct.pack("<IQ", STRING, 2) + b"\xff\xfe", "is not UTF-8"),
    _pair("value of unknown type", struct.pack("<IQ", 99, 0), "unknown type 99"),
    _pair("array of 2^64-1", struct.pack("<IIQ", ARRAY, U8, 2**64 - 1), "does not fit"),
    _pair("array of strings of 2^60", struct.pack("<IIQ", ARRAY, STRING, 2**60), "does not fit"),
    _pair("array of unknown type", struct.pack("<IIQ", ARRAY, 99, 1) + bytes(8), "unknown type 99"),
    _pair("array in array in array", struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 5000, "nests arrays"),
    _pair("string in an array past the end", struct.pack("<IIQQ", ARRAY, STRING, 1, 2**62), "would take"),
    _sparse_array("60 MB of bytes as a list", U8, 60_000_000, 60_000_000, "elements"),
    _sparse_array("60 MB of empty strings", STRING, 7_500_000, 60_000_000, "elements"),
    _sparse_array("60 MB of empty lists", ARRAY, 5_000_000, 60_000_000, "elements"),
    _sparse_array("beyond the limit", U8, MAX_HEADER_BYTES, MAX_HEADER_BYTES * 2, "elements"),
    _case(
        "key twice",
        Gguf({"k": 1}, ONE, extra_pairs=text("k") + struct.pack("<II", U32, 1), num_extra_pairs=1),
        "'k' stands there twice",
    ),
    _case("alignment 0", Gguf({"general.alignment": 0}, ONE), "general.alignment is 0"),
    _case("alignment 24", Gguf({"general.alignment": 24}, ONE), "general.alignment is 24"),
    _case("alignment a text", Gguf({"general.alignment": "32"}, ONE), "general.alignment is '32'"),
    _case("alignment a megabyte", Gguf({"general.alignment": "x" * 1_000_000}, ONE), "general.alignment is 'xxx"),
    _case("alignment true", Gguf({"general.alignment": True}, ONE), "general.alignment is True"),
    _case("alignment of 2^31", Gguf({"general.alignment": 2**31}, ONE), "takes bytes", TruncatedFile),
    _case("a key of control characters", Gguf({"\x1b[2J\n": Typed(99, bytes(8))}, ONE), r"'\x1b[2J\n'"),
)

TENSORS = (
    # Found by fuzzing: 255 bytes of zeros are a thousand characters when they are escaped.
    _tensors("name of zeros, of an unknown type", {"\0" * 255: Stored((32,), 99)}, r"'\x00\x00", UnsupportedFormat),
    _tensors("name of 300 bytes", {"x" * 300: Stored((8,))}, "would take 300 bytes, more than 255"),
    _tensors("offset past the end", {"a": Stored((8,), offset=1 << 40)}, "takes bytes", TruncatedFile),
    _tensors("offset wrapping around 2^64", {"a": Stored((8,), offset=2**64 - 32)}, "takes bytes", TruncatedFile),
    _tensors("offset not aligned", {"a": Stored((8,), offset=4)}, "not a multiple of 32"),
    _tensors("overlapping", {"a": Stored((64,)), "b": Stored((8,), offset=32)}, "overlap at byte"),
    _tensors("same bytes twice", {"a": Stored((8,)), "b": Stored((8,), offset=0)}, "overlap at byte"),
    _tensors("shape overflowing", {"a": Stored((2**40, 2**40, 2**40), data=b"")}, "takes bytes", TruncatedFile),
    _tensors("shape overflowing to nothing", {"a": Stored((2**32, 2**32), data=b"")}, "takes bytes", TruncatedFile),
    _tensors("dimension of 2^64-1", {"a": Stored((2**64 - 1,), data=b"")}, "takes bytes", TruncatedFile),
    _tensors("five dimensions", {"a": Stored((1, 1, 1, 1, 1))}, "has 5 dimensions"),
    _tensors("twice", [("a", Stored((2,))), ("a", Stored((2,)))], "two tensors have the name 'a'"),
    _tensors("rows not whole blocks", {"a": Stored((2, 48), Q4_0)}, "not whole blocks of 32"),
    _tensors("blocks without a shape", {"a": Stored((), Q4_0, b"")}, "not whole blocks of 32"),
    _tensors("unknown type", {"a": Stored((32,), 99)}, "ggml type 99", UnsupportedFormat),
    _tensors("withdrawn type", {"a": Stored((32,), 4)}, "ggml type 4", UnsupportedFormat),
    _case("data cut short", Gguf({}, {"a": Stored((8,))}), "takes bytes", TruncatedFile, cut=1),
    _tensors("rotary factors past the end", {"rope_freqs.weight": Stored((64,), offset=4096)}, "takes", TruncatedFile),
)


def _split(folder: Path, count: int = 2, missing: int | None = None, **lies: Any) -> Path:
    paths = [folder / f"m-{index:05d}-of-{count:05d}.gguf" for index in range(1, count + 1)]
    for index, path in enumerate(paths):
        metadata = {"split.count": count, "split.no": index, "general.architecture": "llama"}
        Gguf({**metadata, **lies}, {f"t{index}": Stored((2,))}).write(path)
    if missing is not None:
        paths[missing].unlink()
    return paths[0]


def _split_with(place: str) -> Writer:
    """A split model whose second part is no file."""

    def write(folder: Path) -> Path:
        first = _split(folder, missing=1)
        second = folder / "m-00002-of-00002.gguf"
        if place == "fifo":
            os.mkfifo(second)
        elif place == "folder":
            second.mkdir()
        elif place == "loop":
            second.symlink_to(second)
        elif place == "same":
            second.write_bytes(first.read_bytes())
        else:
            second.write_bytes(b"")
        return first

    return write


def _split_case(title: str, write: Writer, message: str, error: type[LoadstoneError]) -> Case:
    return Case(name=f"gguf split: {title}", write=write, error=error, message=message)


SPLITS = (
    _split_case("part missing", lambda folder: _split(folder, 3, 1), "m-00002-of-00003.gguf", MissingShard),
    _split_case(
        "part missing, folder passed", lambda folder: _split(folder, 3, 1).parent, "expected 3 files", MissingShard
    ),
    _split_case("part a FIFO", _split_with("fifo"), "found a pipe, socket or device", NotACheckpoint),
    _split_case("part a folder", _split_with("folder"), "found a folder", NotACheckpoint),
    _split_case("part a loop of links", _split_with("loop"), "the first is m-00002-of-00002.gguf", MissingShard),
    _split_case("part empty", _split_with("empty"), "middle of the magic", TruncatedFile),
    _split_case(
        "part the first again", _split_with("same"), "tensor 't0' is in m-00001-of-00002.gguf too", InvalidHeader
    ),
    _split_case(
        "of 65,535 parts", lambda folder: _split(folder, **{"split.count": 65_535}), "65535 parts", InvalidHeader
    ),
    _split_case("of 2^40 parts", lambda folder: _split(folder, **{"split.count": 2**32 - 1}), "parts", InvalidHeader),
)

_TOKENS = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": ["<s>", "</s>", "h", "e", "l", "o", "he", "\u0120"],
    "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 1, 1],
    "tokenizer.ggml.merges": ["h e"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
}


def _tokenizer(title: str, changes: dict[str, Any], message: str, error: type[LoadstoneError] = InvalidHeader) -> Case:
    case = _case(title, Gguf({**_TOKENS, **changes}, ONE), message, error)
    return replace(case, name=f"gguf tokenizer: {title}", through=Through.TOKENIZER)


TOKENIZERS = (
    _tokenizer("unknown kind", {"tokenizer.ggml.model": "evil"}, "tokenizer.ggml.model is 'evil'", UnsupportedFormat),
    _tokenizer("kind of a megabyte", {"tokenizer.ggml.model": "x" * 1_000_000}, "is 'xxx", UnsupportedFormat),
    _tokenizer("no tokens", {"tokenizer.ggml.tokens": []}, "tokenizer.ggml.tokens"),
    _tokenizer("tokens a number", {"tokenizer.ggml.tokens": 7}, "tokenizer.ggml.tokens"),
    _tokenizer("tokens of numbers", {"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens"),
    _tokenizer("token id past the end", {"tokenizer.ggml.bos_token_id": 99}, "tokenizer.ggml.bos_token_id is 99"),
    _tokenizer("token id a text", {"tokenizer.ggml.eos_token_id": "x"}, "tokenizer.ggml.eos_token_id is 'x'"),
    _tokenizer("types of another length", {"tokenizer.ggml.token_type": [3]}, "tokenizer.ggml.token_type"),
    _tokenizer("merges of unknown tokens", {"tokenizer.ggml.merges": ["x y"]}, "out of vocabulary"),
    _tokenizer("merges a number", {"tokenizer.ggml.merges": 7}, "is not consistent"),
    _tokenizer("template a number", {"tokenizer.chat_template": 7}, "tokenizer.chat_template"),
    *(
        replace(
            _tokenizer(title, {"tokenizer.chat_template": template}, "chat template", InvalidTemplate),
            name=f"gguf chat template: {title}",
            through=Through.CHAT,
        )
        for title, template in TEMPLATES.items()
    ),
)


def _model(title: str, metadata: dict[str, Any], message: str, error: type[LoadstoneError]) -> Case:
    case = _case(title, Gguf(metadata, {"token_embd.weight": Stored((8, 32))}), message, error)
    return replace(case, name=f"gguf model: {title}", through=Through.LOAD)


_LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.embedding_length": 32,
    "llama.attention.head_count": 2,
}

MODELS = (
    _model("no architecture", {}, "lacks general.architecture", UnknownArchitecture),
    _model("unknown architecture", {"general.architecture": "os.system"}, "'os.system'", UnknownArchitecture),
    _model("architecture of a megabyte", {"general.architecture": "x" * 1_000_000}, "'xxx", UnknownArchitecture),
    _model("architecture a list", {"general.architecture": ["llama"]}, "general.architecture", UnknownArchitecture),
    _model("four billion blocks", {**_LLAMA, "llama.block_count": 2**32 - 1}, "block_count promises", InvalidConfig),
    _model("blocks a text", {**_LLAMA, "llama.block_count": "many"}, "block_count", InvalidConfig),
    _model(
        "no heads", {**_LLAMA, "llama.block_count": 0, "llama.attention.head_count": 0}, "contradict", InvalidConfig
    ),
    _model(
        "heads a text",
        {**_LLAMA, "llama.block_count": 0, "llama.attention.head_count": "x"},
        "contradict",
        InvalidConfig,
    ),
)

CASES = (*HEADERS, *TENSORS, *SPLITS, *TOKENIZERS, *MODELS)

CONTROLS = (
    Control(name="gguf: one tensor", write=_writer(Gguf({}, ONE))),
    Control(name="gguf: version 2", write=_writer(Gguf({}, ONE, version=2))),
    Control(name="gguf: split in two", write=_split, tensors=("t0", "t1")),
    Control(name="gguf: no tensors", write=_writer(Gguf({"k": 1})), tensors=()),
    Control(name="gguf: a vocabulary of 100,000", write=_writer(Gguf({"t": [f"t{i}" for i in range(100_000)]}, ONE))),
    Control(name="gguf: alignment 64", write=_writer(Gguf({"general.alignment": 64}, ONE, alignment=64))),
    Control(name="gguf: a shape of none", write=_writer(Gguf({}, {"a": Stored((), F32)}))),
)
