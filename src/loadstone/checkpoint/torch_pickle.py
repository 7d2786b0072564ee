"""Files of torch.save, the zip form and the legacy one: where each tensor lies. Nothing of the pickle is executed.

Source: https://github.com/pytorch/pytorch/blob/main/torch/serialization.py (_save, _legacy_save)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadstone.checkpoint.files import OpenFile, open_regular
from loadstone.checkpoint.pickle_machine import EndOfPickleError, MalformedPickleError, run_pickle
from loadstone.checkpoint.torch_objects import StorageRef, TensorRef, TorchOwner
from loadstone.checkpoint.values import TensorInfo
from loadstone.checkpoint.zip_directory import ZipEntry, data_offset, read_zip_directory
from loadstone.dtypes import DTYPES
from loadstone.errors import InvalidHeader, NotACheckpoint, TruncatedFile, UnsupportedFormat

# The pickle of 280,000 tensors; a bound for what a hostile one can make of memory.
MAX_PICKLE_BYTES = 64_000_000

# Where trainers put the state_dict, in order of preference.
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module")
_MAX_WRAPPERS = 4

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LEGACY_FIRST_BYTES = 1 << 20

_AGAIN = "download or write the file again."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Location:
    """Where the bytes of a storage lie."""

    offset: int
    nbytes: int


def read_torch_pickle(path: Path) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """Find the tensors of a .bin, .pt or .pth file. Tied tensors have the same file and offset.

    For a view that is not contiguous `offset` is that of its first element and `nbytes` reaches to its last one.

    Returns:
        The tensors in file order, and notes on what was unwrapped and left out.

    Raises:
        UnsafePickle: the pickle refers to code.
        InvalidHeader: the file contradicts itself.
        TruncatedFile: the file ends before its tensors do.
        UnsupportedFormat: TorchScript, big-endian numbers, compressed entries, dtypes without a name.
        NotACheckpoint: no tensors are in it.
    """
    with open_regular(path) as file:
        is_zip = file.read(0, min(4, file.nbytes)) == b"PK\x03\x04"
        root, locations = _open_zip(file) if is_zip else _open_legacy(file)
    found, notes = _state_dict(path, root)
    tensors = [_tensor_info(path, name, tensor, locations) for name, tensor in found.items()]
    tensors.sort(key=lambda tensor: tensor.offset)
    return {tensor.name: tensor for tensor in tensors}, notes


def _open_zip(file: OpenFile) -> tuple[Any, dict[str, _Location]]:
    entries = read_zip_directory(file)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise NotACheckpoint(f"{file.path}: expected one data.pkl in the zip archive, found {len(pickles)}.")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in entries:
        raise UnsupportedFormat(
            f"{file.path}: expected tensors, found a TorchScript program; save the state_dict of the module instead."
        )
    if f"{prefix}byteorder" in entries and (order := _small(file, entries[f"{prefix}byteorder"])) != b"little":
        raise UnsupportedFormat(
            f"{file.path}: expected little-endian numbers, found byte order {order[:16]!r}; "
            "save it on a little-endian machine."
        )
    owner = TorchOwner(path=file.path)
    root, _ = _run(file, _small(file, entries[pickles[0]]), owner)
    locations = {}
    for key, storage in owner.storages.items():
        entry = entries.get(f"{prefix}data/{key}")
        if entry is None:
            raise InvalidHeader(f"{file.path}: expected a zip entry {f'data/{key}'[:80]!r}, found none; {_AGAIN}")
        _check_storage(file, storage, entry.nbytes)
        locations[key] = _Location(offset=data_offset(file, entry), nbytes=entry.nbytes)
    return root, locations


def _small(file: OpenFile, entry: ZipEntry) -> bytes:
    if entry.nbytes > MAX_PICKLE_BYTES:
        raise InvalidHeader(
            f"{file.path}: expected at most {MAX_PICKLE_BYTES} bytes in {entry.name}, found {entry.nbytes}; "
            "save only the state_dict."
        )
    return file.read(data_offset(file, entry), entry.nbytes)


def _open_legacy(file: OpenFile) -> tuple[Any, dict[str, _Location]]:
    """Read the five pickles of the legacy form, then step from storage to storage."""
    limit = min(file.nbytes, MAX_PICKLE_BYTES)
    nbytes = min(limit, _LEGACY_FIRST_BYTES)
    while True:
        try:
            return _read_legacy(file, file.read(0, nbytes))
        except TruncatedFile:
            # How long the pickles are is not known: read more, until the file or the cap is reached.
            if nbytes == limit:
                raise
            nbytes = min(limit, nbytes * 8)


def _read_legacy(file: OpenFile, data: bytes) -> tuple[Any, dict[str, _Location]]:
    owner = TorchOwner(path=file.path)
    magic, position = _run(file, data, owner)
    if magic != _LEGACY_MAGIC:
        raise NotACheckpoint(
            f"{file.path}: expected a file of torch.save, found another pickle; save the state_dict with torch.save."
        )
    protocol, position = _run(file, data, owner, position)
    if protocol != _LEGACY_PROTOCOL:
        raise UnsupportedFormat(
            f"{file.path}: expected protocol {_LEGACY_PROTOCOL} of torch.save, found another; save the file anew."
        )
    system, position = _run(file, data, owner, position)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UnsupportedFormat(
            f"{file.path}: expected little-endian numbers, found others; save it on a little-endian machine."
        )
    root, position = _run(file, data, owner, position)
    keys, position = _run(file, data, owner, position)
    if not isinstance(keys, list) or not all(type(key) is str for key in keys):
        raise InvalidHeader(f"{file.path}: expected a list of storages after the pickle, found none; {_AGAIN}")
    return root, _legacy_locations(file, owner, keys, position)


def _legacy_locations(file: OpenFile, owner: TorchOwner, keys: list[str], position: int) -> dict[str, _Location]:
    locations = {}
    for key in keys:
        storage = owner.storages.get(key)
        if storage is None or key in locations:
            raise InvalidHeader(f"{file.path}: expected storage {key[:80]!r} once in the pickle, did not; {_AGAIN}")
        itemsize = DTYPES[storage.dtype].bits // 8
        nbytes = int.from_bytes(file.read(position, 8), "little") * itemsize
        _check_storage(file, storage, nbytes)
        position += 8
        if position + nbytes > file.nbytes:
            raise TruncatedFile(
                f"{file.path}: expected {nbytes} bytes of storage {key[:80]!r} at {position}, found the end of the "
                f"file at {file.nbytes}; copy or download it again."
            )
        locations[key] = _Location(offset=position, nbytes=nbytes)
        position += nbytes
    return locations


def _run(file: OpenFile, data: bytes, owner: TorchOwner, start: int = 0) -> tuple[Any, int]:
    try:
        return run_pickle(data, owner, start)
    except EndOfPickleError:
        raise TruncatedFile(
            f"{file.path}: expected the end of the pickle, found the end of its {len(data)} bytes; "
            "copy or download it again."
        ) from None
    except MalformedPickleError as error:
        raise InvalidHeader(
            f"{file.path}: expected a pickle of torch.save, found a malformed one {error}; {_AGAIN}"
        ) from None


def _check_storage(file: OpenFile, storage: StorageRef, nbytes: int) -> None:
    expected = storage.numel * DTYPES[storage.dtype].bits // 8
    if expected != nbytes:
        raise InvalidHeader(
            f"{file.path}: expected {expected} bytes in storage {storage.key[:80]!r}, as the pickle says, found "
            f"{nbytes}; {_AGAIN}"
        )


def _state_dict(path: Path, root: Any) -> tuple[dict[str, TensorRef], tuple[str, ...]]:
    """Find the dictionary of tensors inside what was saved, and say what was unwrapped and left out."""
    notes = []
    for _ in range(_MAX_WRAPPERS):
        if not isinstance(root, dict):
            raise NotACheckpoint(
                f"{path}: expected a dictionary of tensors, found a single {_kind(root)}; save a state_dict."
            )
        wrapper = next((name for name in WRAPPERS if _holds_tensors(root.get(name))), None)
        if wrapper is None:
            tensors = {name: value for name, value in root.items() if type(value) is TensorRef}
            left_out = [name for name in root if name not in tensors]
            if not tensors:
                break
            if left_out:
                notes.append(
                    f"{path.name}: {len(left_out)} entries are no tensors and were left out: {_names(left_out)}"
                )
            return tensors, tuple(notes)
        beside = [name for name in root if name != wrapper]
        notes.append(
            f"{path.name}: the tensors lie under {wrapper!r}"
            + (f"; left out beside it: {_names(beside)}" if beside else "")
        )
        root = root[wrapper]
    raise NotACheckpoint(
        f"{path}: expected tensors by name, or a dictionary of them under {', '.join(WRAPPERS)}; found "
        f"{_names(list(root)) or 'an empty dictionary'}; save the state_dict alone."
    )


def _holds_tensors(value: Any) -> bool:
    """Whether this is a dictionary of tensors, or wraps one; a counter that is a tensor may lie beside the wrapper."""
    for _ in range(_MAX_WRAPPERS):
        if not isinstance(value, dict):
            return False
        if any(type(item) is TensorRef for item in value.values()):
            return True
        value = next((value[name] for name in WRAPPERS if isinstance(value.get(name), dict)), None)
    return False


def _names(names: list[str]) -> str:
    shown = ", ".join(repr(name[:60]) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _kind(value: Any) -> str:
    return "tensor" if type(value) is TensorRef else type(value).__name__


def _tensor_info(path: Path, name: str, tensor: TensorRef, locations: Mapping[str, _Location]) -> TensorInfo:
    storage = tensor.storage
    location = locations.get(storage.key)
    if location is None:
        raise InvalidHeader(f"{path}, tensor {name!r}: expected its storage in the file, found none; {_AGAIN}")
    itemsize = DTYPES[tensor.dtype].bits // 8
    empty = 0 in tensor.shape
    # torch counts on from the rows that a view of nothing leaves out.
    begin = 0 if empty else storage.offset * DTYPES[storage.dtype].bits // 8 + tensor.offset * itemsize
    extent = 0 if empty else 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.strides, strict=True))
    nbytes = extent * itemsize
    if begin + nbytes > location.nbytes:
        raise InvalidHeader(
            f"{path}, tensor {name!r}: expected a view inside its storage of {location.nbytes} bytes, found one that "
            f"reaches to {begin + nbytes}; {_AGAIN}"
        )
    return TensorInfo(
        name=name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        file=path,
        offset=location.offset + begin,
        nbytes=nbytes,
        strides=None if empty or _is_contiguous(tensor.shape, tensor.strides) else tensor.strides,
    )


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
