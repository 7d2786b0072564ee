from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save_file

from loadstone.checkpoint.safetensors import MAX_HEADER_BYTES, read_safetensors
from loadstone.dtypes import DTYPES, SAFETENSORS_DTYPES
from loadstone.errors import InvalidHeader, NotACheckpoint, SourceNotFound, TruncatedFile


def entry(dtype: object = "U8", shape: object = (4,), begin: object = 0, end: object = 4) -> dict[str, object]:
    shape = list(shape) if isinstance(shape, tuple) else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(folder: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def refused(path: Path, message: str, kind: type[Exception] = InvalidHeader) -> None:
    with pytest.raises(kind, match=message) as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


ALL_DTYPES = [name for name in DTYPES if hasattr(torch, name) and DTYPES[name].safetensors]


def test_every_tensor_has_the_bytes_of_the_reference(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t.{name}": torch.randint(0, 2, (3, 5, DTYPES[name].bits // 8), generator=generator, dtype=torch.uint8)
        .view(getattr(torch, name))
        .squeeze(-1)
        for name in ALL_DTYPES
        if name != "bool"
    }
    tensors |= {"flag": torch.tensor([True, False]), "scalar": torch.tensor(2.5), "empty": torch.empty(0, 7)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    found, metadata = read_safetensors(path)
    assert metadata == {"format": "pt"}
    assert found.keys() == tensors.keys()
    data = path.read_bytes()
    for name, tensor in tensors.items():
        info = found[name]
        assert info.file == path
        assert f"torch.{info.dtype}" == str(tensor.dtype)
        assert info.shape == tuple(tensor.shape)
        assert info.strides is None
        assert data[info.offset : info.offset + info.nbytes] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_tensors_come_in_file_order(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3, dtype=torch.uint8), "z": torch.zeros(2), "m": torch.zeros(5)}, path)
    with safe_open(path, "pt") as reference:
        assert list(read_safetensors(path)[0]) == list(reference.offset_keys())


def test_packed_four_bit_elements(tmp_path: Path) -> None:
    found, _ = read_safetensors(write(tmp_path, {"a": entry("F4", (2, 4), 0, 4)}, bytes(4)))
    assert found["a"].dtype == "float4_e2m1fn"
    assert found["a"].shape == (2, 4)
    assert found["a"].nbytes == 4


def test_the_table_is_that_of_the_reference(tmp_path: Path) -> None:
    """Every code is one that safetensors' own reader takes, of the same width, and none that it takes is missing."""
    for dtype in SAFETENSORS_DTYPES.values():
        path = write(tmp_path, {"a": entry(dtype.safetensors, (8,), 0, dtype.bits)}, bytes(dtype.bits))
        assert deserialize(path.read_bytes())[0][1]["dtype"] == dtype.safetensors
        assert read_safetensors(path)[0]["a"].nbytes == dtype.bits
    with pytest.raises(SafetensorError) as caught:
        deserialize(write(tmp_path, {"a": entry("F5")}, bytes(4)).read_bytes())
    named = set(re.findall("`([A-Z]+[0-9A-Z_]*)`", str(caught.value))) - {"F5"}
    assert named == set(SAFETENSORS_DTYPES)


def test_no_tensors(tmp_path: Path) -> None:
    assert read_safetensors(write(tmp_path, {"__metadata__": {"a": "b"}})) == ({}, {"a": "b"})


def test_header_longer_than_the_first_read(tmp_path: Path) -> None:
    header = {f"layer.{index:05d}": entry(begin=4 * index, end=4 * index + 4) for index in range(3000)}
    assert len(read_safetensors(write(tmp_path, header, bytes(12000)))[0]) == 3000


def test_sparse_file_larger_than_memory(tmp_path: Path) -> None:
    size = 10**12
    path = write(tmp_path, {"a": entry("U8", (size,), 0, size)})
    os.truncate(path, path.stat().st_size + size)
    assert read_safetensors(path)[0]["a"].nbytes == size


def test_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "none", "expected a file, found nothing there", SourceNotFound)


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    refused(tmp_path, "expected a regular file, found a folder", NotACheckpoint)


def test_fifo_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    os.mkfifo(path)
    refused(path, "found a pipe, socket or device", NotACheckpoint)


def test_unreadable_path(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    refused(loop, "expected a readable file; opening it failed", NotACheckpoint)


@pytest.mark.parametrize("nbytes", [0, 7])
def test_file_too_short_for_a_length(tmp_path: Path, nbytes: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(nbytes))
    refused(path, f"at least 8 bytes of safetensors, found {nbytes}", TruncatedFile)


def test_header_of_length_zero(tmp_path: Path) -> None:
    refused(write(tmp_path, b""), "found one of length 0")


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**64 - 1])
def test_header_too_large(tmp_path: Path, length: int) -> None:
    refused(write(tmp_path, b"{}", length=length), f"at most {MAX_HEADER_BYTES} bytes, found a length of {length}")


