from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loadstone.checkpoint.pickle_machine import EndOfPickleError, MalformedPickleError, run_pickle
from loadstone.checkpoint.torch_objects import TorchOwner
from loadstone.checkpoint.torch_pickle import read_torch_pickle
from loadstone.checkpoint.values import TensorInfo
from loadstone.errors import (
    InvalidHeader,
    LoadstoneError,
    NotACheckpoint,
    TruncatedFile,
    UnsafePickle,
    UnsupportedFormat,
)

BOTH = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(folder: Path, value: object, zipped: bool = True, protocol: int = 2) -> Path:
    path = folder / "pytorch_model.bin"
    torch.save(value, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return path


def read(info: TensorInfo) -> torch.Tensor:
    """The tensor that (file, offset, nbytes, strides) describe."""
    with info.file.open("rb") as file:
        file.seek(info.offset)
        data = bytearray(file.read(info.nbytes))
    assert len(data) == info.nbytes
    if not data:
        return torch.empty(info.shape, dtype=getattr(torch, info.dtype))
    flat = torch.frombuffer(data, dtype=torch.uint8).view(getattr(torch, info.dtype))
    return flat.reshape(info.shape) if info.strides is None else flat.as_strided(info.shape, info.strides)


def refused(path: Path, message: str, kind: type[Exception] = InvalidHeader) -> None:
    with pytest.raises(kind, match=message) as caught:
        read_torch_pickle(path)
    assert str(path) in str(caught.value)


def zoo() -> dict[str, torch.Tensor]:
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "contiguous": base,
        "tied": base,
        "transposed": base.T,
        "slice": base[1:3, 2:5],
        "row": base[2],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "parameter": torch.nn.Parameter(torch.randn(2, 3)),
        "half": torch.randn(5).half(),
        "bf16": torch.randn(5).bfloat16(),
        "double": torch.randn(5).double(),
        "long": torch.arange(5),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "complex": torch.randn(3, dtype=torch.complex64),
        "float8": torch.randn(6).to(torch.float8_e4m3fn),
        "uint16": torch.arange(6).to(torch.uint16),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 7),
        "rows of nothing": torch.empty(4, 0, 5)[1:],
        "one_row": torch.randn(1, 4).as_strided((1, 4), (99, 1)),
    }


@BOTH
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_every_tensor_has_the_bytes_of_the_reference(tmp_path: Path, zipped: bool, protocol: int) -> None:
    tensors = zoo()
    path = save(tmp_path, tensors, zipped, protocol)
    found, notes = read_torch_pickle(path)
    # torch cannot load its own legacy files of float8 and uint16.
    reference = torch.load(path, weights_only=False) if zipped else tensors
    assert notes == ()
    assert found.keys() == reference.keys()
    for name, tensor in reference.items():
        value = read(found[name])
        assert value.dtype == tensor.dtype
        assert value.shape == tensor.shape
        assert value.contiguous().view(-1).view(torch.uint8).tolist() == (
            tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()
        )
    assert [info.offset for info in found.values()] == sorted(info.offset for info in found.values())


@BOTH
def test_tied_tensors_share_their_place(tmp_path: Path, zipped: bool) -> None:
    found, _ = read_torch_pickle(save(tmp_path, zoo(), zipped))
    assert found["tied"].offset == found["contiguous"].offset
    assert found["row"].offset == found["contiguous"].offset + 12 * 4


@BOTH
def test_strides_only_where_they_matter(tmp_path: Path, zipped: bool) -> None:
    found, _ = read_torch_pickle(save(tmp_path, zoo(), zipped))
    strides = {name: info.strides for name, info in found.items() if info.strides is not None}
    assert strides == {"transposed": (1, 6), "slice": (6, 1), "expanded": (0, 1)}
    assert found["expanded"].nbytes == 8
    assert found["slice"].nbytes == (6 + 3) * 4


