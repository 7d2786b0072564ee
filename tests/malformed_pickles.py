"""Malformed torch pickles: zip archives that lie, and pickles with every opcode that can call."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

from loadstone.errors import (
    InvalidHeader,
    LoadstoneError,
    NotACheckpoint,
    TruncatedFile,
    UnsafePickle,
    UnsupportedFormat,
)
from malformed_base import CANARY, Case, Content, Control, Writer

NAME = "pytorch_model.bin"

# Opcodes. Source: https://github.com/python/cpython/blob/main/Lib/pickletools.py
_PROTO, _STOP = b"\x80\x02", b"."


def text(value: str) -> bytes:
    """The opcode that pushes a text."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(module: str, attribute: str) -> bytes:
    """The opcode that pushes `module.attribute`."""
    return f"c{module}\n{attribute}\n".encode()


def plain(value: object) -> bytes:
    """The opcodes that push a plain value."""
    return pickle.dumps(value, 2)[len(_PROTO) : -len(_STOP)]


def storage(numel: object = 4, key: object = "0", kind: bytes = name("torch", "FloatStorage")) -> bytes:
    """The opcodes that push a storage."""
    return b"(" + text("storage") + kind + plain(key) + text("cpu") + plain(numel) + b"tQ"


def tensor(of: bytes | None = None, offset: object = 0, shape: object = (4,), strides: object = (1,)) -> bytes:
    """The opcodes that push a tensor."""
    arguments = (of or storage()) + plain(offset) + plain(shape) + plain(strides) + b"\x89}t"
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"R"


def state_dict(values: Mapping[str, bytes]) -> bytes:
    """A whole pickle of a dictionary."""
    return _PROTO + b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u" + _STOP


