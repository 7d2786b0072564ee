"""Turns what a user names into local files: a path, or a hub id whose cache is read before anybody is asked."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from loadstone.checkpoint.excerpt import Excerpt, index_of
from loadstone.checkpoint.hub_cache import HubAccess, cache_root, cached_snapshot, local_path
from loadstone.checkpoint.layout import PARAMS_NAME, below, components, weights_in
from loadstone.errors import MissingShard, NotACheckpoint, SourceNotFound
from loadstone.events import Observer, ignore

Source = str | Path | list[str | Path] | tuple[str | Path, ...]

# Source: https://github.com/huggingface/huggingface_hub/blob/main/src/huggingface_hub/utils/_validators.py
_REPO_ID = re.compile(r"(?=.{1,96}$)(\w[\w.-]*/)?\w([\w.-]*\w)?", re.ASCII)
_TRUE = {"1", "ON", "YES", "TRUE"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """Where a source lies on this machine.

    Attributes:
        root: the folder in which config and tokenizer are looked for.
        files: the weight files that were named, in the order given; None if a folder was named.
        revision: the commit, for a hub id.
    """

    root: Path
    files: tuple[Path, ...] | None = None
    revision: str | None = None


def resolve(
    source: Source, access: HubAccess | None = None, observer: Observer = ignore, excerpt: Excerpt | None = None
) -> Resolved:
    """Find the files of a source; the network is asked only for what is not on this machine.

    Args:
        source: what the user named.
        access: how the hub is used.
        observer: is told of downloaded bytes.
        excerpt: the subfolder, the variant and the tensors that are meant.

    Raises:
        SourceNotFound: no such path, and no such model in the cache or on the hub.
        DownloadFailed: the hub did not give what is missing.
        ValueError: an empty list, or a subfolder or variant of what is no folder.
    """
    excerpt = excerpt or Excerpt()
    if isinstance(source, list | tuple):
        return _inside(_resolve_list(source), excerpt)
    path = local_path(source)
    if os.path.lexists(path):
        named = Resolved(root=path) if path.is_dir() else Resolved(root=path.parent, files=(path,))
        return _inside(named, excerpt)
    name = os.fspath(source)
    if isinstance(source, Path) or not _REPO_ID.fullmatch(name) or "--" in name or ".." in name:
        raise SourceNotFound(f"{name}: expected a file, a folder or a hub id such as org/name, found no such path.")
    return _resolve_hub(name, access or HubAccess(), observer, excerpt)


def _inside(resolved: Resolved, excerpt: Excerpt) -> Resolved:
    """The subfolder of what was found, if one is meant."""
    if resolved.files is not None:
        for name in ("subfolder", "variant"):
            if getattr(excerpt, name):
                raise ValueError(f"{name}= chooses among the files of a folder or hub id; the source names files.")
        return resolved
    folder = resolved.root / excerpt.subfolder
    if not folder.is_dir():
        there = ", ".join(components(below(resolved.root))) or "none with weights"
        raise SourceNotFound(
            f"{resolved.root}: expected a subfolder {excerpt.subfolder!r}, found {there}; pass one that is there."
        )
    return replace(resolved, root=folder)


def _resolve_list(source: list[str | Path] | tuple[str | Path, ...]) -> Resolved:
    if not source:
        raise ValueError("expected at least one weight file, found an empty list")
    files = tuple(local_path(item) for item in source)
    if len(files) == 1 and files[0].is_dir():
        return Resolved(root=files[0])
    for file in files:
        if not file.exists():
            raise SourceNotFound(f"{file}: expected a weight file, found nothing there; check the path.")
    return Resolved(root=files[0].parent, files=files)


def _resolve_hub(repo_id: str, access: HubAccess, observer: Observer, excerpt: Excerpt) -> Resolved:
    snapshot = cached_snapshot(repo_id, access)
    missing = _missing(snapshot / excerpt.subfolder, excerpt) if snapshot else ("every file",)
    if snapshot and not missing:
        return Resolved(root=snapshot / excerpt.subfolder, revision=snapshot.name)
    if access.local_files_only or os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE:
        why = "local_files_only" if access.local_files_only else "HF_HUB_OFFLINE"
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SourceNotFound(
            f"{repo_id}: expected the whole model in {cache_root(access)}, did not find {missing[0]}{more}; "
            f"no such path exists either. The network is not asked because of {why}: run `hf download {repo_id}` first."
        )
    from loadstone.checkpoint.download import download

    root = download(repo_id, access, observer, excerpt)
    return Resolved(root=root / excerpt.subfolder, revision=root.name)


def _missing(folder: Path, excerpt: Excerpt) -> tuple[str, ...]:
    """What a folder lacks to hold what is asked for, as names of files; empty if nothing."""
    try:
        weights = weights_in(folder, excerpt.variant)
    except (NotACheckpoint, FileNotFoundError):
        return ("the weights",)
    except MissingShard as error:
        return (str(error),)
    described = weights.files[0].suffix == ".gguf" or any(
        (folder / name).is_file() for name in ("config.json", PARAMS_NAME)
    )
    if weights.index is not None:
        missing = index_of(weights.index, excerpt, where=str(folder)).missing()
    else:
        missing = tuple(file.name for file in weights.files if not file.is_file())
    return (*([] if described else ["config.json"]), *missing)
