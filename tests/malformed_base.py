"""What a case of the corpus of malformed checkpoints is, and the writers that its files share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from loadstone.errors import LoadstoneError

# What a hostile file would create if anything in it were run.
CANARY = "was-run"

Writer = Callable[[Path], Path | list[str | Path]]
Content = bytes | Callable[[], bytes]


class Through(Enum):
    """What meets the fault."""

    INSPECT = "inspect"
    LOAD = "load"
    TOKENIZER = "tokenizer"
    CHAT = "chat"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A checkpoint that must be refused.

    Attributes:
        name: what is wrong with it.
        write: writes it into an empty folder and returns the source to pass.
        error: the class of the fault.
        message: words that the message must contain.
        through: what meets the fault; `load` only where the headers alone are in order.
    """

    name: str
    write: Writer
    error: type[LoadstoneError]
    message: str
    through: Through = Through.INSPECT


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A checkpoint that looks odd and must be read.

    Attributes:
        name: what is odd about it.
        write: writes it into an empty folder and returns the source to pass.
        tensors: the names that are found in it.
    """

    name: str
    write: Writer
    tensors: tuple[str, ...] = ("a",)


def entry(dtype: object = "U8", shape: object = (4,), begin: object = 0, end: object = 4) -> dict[str, object]:
    """One tensor of a safetensors header."""
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a safetensors file whose header may lie about its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


GOOD = safetensors({"a": entry()}, bytes(4))


def files(contents: Mapping[str, Any], source: str = "") -> Writer:
    """A writer of these files; a function makes large contents when they are written; others than bytes become JSON.

    Args:
        contents: by name.
        source: the name of the file to pass; the folder itself by default.
    """

    def write(folder: Path) -> Path:
        for name, content in contents.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            made = content() if callable(content) else content
            path.write_bytes(made if isinstance(made, bytes) else json.dumps(made).encode())
        return folder / source

    return write


def sparse(name: str, nbytes: int, head: bytes = b"", beside: Mapping[str, bytes] | None = None) -> Writer:
    """A writer of a file of `nbytes` that takes no room on the disk, beside others."""

    def write(folder: Path) -> Path:
        files(beside or {})(folder)
        with (folder / name).open("wb") as file:
            file.write(head)
            file.truncate(nbytes)
        return folder

    return write