def archive(entries: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as out:
        for entry, content in entries.items():
            out.writestr(entry, content)
    return buffer.getvalue()


def torch_zip(values: Mapping[str, bytes] | bytes, nbytes: int = 16, **more: bytes) -> bytes:
    """A file of torch.save: a pickle and one storage."""
    content = values if isinstance(values, bytes) else state_dict(values)
    return archive({"x/data.pkl": content, "x/data/0": bytes(nbytes), **{f"x/{key}": more[key] for key in more}})


GOOD = torch_zip({"a": tensor()})


def _one(content: Content) -> Writer:
    def write(folder: Path) -> Path:
        (folder / NAME).write_bytes(content() if callable(content) else content)
        return folder

    return write


def _case(title: str, content: Content, message: str, error: type[LoadstoneError] = InvalidHeader) -> Case:
    return Case(name=f"pickle: {title}", write=_one(content), error=error, message=message)


def _hostile(title: str, opcodes: bytes, message: str, error: type[LoadstoneError] = UnsafePickle) -> Case:
    """A good tensor beside opcodes that would run something."""
    return _case(title, torch_zip({"a": tensor(), "evil": opcodes}), message, error)


_COMMAND = plain(f"touch {CANARY}")
_SYSTEM = name("os", "system")
_OS = "reference to 'os.system'"
_POPEN = name("subprocess", "Popen")
_ARGUMENT = b"(" + _COMMAND + b"t"

CALLS = (
    _hostile("GLOBAL alone", _SYSTEM, _OS),
    _hostile("REDUCE", _SYSTEM + _ARGUMENT + b"R", _OS),
    _hostile("STACK_GLOBAL", text("os") + text("system") + b"\x93" + _ARGUMENT + b"R", _OS),
    _hostile("STACK_GLOBAL of a dotted name", text("os") + text("path.os.system") + b"\x93", "os.path.os.system"),
    _hostile("INST", b"(" + _COMMAND + b"ios\nsystem\n", _OS),
    _hostile("OBJ", b"(" + _SYSTEM + _COMMAND + b"o", _OS),
    _hostile("NEWOBJ", _POPEN + _ARGUMENT + b"\x81", "'subprocess.Popen'"),
    _hostile("NEWOBJ_EX", _POPEN + b")" + b"}" + text("args") + _COMMAND + b"s\x92", "'subprocess.Popen'"),
    _hostile("BUILD with __setstate__", name("torch.nn", "Module") + b")\x81}" + text("x") + b"K\x01sb", "torch.nn"),
    _hostile("BUILD of a function's names", name("builtins", "print") + b"}b", "'builtins.print'"),
    _hostile("EXT1", b"\x82\x01", "'copyreg.extension_1'"),
    _hostile("EXT2", b"\x83\x01\x01", "'copyreg.extension_257'"),
    _hostile("EXT4", b"\x84\x01\x00\x00\x01", "'copyreg.extension_16777217'"),
    _hostile("PERSID of a line", b"Pos.system\n", "malformed one", InvalidHeader),
    _hostile("BINPERSID of a text", text("os.system") + b"Q", "malformed one", InvalidHeader),
    _hostile("BINPERSID of a number", b"K\x01Q", "malformed one", InvalidHeader),
    _hostile("BINPERSID of a short tuple", b")Q", "malformed one", InvalidHeader),
    _hostile("BINPERSID with code", b"(" + text("storage") + _SYSTEM + b"tQ", _OS),
    _hostile("BINPERSID of another kind", storage().replace(b"storage", b"program"), "malformed one", InvalidHeader),
    _hostile("getattr", name("builtins", "getattr"), "'builtins.getattr'"),
    _hostile("eval of Python 2", name("__builtin__", "eval"), "'__builtin__.eval'"),
    _hostile("exec", name("builtins", "exec"), "'builtins.exec'"),
    _hostile("__import__", name("builtins", "__import__"), "'builtins.__import__'"),
    _hostile("functools.partial", name("functools", "partial"), "'functools.partial'"),
    _hostile("operator.attrgetter", name("operator", "attrgetter"), "'operator.attrgetter'"),
    _hostile("runpy", name("runpy", "_run_code"), "'runpy._run_code'"),
    _hostile("pickle in pickle", name("_pickle", "loads"), "'_pickle.loads'"),
    _hostile("torch.load", name("torch.serialization", "load"), "'torch.serialization.load'"),
    _hostile("torch.hub", name("torch.hub", "load"), "'torch.hub.load'"),
    _hostile("torch.jit", name("torch.jit", "load"), "'torch.jit.load'"),
    _hostile("a name inside a harmless one", name("collections", "OrderedDict.__reduce__"), "OrderedDict.__reduce__"),
    _hostile("a storage type of another module", name("evil.torch", "FloatStorage"), "'evil.torch.FloatStorage'"),
    _hostile("_rebuild_from_type_v2 calls", name("torch._tensor", "_rebuild_from_type_v2") + _SYSTEM, _OS),
    _hostile("a name of control characters", name("os", "\x01" * 150), r"reference to 'os.\x01\x01"),
    _hostile("a name of a megabyte", name("os", "x" * 1_000_000), "reference to 'os.xxx"),
    _hostile("calling a number", b"K\x01)R", "malformed one", InvalidHeader),
    _hostile("calling a tensor", tensor() + b")R", "malformed one", InvalidHeader),
)

_MB = 1_000_000


def _laughs(depth: int) -> bytes:
    """Lists of ten references to the list before: 10^depth elements to whoever walks them."""
    return b"]q\x00" + b"".join(b"](" + b"h" + bytes((i,)) + b"h%c" % i * 9 + b"eq%c" % (i + 1) for i in range(depth))


_FROM_TYPE = name("torch._tensor", "_rebuild_from_type_v2") + b"q\x00"

BOMBS = (
    _case("billion laughs as the root", torch_zip(_PROTO + _laughs(100) + _STOP), "single list", NotACheckpoint),
    _case("two million lists", lambda: torch_zip(_PROTO + b"]" * 2 * _MB + _STOP), "found one with more than"),
    _case("two million marks", lambda: torch_zip(_PROTO + b"(" * 2 * _MB + _STOP), "found one with more than"),
    _case(
        "two million memos", lambda: torch_zip(_PROTO + b"N" + b"\x94" * 2 * _MB + _STOP), "found one with more than"
    ),
    _case(
        "nested tuples as a key",
        lambda: torch_zip(_PROTO + b"})" + b"\x85" * 200_000 + b"K\x01s."),
        "an empty dictionary",
        NotACheckpoint,
    ),
    _case(
        "nested lists",
        lambda: torch_zip(_PROTO + b"]" * 200_000 + b"a" * 199_999 + _STOP),
        "single list",
        NotACheckpoint,
    ),
    _hostile(
        "nested calls", _FROM_TYPE + b"h\x00N" * 9_000 + b")" + b"\x87" * 9_000 + b"R", "malformed", InvalidHeader
    ),
    _hostile("LONG of 100,000 digits", b"L" + b"9" * 100_000 + b"L\n", "malformed one", InvalidHeader),
    _hostile("LONG4 of 2 GB", b"\x8b\xff\xff\xff\x7f", "end of the pickle", TruncatedFile),
    _hostile("LONG4 of negative length", b"\x8b\xff\xff\xff\xff", "end of the pickle", TruncatedFile),
    _hostile("BINUNICODE8 of 2^63 bytes", b"\x8d" + b"\xff" * 7 + b"\x7f", "end of the pickle", TruncatedFile),
    _hostile("BYTEARRAY8 of 2^63 bytes", b"\x96" + b"\xff" * 7 + b"\x7f", "end of the pickle", TruncatedFile),
    _hostile("FRAME of 2^64 bytes", b"\x95" + b"\xff" * 8, "malformed one", InvalidHeader),
    _case("text of 40 MB", lambda: torch_zip({"a": text("\U0001f600" * 10 * _MB)}), "at most", InvalidHeader),
    _case("numel of 300,000 bits", torch_zip({"a": tensor(storage(1 << 300_000))}), "malformed one"),
)

TENSORS = (
    _case("huge claimed storage", torch_zip({"a": tensor(storage(2**62))}), f"expected {2**64} bytes in storage"),
    _case("claimed storage past 64 bits", torch_zip({"a": tensor(storage(2**70))}), "malformed one"),
    _case("claimed storage negative", torch_zip({"a": tensor(storage(-4))}), "malformed one"),
    _case("storage shorter than declared", torch_zip({"a": tensor()}, 12), "expected 16 bytes in storage '0'"),
    _case("storage longer than declared", torch_zip({"a": tensor()}, 20), "expected 16 bytes in storage '0'"),
    _case("storage missing", torch_zip({"a": tensor(storage(key="1"))}), "expected a zip entry 'data/1'"),
    _case(
        "storage above the archive", torch_zip({"a": tensor(storage(key="../../etc/passwd"))}), "expected a zip entry"
    ),
    _case("storage key a number", torch_zip({"a": tensor(storage(key=0))}), "malformed one"),
    _case("view past its storage", torch_zip({"a": tensor(offset=1)}), "reaches to 20"),
    _case("view with huge strides", torch_zip({"a": tensor(strides=(2**61,))}), "view inside its storage"),
    _case("view with huge shape", torch_zip({"a": tensor(shape=(2**62,))}), "view inside its storage"),
    _case("offset negative", torch_zip({"a": tensor(offset=-1)}), "malformed one"),
    _case("strides negative", torch_zip({"a": tensor(strides=(-1,))}), "malformed one"),
    _case("shape negative", torch_zip({"a": tensor(shape=(-4,))}), "malformed one"),
    _case("shape and strides of two lengths", torch_zip({"a": tensor(strides=(1, 1))}), "malformed one"),
    _case("shape a list", torch_zip({"a": tensor(shape=[4])}), "malformed one"),
    _case("65 dimensions", torch_zip({"a": tensor(shape=(1,) * 65, strides=(1,) * 65)}), "malformed one"),
    _case("a tensor of a tensor", torch_zip({"a": tensor(tensor())}), "malformed one"),
    _case(
        "expanded to 2^60 elements from one",
        torch_zip({"a": tensor(shape=(2**60,), strides=(0,))}),
        "expected no more elements than the file can hold",
    ),
    _case(
        "unknown storage type",
        torch_zip({"a": tensor(storage(kind=name("torch", "EvilStorage")))}),
        "'EvilStorage', which is not read",
        UnsupportedFormat,
    ),
    _case("no tensors", torch_zip(_PROTO + b"}" + _STOP), "an empty dictionary", NotACheckpoint),
    _case("a number", torch_zip(_PROTO + b"K\x01" + _STOP), "single int", NotACheckpoint),
)

PICKLES = (
    _case("bytes after STOP", torch_zip(state_dict({"a": tensor()}) + b"cos\nsystem\n"), "after it"),
    _case("no STOP", torch_zip(state_dict({"a": tensor()})[:-1]), "expected the end of the pickle", TruncatedFile),
    _case("empty", torch_zip(b""), "expected the end of the pickle", TruncatedFile),
    _case("unknown opcode", torch_zip(_PROTO + b"\xff" + _STOP), "malformed one at byte 3"),
    _case("empty stack", torch_zip(_PROTO + b"0" + _STOP), "malformed one"),
    _case("memo that was never set", torch_zip(_PROTO + b"h\x07" + _STOP), "malformed one"),
    _case("text not UTF-8", torch_zip(_PROTO + b"X\x01\0\0\0\xff" + _STOP), "malformed one"),
    _case("of a program without torch", pickle.dumps({"a": [1, 2]}, 4), "found another pickle", NotACheckpoint),
    _case("code without a zip archive", _PROTO + _SYSTEM + _ARGUMENT + b"R" + _STOP, _OS, UnsafePickle),
)


def _cut(content: bytes, part: float) -> bytes:
    return content[: int(len(content) * part)]


_TWO = archive(
    {
        "x/data.pkl": state_dict({"a": tensor(), "b": tensor(storage(key="1"))}),
        "x/data/0": bytes(16),
        "x/data/1": bytes(16),
    }
)


def _overlapping() -> bytes:
    """Two entries of the directory whose bytes are the same ones: sixteen bytes that count as thirty-two."""
    at = _TWO.rindex(b"PK\x01\x02")
    first = _TWO.rindex(b"PK\x01\x02", 0, at)
    return _TWO[: at + 42] + _TWO[first + 42 : first + 46] + _TWO[at + 46 :]


def _directory(count: int) -> bytes:
    """A file whose directory has `count` entries, all of them of one place."""
    local = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 0, 0, 8, 0) + b"00000000"
    entry = struct.Struct("<4s6H3L5H2L8s")
    packed = b"".join(
        entry.pack(b"PK\x01\x02", 20, 20, *[0] * 7, 8, *[0] * 5, 0, b"%08d" % number) for number in range(count)
    )
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(packed), len(local), 0)
    return local + packed + end


