"""Torch pickles whose container is damaged or foreign: zip files and the legacy form."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from loadstone.checkpoint.torch_pickle import read_torch_pickle
from loadstone.errors import NotACheckpoint, TruncatedFile, UnsupportedFormat
from pickle_builders import read, refused, repack, save, zoo


def test_repacked_by_another_zip_program(tmp_path: Path) -> None:
    path = repack(save(tmp_path, {"a": torch.arange(3.0)}), lambda name, data: data)
    assert read(read_torch_pickle(path)[0]["a"]).tolist() == [0, 1, 2]


def test_compressed_entries(tmp_path: Path) -> None:
    path = repack(save(tmp_path, zoo()), lambda name, data: data, zipfile.ZIP_DEFLATED)
    refused(path, "expected .* stored as it is, found it compressed or encrypted", UnsupportedFormat)


def test_zip_without_a_pickle(tmp_path: Path) -> None:
    path = repack(save(tmp_path, zoo()), lambda name, data: None if name.endswith(".pkl") else data)
    refused(path, "expected one data.pkl in the zip archive, found 0", NotACheckpoint)


def test_torchscript(tmp_path: Path) -> None:
    path = save(tmp_path, zoo())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("pytorch_model/constants.pkl", b"")
    refused(path, "expected tensors, found a TorchScript program", UnsupportedFormat)


def test_big_endian_zip(tmp_path: Path) -> None:
    path = repack(save(tmp_path, zoo()), lambda name, data: b"big" if name.endswith("byteorder") else data)
    refused(path, "expected little-endian numbers, found byte order b'big'", UnsupportedFormat)


def test_missing_storage(tmp_path: Path) -> None:
    path = repack(save(tmp_path, zoo()), lambda name, data: None if name.endswith("data/0") else data)
    refused(path, "expected a zip entry 'data/0', found none")


def test_storage_of_another_size(tmp_path: Path) -> None:
    path = repack(save(tmp_path, zoo()), lambda name, data: data[:-4] if name.endswith("data/0") else data)
    refused(path, "expected 96 bytes in storage '0', as the pickle says, found 92")


def test_entry_twice(tmp_path: Path) -> None:
    path = save(tmp_path, zoo())
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("pytorch_model/data/0", b"")
    refused(path, "expected each zip entry once, found 'pytorch_model/data/0' twice")


def test_zip_cut_short(tmp_path: Path) -> None:
    path = save(tmp_path, zoo())
    data = path.read_bytes()
    for nbytes in range(4, len(data), 37):
        path.write_bytes(data[:nbytes])
        refused(path, "expected a zip archive to end with its directory, found none", TruncatedFile)


def test_directory_of_a_zip_damaged(tmp_path: Path) -> None:
    path = save(tmp_path, zoo())
    data = path.read_bytes()
    path.write_bytes(data.replace(b"PK\x01\x02", b"PK\x01\x03"))
    refused(path, "expected whole entries in the zip directory, found a damaged one after 0")
    path.write_bytes(data[:4] + data[4:].replace(b"PK\x03\x04", b"PK\x03\x05"))
    refused(path, "expected a zip entry for .* at .*, found none")


def test_directory_of_a_zip_past_the_end(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"PK\x03\x04" + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, 2**31, 2**31, 0))
    refused(path, "expected a zip directory of at most 64000000 bytes inside the file, found one of 2147483648")


def zip64(data: bytes, entry_size: int) -> bytes:
    """An archive as one of more than 4 GB is written: sizes and offsets in ZIP64 records."""
    name = b"x/data.pkl"
    local = struct.pack("<4s5H3L2H", b"PK\x03\x04", 45, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, len(name), 0) + name + data
    extra = struct.pack("<HHHH", 7, 2, 0, 1)[:6] + struct.pack("<HHQQQ", 1, 24, entry_size, entry_size, 0)
    maxima = (2**32 - 1, 2**32 - 1)
    central = struct.pack(
        "<4s6H3L5H2L", b"PK\x01\x02", 45, 45, 0, 0, 0, 0, 0, *maxima, len(name), len(extra), 0, 0, 0, 0, 2**32 - 1
    )
    central += name + extra
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, len(central), len(local))
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(local) + len(central), 1)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 2**16 - 1, 2**16 - 1, *maxima, 0)
    return local + central + end64 + locator + end


def test_zip64_directory(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    content = pickle.dumps({"a": 1}, 2)
    path.write_bytes(zip64(content, len(content)))
    refused(path, "found 'a'; save the state_dict alone", NotACheckpoint)


def test_entry_past_the_end(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(zip64(b"", 1000))
    refused(path, "expected 1000 bytes of 'x/data.pkl' at 40, found the end of the file", TruncatedFile)


def test_pickle_too_large(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(zip64(b"", 2**40))
    refused(path, "expected at most 32000000 bytes in 'x/data.pkl', found 1099511627776")


def test_legacy_cut_short(tmp_path: Path) -> None:
    path = save(tmp_path, zoo(), zipped=False)
    data = path.read_bytes()
    for nbytes in range(2, len(data), 41):
        path.write_bytes(data[:nbytes])
        refused(path, "found the end of", TruncatedFile)


def test_legacy_pickle_longer_than_the_first_read(tmp_path: Path) -> None:
    path = save(tmp_path, {"a": torch.arange(3.0), "text": "x" * 3_000_000}, zipped=False)
    assert read(read_torch_pickle(path)[0]["a"]).tolist() == [0, 1, 2]


def test_legacy_big_endian(tmp_path: Path) -> None:
    path = save(tmp_path, zoo(), zipped=False)
    data = path.read_bytes()
    at = data.index(b"little_endian")
    path.write_bytes(data[:at] + data[at:].replace(b"\x88", b"\x89", 1))
    refused(path, "expected little-endian numbers, found others", UnsupportedFormat)


def test_legacy_of_another_protocol(tmp_path: Path) -> None:
    path = save(tmp_path, zoo(), zipped=False)
    path.write_bytes(path.read_bytes().replace(b"M\xe9\x03", b"M\xe8\x03", 1))
    refused(path, "expected protocol 1001 of torch.save, found another", UnsupportedFormat)


def test_legacy_storage_of_another_size(tmp_path: Path) -> None:
    path = save(tmp_path, {"a": torch.ones(3)}, zipped=False)
    data = path.read_bytes()
    path.write_bytes(data[:-20] + (2).to_bytes(8, "little") + data[-12:])
    refused(path, "expected 12 bytes in storage '.*', as the pickle says, found 8")


def test_plain_pickle(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps({"a": 1}, 2))
    refused(path, "expected a file of torch.save, found another pickle", NotACheckpoint)