@BOTH
def test_state_dict_of_a_module(tmp_path: Path, zipped: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    found, notes = read_torch_pickle(save(tmp_path, module.state_dict(), zipped))
    assert found.keys() == module.state_dict().keys()
    assert notes == ()


def test_parameter_and_tensor_with_attributes(tmp_path: Path) -> None:
    parameter, tensor = torch.nn.Parameter(torch.ones(2)), torch.ones(3)
    parameter.note = "kept"  # type: ignore[attr-defined]
    tensor.note = "kept"  # type: ignore[attr-defined]
    found, _ = read_torch_pickle(save(tmp_path, {"a": parameter, "b": tensor}))
    assert found["a"].shape == (2,)
    assert found["b"].shape == (3,)


@BOTH
@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model_state", "model", "module"])
def test_wrapped_state_dict(tmp_path: Path, zipped: bool, key: str) -> None:
    found, notes = read_torch_pickle(save(tmp_path, {"epoch": 3, key: {"a": torch.ones(2)}}, zipped))
    assert list(found) == ["a"]
    assert notes == (f"pytorch_model.bin: the tensors lie under {key!r}; left out beside it: 'epoch'",)


def test_checkpoint_of_a_trainer(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    content = {
        "optimizer": optimizer.state_dict(),
        "losses": defaultdict(list, {"train": [1.0]}),
        "size": torch.Size([1, 2]),
        "seen": {1, 2},
        "raw": b"abc",
        "big": 2**80,
        "device": torch.device("cpu"),
        "state_dict": {"model": {**module.state_dict(), "step": 7, "dtype": torch.bfloat16}},
    }
    found, notes = read_torch_pickle(save(tmp_path, content))
    assert list(found) == ["weight", "bias"]
    assert len(notes) == 3
    assert "left out beside it: 'optimizer', 'losses', 'size', 'seen', 'raw' and 2 more" in notes[0]
    assert notes[1] == "pytorch_model.bin: the tensors lie under 'model'"
    assert notes[2] == "pytorch_model.bin: 2 entries are no tensors and were left out: 'step', 'dtype'"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2), "expected a dictionary of tensors, found a single tensor"),
        ([torch.ones(2)], "expected a dictionary of tensors, found a single list"),
        ({}, "found an empty dictionary"),
        ({"net": {"a": torch.ones(1)}, "epoch": 1}, "found 'net', 'epoch'; save the state_dict alone"),
        ({1: torch.ones(1)}, "found an empty dictionary"),
    ],
)
def test_no_tensors_by_name(tmp_path: Path, value: object, message: str) -> None:
    refused(save(tmp_path, value), message, NotACheckpoint)


def test_dictionary_that_wraps_itself(tmp_path: Path) -> None:
    value: dict[str, Any] = {}
    value["model"] = value
    refused(save(tmp_path, value), "found 'model'; save the state_dict alone", NotACheckpoint)


class Evil:
    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@BOTH
@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_pickle_that_runs_a_command_is_refused_and_runs_nothing(tmp_path: Path, zipped: bool, protocol: int) -> None:
    witness = tmp_path / "ran"
    if protocol < 2 and not zipped:
        path = tmp_path / "pytorch_model.bin"
        path.write_bytes(pickle.dumps(Evil(os.system, f"touch {witness}"), protocol))
    else:
        path = save(tmp_path, {"a": torch.ones(1), "b": Evil(os.system, f"touch {witness}")}, zipped, max(protocol, 2))
    refused(path, "found a reference to 'posix.system'; nothing was run. Use a safetensors version", UnsafePickle)
    assert not witness.exists()


@pytest.mark.parametrize(
    "function", [eval, exec, getattr, open, __import__, os.remove, pickle.loads, torch.load, torch.hub.load]
)
def test_pickle_that_refers_to_code(tmp_path: Path, function: Callable[..., object]) -> None:
    refused(save(tmp_path, {"a": Evil(function, "x")}), f"found a reference to '.*{function.__name__}'", UnsafePickle)


def test_whole_module_is_refused(tmp_path: Path) -> None:
    refused(save(tmp_path, torch.nn.Linear(1, 1)), "reference to 'torch.nn.modules.linear.Linear'", UnsafePickle)


def test_numpy_scalar_is_left_out(tmp_path: Path) -> None:
    import numpy as np

    found, notes = read_torch_pickle(save(tmp_path, {"loss": np.float64(1), "a": torch.ones(1)}))
    assert list(found) == ["a"]
    assert notes == ("pytorch_model.bin: 1 entries are no tensors and were left out: 'loss'",)