def _lying_end(nbytes: int, offset: int) -> bytes:
    """A file that is only the end of an archive, which lies about where its directory is."""
    return b"PK\x03\x04" + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, nbytes, offset, 0)


def _grown(content: bytes, entry: bytes, nbytes: int) -> bytes:
    """An archive whose directory gives one entry another size."""
    at = content.index(entry, content.index(b"PK\x01\x02")) - 26
    return content[:at] + struct.pack("<LL", nbytes, nbytes) + content[at + 8 :]


ZIPS = (
    _case("zip entry of 3 GB", _grown(GOOD, b"x/data.pkl", 3_000_000_000), "at most 32000000 bytes in 'x/data.pkl'"),
    # Found by fuzzing: names of control characters stood in messages as they were, or grew fourfold when escaped.
    _case(
        "zip entry of 3 GB with a name of control characters",
        _grown(archive({"\x1b[2J\n" + "\x01" * 200 + "/data.pkl": b"N."}), b"\x1b[2J", 3_000_000_000),
        r"bytes in '\x1b[2J\n\x01",
    ),
    _case(
        "zip of zeros, compressed",
        lambda: archive({"x/data.pkl": bytes(50 * _MB)}, zipfile.ZIP_DEFLATED),
        "compressed",
        UnsupportedFormat,
    ),
    _case("zip with LZMA", archive({"x/data.pkl": b"N."}, zipfile.ZIP_LZMA), "compressed", UnsupportedFormat),
    _case("zip cut in the middle", _cut(GOOD, 0.5), "expected a zip archive to end", TruncatedFile),
    _case("zip without its last byte", GOOD[:-1], "expected a zip archive to end", TruncatedFile),
    _case("zip with bytes after it", GOOD + b"more", "expected the zip archive to end with the file"),
    _case("zip with overlapping entries", _overlapping(), "overlap"),
    _case("zip directory of 4 GB", _lying_end(2**32 - 2, 4), "expected a zip directory of at most"),
    _case("zip directory past the end", _lying_end(100, 2**31), "expected a zip directory of at most"),
    _case("zip directory in the end", _lying_end(22, 4), "expected whole entries in the zip directory"),
    _case("zip directory of 120,000 entries", lambda: _directory(120_000), "entries"),
    _case("zip directory damaged", GOOD.replace(b"PK\x01\x02", b"PK\x01\x03"), "expected whole entries"),
    _case("zip entry damaged", GOOD[:4] + GOOD[4:].replace(b"PK\x03\x04", b"PK\x03\x05"), "expected a zip entry for"),
    _case("zip entry twice", _TWO.replace(b"x/data/1", b"x/data/0"), "expected each zip entry once"),
    _case("zip without data.pkl", archive({"x/data/0": bytes(16)}), "expected one data.pkl", NotACheckpoint),
    _case("zip of two checkpoints", archive({"x/data.pkl": b"N.", "y/data.pkl": b"N."}), "found 2", NotACheckpoint),
    _case("zip of a program", torch_zip({"a": tensor()}, **{"constants.pkl": b""}), "TorchScript", UnsupportedFormat),
    _case("zip big-endian", torch_zip({"a": tensor()}, byteorder=b"big"), "byte order b'big'", UnsupportedFormat),
    _case("zip of an Excel sheet", archive({"xl/workbook.xml": b"<x/>"}), "expected one data.pkl", NotACheckpoint),
)

