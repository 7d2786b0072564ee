"""Malformed .safetensors files."""

from __future__ import annotations

import json
import os
from pathlib import Path

from loadstone.checkpoint.safetensors import MAX_HEADER_BYTES
from loadstone.errors import InvalidHeader, LoadstoneError, NotACheckpoint, SourceNotFound, TruncatedFile
from malformed_base import GOOD, Case, Content, Control, Writer, entry, files, safetensors, sparse

NAME = "model.safetensors"


def _one(content: Content) -> Writer:
    return files({NAME: content})


def _case(name: str, content: Content, message: str, error: type[LoadstoneError] = InvalidHeader) -> Case:
    return Case(name=f"safetensors: {name}", write=_one(content), error=error, message=message)


def _bad_entry(name: str, wrong: object, message: str) -> Case:
    """A file whose second tensor is wrong in itself."""
    return _case(name, safetensors({"good": entry(shape=(0,), end=0), "bad": wrong}, bytes(4)), message)


def _pair(name: str, second: object, message: str, nbytes: int = 9) -> Case:
    """A file whose second tensor does not follow the first."""
    return _case(name, safetensors({"a": entry(), "b": second}, bytes(nbytes)), message)


_TWICE = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
_MB = 1_000_000

HEADERS = (
    _case("empty file", b"", "found an empty one", TruncatedFile),
    _case("shorter than a length", b"\x02\0\0\0", "expected at least 8 bytes", TruncatedFile),
    _case("header length 0", safetensors(b"", GOOD), "found one of length 0"),
    _case("header length 2^64-1", safetensors(b"{}", length=2**64 - 1), "found a length of 18446744073709551615"),
    _case("header past the end", safetensors(b"{}", length=300), "header of 300 bytes", TruncatedFile),
    _case("header not UTF-8", safetensors(b'{"\xff":1}'), "expected UTF-8, found an invalid byte at 2"),
    _case("header in UTF-16", safetensors('{"a":1}'.encode("utf-16")), "expected UTF-8"),
    _case("header not JSON", safetensors(b"{]"), "expected JSON, found what does not parse"),
    _case("header a list", safetensors(b"{}"[:0] + b"[1, 2]"), "expected a JSON object, found a list"),
    _case("header cut in a number", safetensors(b'{"a":1'), "expected JSON"),
    _case("half a surrogate as a name", safetensors(b'{"\\ud800":{}}'), "half a surrogate pair"),
    _case("tensor twice", safetensors(_TWICE, bytes(4)), "the key 'a' stands there twice"),
    _case("field twice", safetensors(b'{"a":{"dtype":"U8","dtype":"I8"}}'), "the key 'dtype' stands there twice"),
    _case("deep nesting of objects", lambda: safetensors(b'{"a":' * 100_000), "nested too deeply"),
    _case("deep nesting of lists", safetensors(b'{"a":' + b"[" * _MB), "nested too deeply"),
    _case("number of 5,000 digits", safetensors(b'{"a":' + b"9" * 5000 + b"}"), "does not parse"),
    _case("bomb of lists", lambda: safetensors(b'{"a":[' + b"[]," * 3 * _MB + b"[]]}"), "brackets"),
    _case("bomb of lists under 8 MB", lambda: safetensors(b'{"a":[' + b"[]," * 2_600_000 + b"[]]}"), "brackets"),
    _case("bomb of objects under 8 MB", lambda: safetensors(b'{"a":[' + b"{}," * 2_600_000 + b"{}]}"), "brackets"),
    _case("bomb of numbers", lambda: safetensors(b'{"a":[' + b"1e9," * 10 * _MB + b"0]}"), "commas"),
    Case(
        name="safetensors: header of 100 MB of zeros",
        write=sparse(NAME, MAX_HEADER_BYTES + 8, MAX_HEADER_BYTES.to_bytes(8, "little") + b"{"),
        error=InvalidHeader,
        message="expected JSON",
    ),
    Case(
        name="safetensors: header of more than 100 MB",
        write=sparse(NAME, MAX_HEADER_BYTES + 9, (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{"),
        error=InvalidHeader,
        message=f"at most {MAX_HEADER_BYTES} bytes",
    ),
    _case("metadata with a number", safetensors({"__metadata__": {"a": 1}}), "__metadata__ to map text to text"),
    _case("metadata a list", safetensors({"__metadata__": []}), "__metadata__ to map text to text"),
)

TENSORS = (
    _bad_entry("entry a number", 7, "expected dtype, shape and data_offsets"),
    _bad_entry("no offsets", {"dtype": "U8", "shape": [4]}, "expected dtype, shape and data_offsets"),
    _bad_entry("unknown dtype", entry(dtype="Q4_0"), "found 'Q4_0'; update Loadstone"),
    _bad_entry("dtype a list", entry(dtype=["U8"]), "found ['U8']"),
    _bad_entry("shape negative", entry(shape=(-4,)), "non-negative integers, found [-4]"),
    _bad_entry("shape of floats", entry(shape=(4.0,)), "non-negative integers, found ['float']"),
    _bad_entry("shape of booleans", entry(shape=(True,), end=1), "non-negative integers"),
    _bad_entry("shape overflowing 64 bits", entry(shape=(2**40, 2**40)), f"expected {2**80} bytes"),
    _bad_entry("dimension beyond 64 bits", entry(shape=(0, 10**300), end=0), "a huge number"),
    _bad_entry("65 dimensions", entry(shape=(1,) * 65, end=1), "at most 64 dimensions, found 65"),
    _bad_entry("a megabyte of dimensions", entry(shape=[1] * 300_000, end=1), "at most 64 dimensions, found 300000"),
    _bad_entry("shape times dtype not the size", entry(dtype="F32"), "expected 16 bytes for F32 of shape [4], found 4"),
    _bad_entry("half a byte", entry(dtype="F4", shape=(7,)), "expected whole bytes, found 28 bits"),
    _bad_entry("offset negative", entry(begin=-4, end=0), "0 <= begin <= end, found [-4, 0]"),
    _bad_entry("offsets reversed", entry(begin=4, end=0), "0 <= begin <= end, found [4, 0]"),
    _bad_entry("offsets of floats", entry(end=4.0), "data_offsets of two integers"),
    _bad_entry("three offsets", {**entry(), "data_offsets": [0, 4, 4]}, "data_offsets of two integers"),
    _bad_entry("name of a megabyte", {"dtype": "x" * _MB, "shape": [4], "data_offsets": [0, 4]}, "xxx..."),
    _case("tensor name of a megabyte", lambda: safetensors({"x" * _MB: 7}), "xxx...': expected dtype, shape"),
    _case("tensor name with newlines", safetensors({"a\nb\r\x1b[2J": 7}), r"'a\nb\r\x1b[2J'"),
    _pair("overlap by a byte", entry(begin=3, end=7), "begin at 4, found 3: an overlap"),
    _pair("same bytes twice", entry(), "begin at 4, found 0: an overlap"),
    _pair("hole", entry(begin=5, end=9), "begin at 4, found 5: a hole"),
    _pair("offset overflowing", entry(begin=2**64 - 4, end=2**64), f"begin at 4, found {2**64 - 4}: a hole"),
    _case("hole before the first tensor", safetensors({"a": entry(begin=1, end=5)}, bytes(5)), "found 1: a hole"),
    _case("data past the end", safetensors({"a": entry()}, bytes(3)), "expected 4 bytes of tensors", TruncatedFile),
    _case("trailing bytes", GOOD + bytes(2), "found 2 more bytes"),
    _case("trailing zip archive", GOOD + b"PK\x05\x06" + bytes(18), "found 22 more bytes"),
)


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / NAME)
    return folder


def _folder(folder: Path) -> Path:
    (folder / NAME).mkdir()
    return folder


def _loop(folder: Path) -> Path:
    (folder / NAME).symlink_to(folder / "other")
    (folder / "other").symlink_to(folder / NAME)
    return folder


def _dangling(folder: Path) -> Path:
    (folder / NAME).symlink_to(folder / "nowhere")
    return folder


def _device(folder: Path) -> Path:
    (folder / NAME).symlink_to("/dev/zero")
    return folder


def _folder_loop(folder: Path) -> Path:
    (folder / "model").symlink_to(folder / "model")
    return folder / "model"


_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"

PLACES = (
    Case(name="file: a FIFO", write=_fifo, error=NotACheckpoint, message="found a pipe, socket or device"),
    Case(name="file: a folder", write=_folder, error=NotACheckpoint, message="found a folder"),
    Case(name="file: a loop of links", write=_loop, error=NotACheckpoint, message="opening it failed"),
    Case(name="file: a link to nothing", write=_dangling, error=SourceNotFound, message="found a link to nothing"),
    Case(name="file: a device", write=_device, error=NotACheckpoint, message="found a pipe, socket or device"),
    Case(name="folder: a link to itself", write=_folder_loop, error=NotACheckpoint, message="opening it failed"),
    Case(name="file: a git-LFS pointer", write=_one(_POINTER), error=NotACheckpoint, message="run `git lfs pull`"),
    Case(name="file: of text", write=_one(b"hello, this is no model"), error=InvalidHeader, message="length"),
    Case(name="folder: empty", write=lambda folder: folder, error=NotACheckpoint, message="found an empty folder"),
)

CASES = (*HEADERS, *TENSORS, *PLACES)


def _hub_snapshot(folder: Path) -> Path:
    """A snapshot of a hub cache: links to blobs beside it."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / ("a" * 40)
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / ("0" * 64)).write_bytes(GOOD)
    (snapshot / NAME).symlink_to(Path("../../blobs") / ("0" * 64))
    return snapshot


def _links(folder: Path) -> Path:
    (folder / "real").mkdir()
    (folder / "real" / "weights").write_bytes(GOOD)
    (folder / "real" / NAME).symlink_to("weights")
    (folder / "model").symlink_to("real")
    return folder / "model"


_SPACED = json.dumps({"a": entry()}).encode().ljust(4096)

CONTROLS = (
    Control(name="safetensors: one tensor", write=_one(GOOD)),
    Control(name="safetensors: header padded with blanks", write=_one(safetensors(_SPACED, bytes(4)))),
    Control(name="safetensors: no tensors", write=_one(safetensors({"__metadata__": {"a": "b"}})), tensors=()),
    Control(
        name="safetensors: tensors without bytes between others",
        write=_one(safetensors({"a": entry(), "b": entry(shape=(0, 7), begin=4, end=4)}, bytes(4))),
        tensors=("a", "b"),
    ),
    Control(
        name="safetensors: two megabytes of JSON as metadata",
        write=_one(
            safetensors({"__metadata__": {"tags": json.dumps([["tag", i] for i in range(150_000)])}, "a": entry()})
            + bytes(4)
        ),
    ),
    Control(name="folder: a snapshot of a hub cache, linked to blobs", write=_hub_snapshot),
    Control(name="folder: links to a folder of links", write=_links),
    Control(name="file: safetensors under the name .bin", write=files({"pytorch_model.bin": GOOD})),
)
