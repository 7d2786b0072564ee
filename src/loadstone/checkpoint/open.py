"""Opens any source as one `Checkpoint`: which files, of which format, with which tensors and which config."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loadstone.checkpoint.excerpt import Excerpt, excerpt_of, index_of
from loadstone.checkpoint.files import LFS_MAGIC, lfs_message, open_regular, read_json_object
from loadstone.checkpoint.hub_cache import HubAccess
from loadstone.checkpoint.layout import META_NAME, PARAMS_NAME, Weights, weights_at, weights_in
from loadstone.checkpoint.meta_ranks import are_ranks, join_ranks
from loadstone.checkpoint.resolve import Source, resolve
from loadstone.checkpoint.safetensors import MAX_HEADER_BYTES, read_safetensors
from loadstone.checkpoint.sharded import Index, check_present, honour
from loadstone.checkpoint.values import Checkpoint, CheckpointFile, Format, TensorInfo
from loadstone.errors import InvalidConfig, InvalidHeader, NotACheckpoint, TruncatedFile, UnsupportedFormat
from loadstone.events import Observer, ignore
from loadstone.units import format_name

MAX_CONFIG_BYTES = 16_000_000

_OWN_CONFIG = "use the config.json that belongs to these weights."

_SUFFIX_FORMATS = {".safetensors": Format.SAFETENSORS, ".gguf": Format.GGUF}

# First bytes. Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, APPNOTE.TXT of .ZIP (4.3.7),
# https://docs.python.org/3/library/pickletools.html (PROTO)
_MAGIC_FORMATS = {b"GGUF": Format.GGUF, b"PK\x03\x04": Format.TORCH_PICKLE}
_PICKLE_MAGICS = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contents:
    """What one weight file holds, or the parts of a split one together."""

    format: Format
    files: tuple[CheckpointFile, ...]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


def open_checkpoint(
    source: Source,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    hub: HubAccess | None = None,
    observer: Observer = ignore,
    excerpt: Excerpt | None = None,
) -> Checkpoint:
    """Read the headers of a checkpoint.

    Args:
        source: a folder, a weight file, an index, a list of weight files that are one checkpoint, or a hub id.
        revision: the branch, tag or commit of a hub id; `main` if None.
        local_files_only: never ask the network.
        hub: token, cache folder and what may be downloaded, where it is not the usual.
        observer: is told of downloaded bytes.
        excerpt: which subfolder, which variant, and which of the tensors.

    Returns:
        Its tensors, metadata and config; no byte of a tensor has been read.

    Raises:
        SourceError: there is no such source, or it is not a checkpoint of a format that is read.
        CorruptCheckpoint: a file contradicts itself.
        InvalidConfig: config.json or generation_config.json is not a JSON object.
    """
    access = replace(hub or HubAccess(), revision=revision, local_files_only=local_files_only)
    excerpt = excerpt or Excerpt()
    resolved = resolve(source, access, observer, excerpt)
    if resolved.files is None:
        weights = weights_in(resolved.root, excerpt.variant)
    elif len(resolved.files) == 1:
        weights = weights_at(resolved.files[0])
    else:
        weights = Weights(files=resolved.files)
    num_unread = 0
    if weights.index is not None:
        index = index_of(weights.index, excerpt, where=str(resolved.root))
        num_unread = weights.index.num_tensors - index.num_tensors
        weights = Weights(files=index.files, index=index)
    return excerpt_of(_assemble(resolved.root, weights), excerpt, num_unread=num_unread)


def _assemble(root: Path, weights: Weights) -> Checkpoint:
    index = weights.index
    if index:
        check_present(index)
    contents = _read_all(weights.files)
    format_ = _same_format(contents)
    tensors, ignored = _tensors(contents, index)
    metadata = {key: value for content in contents for key, value in content.metadata.items()}
    metadata.update(index.metadata if index else {})
    implied = next((content.config for content in contents if content.config is not None), None)
    return Checkpoint(
        format=format_,
        root=root,
        files=tuple(file for content in contents for file in content.files),
        tensors=tensors,
        metadata=metadata,
        # A GGUF file describes itself; the config.json beside one is often a stub that only names the family.
        config=implied if implied is not None else _config(root / "config.json"),
        generation_config=_json(root / "generation_config.json"),
        params=_json(root / PARAMS_NAME) if _has_meta_names(weights, tensors) else None,
        notes=_notes(contents, ignored),
    )


def _has_meta_names(weights: Weights, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether params.json beside the files is what describes them."""
    named = any(META_NAME.fullmatch(path.name) for path in weights.files)
    return named and any(name.startswith("tok_embeddings.weight") for name in tensors)


def _read_all(paths: Iterable[Path]) -> list[_Contents]:
    contents: list[_Contents] = []
    covered: set[Path] = set()
    for path in paths:
        # Any part of a split GGUF model leads to all of them.
        if path not in covered:
            contents.append(_read(path))
            covered.update(file.path for file in contents[-1].files)
    return contents


