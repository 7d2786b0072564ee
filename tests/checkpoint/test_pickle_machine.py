"""Pickles that lie about their tensors or are made to hurt."""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from loadstone.checkpoint.pickle_machine import EndOfPickleError, LongPickleError, MalformedPickleError, run_pickle
from loadstone.checkpoint.torch_objects import TorchOwner
from loadstone.checkpoint.torch_pickle import read_torch_pickle
from loadstone.errors import LoadstoneError, UnsafePickle
from pickle_builders import Evil, refused, save


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


def test_too_many_opcodes() -> None:
    with pytest.raises(LongPickleError, match="more than 1000 opcodes"):
        run_pickle(b"]" * 2000 + b".", TorchOwner(path=Path("x")), max_opcodes=1000)


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