def test_header_past_the_end(tmp_path: Path) -> None:
    refused(write(tmp_path, b"{}", length=3), "header of 3 bytes, found the end of the file after 2", TruncatedFile)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"\xff": 1}', "expected UTF-8, found an invalid byte at 2"),
        (b"{]", "expected JSON, found what does not parse"),
        (b"[]", "expected a JSON object, found a list"),
        (b"null", "expected a JSON object, found a NoneType"),
        (b'{"a": {}, "a": {}}', "the key a stands there twice"),
        (b'{"a": {"dtype": "U8", "dtype": "I8"}}', "the key dtype stands there twice"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 1_000_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "does not parse"),
        (b'{"\\ud800": {}}', "half a surrogate pair"),
    ],
)
def test_header_that_is_no_json_object(tmp_path: Path, text: bytes, message: str) -> None:
    refused(write(tmp_path, text), message)


def test_header_that_is_a_bomb(tmp_path: Path) -> None:
    refused(write(tmp_path, b'{"a":[' + b"[]," * 3_000_000 + b"[]]}"), "expected three brackets a tensor")


@pytest.mark.parametrize("metadata", [[], "text", {"a": 1}, {"a": {}}])
def test_metadata_that_is_not_text(tmp_path: Path, metadata: object) -> None:
    refused(write(tmp_path, {"__metadata__": metadata}), "expected __metadata__ to map text to text")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (7, "expected dtype, shape and data_offsets"),
        ({"dtype": "U8", "shape": [4]}, "expected dtype, shape and data_offsets"),
        (entry(dtype="Q4_0"), "found 'Q4_0'; update Loadstone"),
        (entry(dtype=["U8"]), r"expected a dtype of BOOL U8 .*, found \['U8'\]"),
        (entry(dtype=None), "found a NoneType"),
        (entry(shape=4), "expected a shape of non-negative integers, found a int"),
        (entry(shape="4"), "non-negative integers, found '4'"),
        (entry(shape={"4": 4}), "non-negative integers, found a dict"),
        (entry(shape=(-4,)), r"non-negative integers, found \[-4\]"),
        (entry(shape=(4.0,)), r"non-negative integers, found \['float'\]"),
        (entry(shape=(True,), end=1), "non-negative integers"),
        (entry(shape=(2**63,), end=2**63), "non-negative integers"),
        (entry(shape=(0, 10**300), end=0), r"found \[0, 'a huge number'\]"),
        (entry(shape=([[0] * 9], 10**12)), r"non-negative integers, found \['list'"),
        (entry(shape=(1,) * 65, end=1), "expected at most 64 dimensions, found 65"),
        ({"dtype": "U8", "shape": [4], "data_offsets": [0]}, "data_offsets of two integers"),
        ({"dtype": "U8", "shape": [4], "data_offsets": 0}, "data_offsets of two integers, found a int"),
        (entry(end=4.0), r"data_offsets of two integers, found \[0, 'float'\]"),
        (entry(begin=-4, end=0), r"0 <= begin <= end, found \[-4, 0\]"),
        (entry(begin=4, end=0), r"0 <= begin <= end, found \[4, 0\]"),
        (entry(end=3), r"expected 4 bytes for U8 of shape \[4\], found 3"),
        (entry(dtype="F32"), r"expected 16 bytes for F32 of shape \[4\], found 4"),
        (entry(shape=(2**40, 2**40)), rf"expected {2**80} bytes"),
        (entry(dtype="F4", shape=(7,)), "expected whole bytes, found 28 bits of F4"),
    ],
)
def test_entry_that_contradicts_itself(tmp_path: Path, wrong: object, message: str) -> None:
    path = write(tmp_path, {"good": entry(end=0, shape=(0,)), "bad": wrong}, bytes(4))
    refused(path, f"tensor 'bad': .*{message}")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (entry(begin=3, end=7), "begin at 4, found 3: an overlap"),
        (entry(begin=0, end=4), "begin at 4, found 0: an overlap"),
        (entry(begin=5, end=9), "begin at 4, found 5: a hole"),
    ],
)
def test_tensors_that_do_not_follow_one_another(tmp_path: Path, second: object, message: str) -> None:
    refused(write(tmp_path, {"a": entry(), "b": second}, bytes(9)), message)


def test_first_tensor_after_a_hole(tmp_path: Path) -> None:
    refused(write(tmp_path, {"a": entry(begin=1, end=5)}, bytes(5)), "begin at 0, found 1: a hole")


def test_data_cut_short(tmp_path: Path) -> None:
    refused(write(tmp_path, {"a": entry()}, bytes(3)), "expected 4 bytes of tensors .*found 3", TruncatedFile)


def test_data_after_the_last_tensor(tmp_path: Path) -> None:
    refused(write(tmp_path, {"a": entry()}, bytes(6)), "expected the file to end with its last tensor, found 2 more")


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(4.0)}, path)
    data = path.read_bytes()
    for nbytes in range(len(data)):
        path.write_bytes(data[:nbytes])
        with pytest.raises(TruncatedFile, match=re.escape(str(path))):
            read_safetensors(path)