def test_numpy_array_is_refused(tmp_path: Path) -> None:
    """It would be a weight that is silently left out."""
    import numpy as np

    refused(save(tmp_path, {"a": np.ones(3)}), "reference to 'numpy.*_reconstruct'", UnsafePickle)


def test_control_characters_of_a_name_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"\x80\x02c\x1b[2Jos\nsystem\n.")
    refused(path, r"'\\x1b\[2Jos.system'", UnsafePickle)


def test_dtype_that_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"\x80\x02ctorch\nQInt8Storage\n.")
    refused(path, "found 'QInt8Storage', which is not read; save the model with another", UnsupportedFormat)


def repack(path: Path, change: Callable[[str, bytes], bytes | None], method: int = zipfile.ZIP_STORED) -> Path:
    """Write a zip file anew, each entry changed or dropped."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in content.items():
            if (changed := change(name, data)) is not None:
                archive.writestr(name, changed)
    return path


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
    refused(path, "expected 1000 bytes of x/data.pkl at 40, found the end of the file", TruncatedFile)


def test_pickle_too_large(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(zip64(b"", 2**40))
    refused(path, "expected at most 64000000 bytes in x/data.pkl, found 1099511627776")


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


def stream(path: Path, **changes: object) -> Path:
    """A zip whose single tensor says of itself what `changes` say; its storage has four float32."""
    values = {"offset": 0, "shape": (4,), "strides": (1,), **changes}

    class Storage:
        pass

    class Pickler(pickle._Pickler):  # type: ignore[name-defined]
        def persistent_id(self, value: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(value, Storage) else None

    args = (Storage(), values["offset"], values["shape"], values["strides"], False, OrderedDict())
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"a": Evil(torch._utils._rebuild_tensor_v2, *args)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", buffer.getvalue())
        archive.writestr("x/data/0", bytes(16))
    return path


def test_view_of_the_whole_storage(tmp_path: Path) -> None:
    assert read_torch_pickle(stream(tmp_path / "a.bin"))[0]["a"].nbytes == 16


@pytest.mark.parametrize(
    ("changes", "reach"),
    [({"offset": 1}, 20), ({"shape": (5,)}, 20), ({"strides": (2,)}, 28), ({"offset": 2**62}, 4 * 2**62 + 16)],
)
def test_view_outside_its_storage(tmp_path: Path, changes: dict[str, object], reach: int) -> None:
    path = stream(tmp_path / "a.bin", **changes)
    refused(path, f"tensor 'a': expected a view inside its storage of 16 bytes, found one that reaches to {reach}")


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": -1},
        {"offset": 1.0},
        {"shape": (-4,)},
        {"shape": [4]},
        {"strides": (-1,)},
        {"strides": (1, 1)},
        {"shape": (2**63,)},
        {"shape": (1,) * 65, "strides": (1,) * 65},
    ],
)
def test_view_that_cannot_be(tmp_path: Path, changes: dict[str, object]) -> None:
    refused(stream(tmp_path / "a.bin", **changes), "expected a pickle of torch.save, found a malformed one at byte")


@pytest.mark.parametrize(
    "data",
    [
        b"\xff.",
        b"0.",
        b".",
        b"(.",
        b"K\x01R.",
        b"K\x01(e.",
        b"K\x01(u.",
        b"K\x01K\x02a.",
        b"}K\x01K\x02s",
        b"ccollections\nOrderedDict\nK\x01R.",
        b"h\x05.",
        b"K\x01\x85\x87.",
        b"Ifoo\n.",
        b"X\x01\x00\x00\x00\xff.",
        b"\x93.",
        b"K\x01K\x02\x93.",
        b"Q.",
        b"K\x01Q.",
        b"i\n",
        b"(o.",
        b"b.",
        b"K\x01b.",
        b"\x8e" + b"\xff" * 8 + b".",
        b"\x95" + b"\xff" * 8 + b".",
        b"T\xff\xff\xff\xff.",
    ],
)
def test_malformed_pickle(data: bytes) -> None:
    with pytest.raises((EndOfPickleError, MalformedPickleError)):
        run_pickle(data, TorchOwner(path=Path("x")))


@pytest.mark.parametrize("code", [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00"])
def test_extension_registry_is_refused(code: bytes) -> None:
    with pytest.raises(UnsafePickle, match=r"'copyreg.extension_1'"):
        run_pickle(code + b".", TorchOwner(path=Path("x")))


def test_memory_of_a_hostile_memo_index_is_small() -> None:
    # Python's own unpickler takes 64 GB for this.
    assert run_pickle(b"K\x01r\xff\xff\xff\xff.", TorchOwner(path=Path("x"))) == (1, 8)


def test_too_many_opcodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadstone.checkpoint.pickle_machine.MAX_OPCODES", 1000)
    with pytest.raises(MalformedPickleError, match="more than 1000 opcodes"):
        run_pickle(b"]" * 2000 + b".", TorchOwner(path=Path("x")))


def test_deeply_nested_keys_and_calls_do_not_overflow_the_stack() -> None:
    deep = b")" + b"\x85" * 200_000
    assert run_pickle(b"}" + deep + b"K\x01s.", TorchOwner(path=Path("x")))[0] == {}
    call = b"ctorch._tensor\n_rebuild_from_type_v2\n"
    nested = (call + b"q\x00") + b"h\x00N" * 5000 + b")" + b"\x87" * 5000 + b"R."
    with pytest.raises(MalformedPickleError):
        run_pickle(nested, TorchOwner(path=Path("x")))


def test_long_list_cannot_be_copied_over_and_over() -> None:
    pairs = b"](" + b"(X\x01\x00\x00\x00aK\x01l" * 3 + b"eq\x00"
    name = b"ccollections\nOrderedDict\nq\x01"
    data = pairs + name + b"h\x00\x85R" + b"h\x01h\x00\x85R\x86."
    assert run_pickle(data, TorchOwner(path=Path("x")))[0] == ({"a": 1}, {})


PLAIN: dict[str, object] = {
    "numbers": [0, 1, -1, 255, 256, 65535, 65536, -(2**31), 2**31, 2**100, -(2**100), 1.5, float("inf")],
    "texts": ["", "é", "x" * 300, "😀", b"", b"raw", b"y" * 300],
    "truth": [True, False, None],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
    "nested": {"a": {"b": [{}, []]}},
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_those_of_the_reference(protocol: int) -> None:
    data = pickle.dumps(PLAIN, protocol)
    if protocol == 2:  # bytes are written as a call there
        data = pickle.dumps({**PLAIN, "texts": PLAIN["texts"][:4]}, protocol)  # type: ignore[index]
    assert run_pickle(data, TorchOwner(path=Path("x"))) == (pickle.loads(data), len(data))
    small = pickletools.optimize(data)
    assert run_pickle(small, TorchOwner(path=Path("x")))[0] == pickle.loads(data)


@pytest.mark.parametrize("protocol", [0, 1])
def test_plain_values_of_old_protocols(protocol: int) -> None:
    value = {"a": [1, -7, 2**70, 1.5, True, False, None, "text", ("x", 2), {}]}
    data = pickle.dumps(value, protocol)
    assert run_pickle(data, TorchOwner(path=Path("x")))[0] == value


def test_damaged_bytes_give_named_errors(tmp_path: Path) -> None:
    import random

    choose = random.Random(0)
    for zipped in (True, False):
        path = save(tmp_path, {"a": torch.ones(2), "b": torch.ones(3, 3).T}, zipped)
        data = path.read_bytes()
        for _ in range(300):
            damaged = bytearray(data)
            for _ in range(choose.randint(1, 4)):
                damaged[choose.randrange(len(damaged))] = choose.randrange(256)
            path.write_bytes(damaged)
            try:
                for info in read_torch_pickle(path)[0].values():
                    assert 0 <= info.offset <= info.offset + info.nbytes <= len(damaged)
            except LoadstoneError as error:
                assert str(path) in str(error)  # noqa: PT017 - most of the damage is harmless
