"""Opening files that may not be what their name says: a pipe, a folder, a git-LFS pointer, a JSON that is none."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadstone.checkpoint.values import CheckpointFile, FileVersion
from loadstone.errors import FileChanged, LoadstoneError, NotACheckpoint, SourceNotFound, TruncatedFile, UnreadableFile
from loadstone.units import format_bytes, format_name

# Source: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md (the first line of every pointer)
LFS_MAGIC = b"version https://git-lfs"

# A large JSON of little but brackets and commas is a bomb: two bytes of it become an object of some 64 bytes. Names,
# the bulk of what is read here, keep them far apart; small files are let through.
_BOMB_JSON_BYTES = 2_000_000
_MIN_BYTES_PER_MARK = 5

# What is parsed may be walked and written again by functions that call themselves; configs have some six levels.
_MAX_JSON_DEPTH = 64

_OTHER_FILE = "this is not the file its name says."

Fault = Callable[[str], LoadstoneError]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenFile:
    """A regular file that is open for reading.

    Attributes:
        path: where it lies.
        fd: its descriptor, closed when the `with` ends.
        nbytes: its size.
        version: which file it is.
    """

    path: Path
    fd: int
    nbytes: int
    version: FileVersion

    def read(self, offset: int, nbytes: int) -> bytes:
        """Read exactly `nbytes` at `offset`.

        Raises:
            TruncatedFile: the file ends before.
        """
        parts = []
        while nbytes > 0:
            part = os.pread(self.fd, nbytes, offset)
            if not part:
                raise TruncatedFile(
                    f"{self.path}: expected {nbytes} more bytes at offset {offset}, found the end of the file; "
                    "copy or download it again."
                )
            parts.append(part)
            offset += len(part)
            nbytes -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


@contextmanager
def open_regular(path: Path) -> Iterator[OpenFile]:
    """Open a regular file for reading; a pipe, a device or a folder is refused, never waited for.

    Raises:
        SourceNotFound: there is no such file.
        NotACheckpoint: it is not a regular file, or may not be read.
    """
    try:
        # O_NONBLOCK: opening a FIFO that nobody writes to would wait forever.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        found = "a link to nothing" if path.is_symlink() else "nothing"
        raise SourceNotFound(f"{path}: expected a file, found {found} there; check the path.") from None
    except OSError as error:
        raise NotACheckpoint(f"{path}: expected a readable file; opening it failed: {error.strerror}.") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
            raise NotACheckpoint(f"{path}: expected a regular file, found {kind}; pass the file itself.")
        yield OpenFile(path=path, fd=fd, nbytes=status.st_size, version=version_of(status))
    finally:
        os.close(fd)


def check_unchanged(files: Iterable[CheckpointFile], *, advice: str = "load it again") -> None:
    """Check that files are still those whose headers were read.

    Args:
        files: as they were found.
        advice: what to do where one is another.

    Raises:
        UnreadableFile: one is gone.
        FileChanged: one was replaced, cut short or written to.
    """
    for file in files:
        try:
            version = version_of(file.path.stat())
        except OSError as error:
            raise unreadable(file.path, error) from None
        check_version(file, version, advice)


def check_version(file: CheckpointFile, found: FileVersion, advice: str = "load it again") -> None:
    """Check that what was found at a file's path is the file whose header was read.

    Raises:
        FileChanged: it is another.
    """
    if file.version is not None and found != file.version:
        raise FileChanged(
            f"{file.path}: expected the file of {file.nbytes:,} bytes whose header was read, found that it was "
            f"replaced or written to meanwhile ({found.nbytes:,} bytes now); {advice}."
        )


def unreadable(path: Path, error: OSError) -> UnreadableFile:
    """The fault of a file whose header was read and that the system does not let be read now."""
    return UnreadableFile(
        f"{path}: expected to read the file, found: {error.strerror or error}; check that it is still there, who may "
        "read it, and the disk."
    )


def version_of(status: os.stat_result) -> FileVersion:
    """Which file the system described."""
    return FileVersion(device=status.st_dev, inode=status.st_ino, nbytes=status.st_size, mtime_ns=status.st_mtime_ns)


class _DuplicateKeyError(ValueError):
    """A JSON object that has the same key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _DuplicateKeyError(twice)
    return result


def parse_json_object(text: bytes, *, where: str, fault: Fault, advice: str = "download it again") -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no key twice, no nesting that exhausts the stack.

    Args:
        text: the bytes.
        where: what a message begins with: the file, and the part of it.
        fault: the error class to raise.
        advice: what a message says to do.
    """
    _refuse_bomb(text, where, fault)
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise fault(f"{where}: expected UTF-8, found an invalid byte at {error.start}; {advice}.") from None
    except _DuplicateKeyError as error:
        raise fault(
            f"{where}: the key {format_name(str(error))} stands there twice; expected each once; {advice}."
        ) from None
    except RecursionError:
        raise fault(f"{where}: the JSON is nested too deeply to be what it should be; {advice}.") from None
    except ValueError as error:
        raise fault(f"{where}: expected JSON, found what does not parse ({error}); {advice}.") from None
    if not isinstance(value, dict):
        raise fault(f"{where}: expected a JSON object, found a {type(value).__name__}; {advice}.")
    return value


def _refuse_bomb(text: bytes, where: str, fault: Fault) -> None:
    if len(text) < _BOMB_JSON_BYTES:
        return
    marks = text.count(b"[") + text.count(b"{") + text.count(b",")
    if marks * _MIN_BYTES_PER_MARK > len(text):
        raise fault(
            f"{where}: expected mostly names, found {marks:,} brackets and commas in {format_bytes(len(text))}; "
            f"{_OTHER_FILE}"
        )


def read_json_object(path: Path, *, max_bytes: int, fault: Fault, advice: str = "download it again") -> dict[str, Any]:
    """Read a file that holds one JSON object, of at most `max_bytes` bytes; `advice` is what a message says to do."""
    with open_regular(path) as file:
        if file.nbytes > max_bytes:
            raise fault(
                f"{path}: expected at most {format_bytes(max_bytes)} of JSON, found {format_bytes(file.nbytes)}; "
                f"{_OTHER_FILE}"
            )
        text = file.read(0, file.nbytes)
    if text.startswith(LFS_MAGIC):
        raise fault(lfs_message(path))
    value = parse_json_object(text, where=str(path), fault=fault, advice=advice)
    if _is_deeper(value, _MAX_JSON_DEPTH):
        raise fault(f"{path}: expected JSON of at most {_MAX_JSON_DEPTH} levels, found more; {_OTHER_FILE}")
    return value


def _is_deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        inner = [one.values() if type(one) is dict else one for one in level if type(one) in {dict, list}]
        level = [one for parts in inner for one in parts]
        if not level:
            return False
    return True


def write_whole(path: Path, text: str) -> None:
    """Write a small file whole or not at all, and the folders that it is in.

    Raises:
        OSError: it cannot be written; nothing is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write bytes, all of them, at an offset of a file.

    Raises:
        OSError: they cannot be written.
    """
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def lfs_message(path: Path) -> str:
    """What to say about a file that is only a git-LFS pointer."""
    return f"{path}: expected the file itself, found a git-LFS pointer to it; run `git lfs pull` in its folder."
