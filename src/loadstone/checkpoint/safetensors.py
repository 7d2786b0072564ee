"""Headers of .safetensors files, checked whole before anything is believed.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, NoReturn

from loadstone.checkpoint.files import OpenFile, open_regular, parse_json_object
from loadstone.checkpoint.values import TensorInfo
from loadstone.dtypes import SAFETENSORS_DTYPES
from loadstone.errors import InvalidHeader, TruncatedFile
from loadstone.units import format_name

# Source: https://github.com/huggingface/safetensors/blob/main/safetensors/src/tensor.rs (MAX_HEADER_SIZE)
MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8

# Most headers fit into the first read: on a network file system each further read is a round trip.
_FIRST_READ_BYTES = 1 << 16

# A tensor's entry has three brackets and takes 50 bytes. A large header with many more of them is a bomb: each
# bracket becomes an object of some 64 bytes. Small headers are let through, their metadata may hold JSON text.
_BOMB_HEADER_BYTES = 8_000_000
_MIN_BYTES_PER_BRACKET = 12

# torch handles at most 64 dimensions, each an int64.
_MAX_DIMENSIONS = 64
_MAX_DIMENSION = 2**63 - 1

_AGAIN = "download or write the file again."


def read_safetensors(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read and check the header of one .safetensors file.

    Returns:
        The tensors in file order, and the `__metadata__`.

    Raises:
        InvalidHeader: the header cannot be parsed or contradicts itself or the file.
        TruncatedFile: the file ends before its header or its tensors do.
        SourceNotFound: there is no such file.
        NotACheckpoint: it is not a regular file.
    """
    with open_regular(path) as file:
        text = _header_text(file)
        data_bytes = file.nbytes - LENGTH_BYTES - len(text)
    header = parse_json_object(text, where=f"{path}, header", fault=InvalidHeader)
    metadata = _metadata(path, header.pop("__metadata__", None))
    _check_names(path, header)
    entries = _sorted_entries(path, header)
    _check_layout(path, entries, data_bytes)
    start = LENGTH_BYTES + len(text)
    tensors = {
        name: TensorInfo(
            name=name, dtype=dtype, shape=tuple(shape), file=path, offset=start + begin, nbytes=end - begin
        )
        for begin, end, name, dtype, shape in entries
    }
    return tensors, metadata


def _header_text(file: OpenFile) -> bytes:
    if file.nbytes < LENGTH_BYTES:
        raise TruncatedFile(
            f"{file.path}: expected at least {LENGTH_BYTES} bytes of safetensors, found {file.nbytes}; {_AGAIN}"
        )
    head = file.read(0, min(_FIRST_READ_BYTES, file.nbytes))
    nbytes = int.from_bytes(head[:LENGTH_BYTES], "little")
    if nbytes == 0:
        raise InvalidHeader(f"{file.path}: expected a safetensors header, found one of length 0; {_AGAIN}")
    if nbytes > MAX_HEADER_BYTES:
        raise InvalidHeader(
            f"{file.path}: expected a safetensors header of at most {MAX_HEADER_BYTES} bytes, found a length of "
            f"{nbytes}; this is no safetensors file, or it is damaged."
        )
    if nbytes > file.nbytes - LENGTH_BYTES:
        raise TruncatedFile(
            f"{file.path}: expected a safetensors header of {nbytes} bytes, found the end of the file after "
            f"{file.nbytes - LENGTH_BYTES}; {_AGAIN}"
        )
    text = head[LENGTH_BYTES : LENGTH_BYTES + nbytes]
    if len(text) < nbytes:
        text += file.read(len(head), nbytes - len(text))
    if nbytes > _BOMB_HEADER_BYTES:
        brackets = text.count(b"[") + text.count(b"{")
        if brackets * _MIN_BYTES_PER_BRACKET > nbytes:
            raise InvalidHeader(
                f"{file.path}, header: expected three brackets a tensor, found {brackets} in {nbytes} bytes; {_AGAIN}"
            )
    return text


def _metadata(path: Path, metadata: Any) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(type(value) is str for value in metadata.values()):
        raise InvalidHeader(
            f"{path}, header: expected __metadata__ to map text to text, found something else; {_AGAIN}"
        )
    return metadata