_LEGACY_HEAD = (
    pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
)


def legacy(root: bytes, keys: object = ("0",), storages: bytes = struct.pack("<q", 4) + bytes(16)) -> bytes:
    """A file as torch wrote it before 1.6."""
    return _LEGACY_HEAD + root + pickle.dumps(list(keys) if isinstance(keys, tuple) else keys, 2) + storages


_OLD = b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x04NtQ"
_LEGACY = state_dict({"a": tensor(_OLD)})

LEGACY = (
    _case("legacy with code", legacy(state_dict({"a": tensor(_OLD), "evil": _SYSTEM})), _OS, UnsafePickle),
    _case("legacy with code for its magic", _SYSTEM.join((_PROTO, _ARGUMENT + b"R.")), _OS, UnsafePickle),
    _case("legacy cut in a storage", legacy(_LEGACY)[:-1], "expected 16 bytes of storage", TruncatedFile),
    _case("legacy cut in the pickle", legacy(_LEGACY)[:150], "expected the end of the pickle", TruncatedFile),
    _case("legacy storage shorter", legacy(_LEGACY, storages=struct.pack("<q", 3) + bytes(12)), "found 12"),
    _case("legacy storage negative", legacy(_LEGACY, storages=b"\xff" * 8 + bytes(16)), "expected 16 bytes in storage"),
    _case("legacy storage unlisted", legacy(_LEGACY, keys=(), storages=b""), "expected its storage in the file"),
    _case("legacy storage unknown", legacy(_LEGACY, keys=("1",)), "expected storage '1' once"),
    _case("legacy storage twice", legacy(_LEGACY, keys=("0", "0")), "expected storage '0' once"),
    _case("legacy storages a number", legacy(_LEGACY, keys=7), "expected a list of storages"),
    _case("legacy with trailing bytes", legacy(_LEGACY) + b"more", "expected the file to end"),
    _case("legacy two million lists", lambda: legacy(_PROTO + b"]" * 2 * _MB + _STOP), "found one with more than"),
    _case(
        "legacy big-endian",
        pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2),
        "expected little-endian numbers",
        UnsupportedFormat,
    ),
)

CASES = (*CALLS, *BOMBS, *TENSORS, *PICKLES, *ZIPS, *LEGACY)

CONTROLS = (
    Control(name="pickle: one tensor", write=_one(GOOD)),
    Control(name="pickle: one tensor, legacy", write=_one(legacy(_LEGACY))),
    Control(
        name="pickle: memo index of 2^32-1", write=_one(torch_zip({"a": tensor(), "b": b"K\x01r\xff\xff\xff\xff"}))
    ),
    Control(name="pickle: billion laughs beside a tensor", write=_one(torch_zip({"a": tensor(), "b": _laughs(100)}))),
    Control(
        name="pickle: the state of a harmless object",
        write=_one(
            torch_zip({"a": tensor(), "b": name("collections", "OrderedDict") + b")R}" + text("x") + b"K\x01sb"})
        ),
    ),
    Control(
        name="pickle: one value expanded to a row", write=_one(torch_zip({"a": tensor(shape=(4096,), strides=(0,))}))
    ),
    Control(
        name="pickle: ten thousand numbers beside a tensor",
        write=_one(torch_zip({"a": tensor(), "b": plain(list(range(10_000)))})),
    ),
)