def _tensors(contents: list[_Contents], index: Index | None) -> tuple[dict[str, TensorInfo], int]:
    """All tensors by name, and how many the index leaves out."""
    if index is None and are_ranks([content.files[0].path for content in contents]):
        return join_ranks([content.tensors for content in contents]), 0
    tensors: dict[str, TensorInfo] = {}
    ignored = 0
    for content, shard in zip(contents, index.shards if index else [""] * len(contents), strict=True):
        kept = honour(index, shard, content.tensors) if index else content.tensors
        ignored += len(content.tensors) - len(kept)
        _check_no_repeat(tensors, kept)
        tensors.update(kept)
    return tensors, ignored


def _notes(contents: Iterable[_Contents], ignored: int) -> tuple[str, ...]:
    notes = [note for content in contents for note in content.notes]
    if ignored:
        notes.append(f"{ignored} tensors that the index does not name were left out")
    return tuple(dict.fromkeys(notes))


def _same_format(contents: list[_Contents]) -> Format:
    for content in contents:
        if content.format is not contents[0].format:
            first = contents[0]
            raise UnsupportedFormat(
                f"{content.files[0].path}: expected {first.format.value} as in {first.files[0].path}, found "
                f"{content.format.value}; pass files of one format."
            )
    return contents[0].format


def _check_no_repeat(tensors: Mapping[str, TensorInfo], more: Mapping[str, TensorInfo]) -> None:
    if twice := next(iter(tensors.keys() & more.keys()), None):
        raise InvalidHeader(
            f"{more[twice].file}: expected each tensor in one file, found {format_name(twice)} in "
            f"{tensors[twice].file} too; pass only files that belong to one checkpoint."
        )


def _json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    return read_json_object(path, max_bytes=MAX_CONFIG_BYTES, fault=InvalidConfig)


def _config(path: Path) -> dict[str, Any] | None:
    """config.json; the two fields by which a class is chosen are of the type that they must have."""
    config = _json(path) or {}
    model_type, names = config.get("model_type"), config.get("architectures")
    if model_type is not None and not isinstance(model_type, str):
        raise InvalidConfig(
            f"{path}: expected a text as model_type, found a {type(model_type).__name__}; {_OWN_CONFIG}"
        )
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise InvalidConfig(f"{path}: expected a list of class names as architectures, found another; {_OWN_CONFIG}")
    return config or None


def _read(path: Path) -> _Contents:
    with open_regular(path) as file:
        if file.nbytes == 0:
            raise TruncatedFile(f"{path}: expected a weight file, found an empty one; copy or download it again.")
        head = file.read(0, min(64, file.nbytes))
        found = CheckpointFile(path=path, nbytes=file.nbytes, version=file.version)
    return _READERS[_format_of(path, head)](found)


def _format_of(path: Path, head: bytes) -> Format:
    """Tell the format by the first bytes; the suffix only decides what a damaged file was meant to be."""
    if head.startswith(LFS_MAGIC):
        raise NotACheckpoint(lfs_message(path))
    for magic, format_ in _MAGIC_FORMATS.items():
        if head.startswith(magic):
            return format_
    if int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES and head[8:9] == b"{":
        return Format.SAFETENSORS
    if head.startswith(_PICKLE_MAGICS):
        return Format.TORCH_PICKLE
    if path.suffix in _SUFFIX_FORMATS:
        return _SUFFIX_FORMATS[path.suffix]
    raise NotACheckpoint(
        f"{path}: expected safetensors, GGUF or a torch pickle, found a file that begins with {head[:16]!r}; "
        "pass a weight file."
    )


def _read_safetensors(file: CheckpointFile) -> _Contents:
    tensors, metadata = read_safetensors(file.path)
    return _Contents(format=Format.SAFETENSORS, files=(file,), tensors=tensors, metadata=metadata)


def _read_torch_pickle(file: CheckpointFile) -> _Contents:
    from loadstone.checkpoint.torch_pickle import read_torch_pickle

    tensors, notes = read_torch_pickle(file.path)
    return _Contents(format=Format.TORCH_PICKLE, files=(file,), tensors=tensors, notes=notes)


def _read_gguf(file: CheckpointFile) -> _Contents:
    from loadstone.checkpoint.gguf import read_gguf

    found = read_gguf(file.path)
    return _Contents(
        format=Format.GGUF,
        files=found.files,
        tensors=found.tensors,
        metadata=found.metadata,
        config=found.config,
        notes=found.notes,
    )


_READERS: dict[Format, Callable[[CheckpointFile], _Contents]] = {
    Format.SAFETENSORS: _read_safetensors,
    Format.TORCH_PICKLE: _read_torch_pickle,
    Format.GGUF: _read_gguf,
}