def _check_names(path: Path, header: dict[str, Any]) -> None:
    try:
        "".join(header).encode()
    except UnicodeEncodeError:
        raise InvalidHeader(
            f"{path}, header: expected names of valid Unicode, found half a surrogate pair in one; {_AGAIN}"
        ) from None


def _sorted_entries(path: Path, header: dict[str, Any]) -> list[tuple[int, int, str, str, list[int]]]:
    """All entries as (begin, end, name, dtype, shape), by offset; each is right in itself."""
    entries = []
    for name, entry in header.items():
        try:
            code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            dtype = SAFETENSORS_DTYPES[code]
        except (KeyError, TypeError, ValueError):
            _refuse_entry(path, name, entry)
        # `type(x) is int` keeps out booleans, and lists, which prod() would multiply.
        if type(shape) is not list or type(begin) is not int or type(end) is not int or len(shape) > _MAX_DIMENSIONS:
            _refuse_entry(path, name, entry)
        for size in shape:
            if type(size) is not int or not 0 <= size <= _MAX_DIMENSION:
                _refuse_entry(path, name, entry)
        if begin < 0 or 8 * (end - begin) != dtype.bits * prod(shape):
            _refuse_entry(path, name, entry)
        entries.append((begin, end, name, dtype.name, shape))
    entries.sort()
    return entries


def _refuse_entry(path: Path, name: str, entry: Any) -> NoReturn:
    """Raise the error for an entry that is known to be wrong: the slow look at what is wrong with it."""
    where = f"{path}, tensor {format_name(name)}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise InvalidHeader(f"{where}: expected dtype, shape and data_offsets, found something else; {_AGAIN}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = SAFETENSORS_DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        known = " ".join(SAFETENSORS_DTYPES)
        raise InvalidHeader(f"{where}: expected a dtype of {known}, found {_short(code)}; update Loadstone or {_AGAIN}")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size <= _MAX_DIMENSION for size in shape):
        raise InvalidHeader(f"{where}: expected a shape of non-negative integers, found {_short(shape)}; {_AGAIN}")
    if len(shape) > _MAX_DIMENSIONS:
        raise InvalidHeader(f"{where}: expected at most {_MAX_DIMENSIONS} dimensions, found {len(shape)}; {_AGAIN}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise InvalidHeader(f"{where}: expected data_offsets of two integers, found {_short(offsets)}; {_AGAIN}")
    begin, end = offsets
    if not 0 <= begin <= end:
        raise InvalidHeader(f"{where}: expected data_offsets 0 <= begin <= end, found {_short(offsets)}; {_AGAIN}")
    bits = dtype.bits * prod(shape)
    if bits % 8:
        raise InvalidHeader(f"{where}: expected whole bytes, found {bits} bits of {code} in {_short(shape)}; {_AGAIN}")
    raise InvalidHeader(
        f"{where}: expected {bits // 8} bytes for {code} of shape {_short(shape)}, found {end - begin} "
        f"in its data_offsets; {_AGAIN}"
    )


def _check_layout(path: Path, entries: list[tuple[int, int, str, str, list[int]]], data_bytes: int) -> None:
    """Check that the tensors follow one another without overlap or hole, and end with the file."""
    cursor = 0
    for begin, end, name, _, _ in entries:
        if begin != cursor:
            fault = "an overlap with the tensor before it" if begin < cursor else "a hole before it"
            raise InvalidHeader(
                f"{path}, tensor {format_name(name)}: expected its data to begin at {cursor}, found {begin}: {fault}; "
                f"{_AGAIN}"
            )
        cursor = end
    if cursor > data_bytes:
        raise TruncatedFile(
            f"{path}: expected {cursor} bytes of tensors after the header, found {data_bytes}; "
            "the file is cut short: copy or download it again."
        )
    if cursor < data_bytes:
        raise InvalidHeader(
            f"{path}: expected the file to end with its last tensor, found {data_bytes - cursor} more bytes; {_AGAIN}"
        )


def _short(value: Any) -> str:
    """A value of the header as a message shows it: never a megabyte of it."""
    if isinstance(value, list):
        value = [item if isinstance(item, int | str) else type(item).__name__ for item in value[:9]]
        value = [item if not isinstance(item, int) or abs(item) < 10**30 else "a huge number" for item in value]
    elif not isinstance(value, str):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
