"""Hashes that are known of a checkpoint's files before they are read: from SHA256SUMS, and from names in the hub cache.

Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache (blobs are named by their hash)
        https://git-scm.com/book/en/v2/Git-Internals-Git-Objects (a blob is hashed behind a header)
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadstone.checkpoint import demo
from loadstone.checkpoint.cache import cache_folder
from loadstone.checkpoint.manifest import NAME, read_manifest

_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_SHA1 = re.compile(r"[0-9a-f]{40}")


def _sha256(nbytes: int) -> Any:
    return hashlib.sha256()


def _git_blob(nbytes: int) -> Any:
    # Not for security: it is the name that git and the hub give to small files.
    return hashlib.sha1(b"blob %d\0" % nbytes, usedforsecurity=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownHash:
    """What the hash of a file must be.

    Attributes:
        algorithm: as people call it.
        digest: in lower-case hex.
        said_by: where that is known from.
        begin: begins the hash of a file of so many bytes.
    """

    algorithm: str
    digest: str
    said_by: str
    begin: Callable[[int], Any] = _sha256


def known_hashes(root: Path, weights: Iterable[Path]) -> dict[Path, tuple[KnownHash, ...]]:
    """Find what is known of a checkpoint's files.

    Args:
        root: the folder of the checkpoint.
        weights: its weight files, which may lie elsewhere.

    Returns:
        The hashes of every file of which some are known: weights, and whatever lies beside them. A file that
        SHA256SUMS names is among them even if it does not exist.

    Raises:
        InvalidHeader: SHA256SUMS cannot be parsed.
    """
    found: dict[Path, list[KnownHash]] = {}
    for path, known in _of_manifest(root).items():
        found.setdefault(path, []).append(known)
    for path in dict.fromkeys([*weights, *_linked(root)]):
        known_blob = _of_blob(path)
        if known_blob is not None:
            found.setdefault(path, []).append(known_blob)
        if path == cache_folder() / "demo" / demo.FILE_NAME:
            known = KnownHash(algorithm="SHA-256", digest=demo.SHA256, said_by="the demo model's source")
            found.setdefault(path, []).append(known)
    return {path: tuple(hashes) for path, hashes in found.items()}


def _of_manifest(root: Path) -> Mapping[Path, KnownHash]:
    path = root / NAME
    if not os.path.lexists(path):
        return {}
    return {
        root / name: KnownHash(algorithm="SHA-256", digest=digest, said_by=NAME)
        for name, digest in read_manifest(path).items()
    }


def _linked(root: Path) -> list[Path]:
    """The links of a snapshot of the hub cache, those in subfolders too; nothing of other folders."""
    if root.parent.name != "snapshots":
        return []
    return sorted(
        Path(folder) / name
        for folder, _, names in os.walk(root)
        for name in names
        if (Path(folder) / name).is_symlink()
    )


def _of_blob(path: Path) -> KnownHash | None:
    """What the name of the blob says that a link of a hub cache leads to."""
    if not path.is_symlink():
        return None
    target = Path(os.path.normpath(path.parent / os.readlink(path)))  # noqa: PTH115 - one step, not all
    if target.parent.name != "blobs":
        return None
    said_by = "its name in the hub cache"
    if _SHA256.fullmatch(target.name):
        return KnownHash(algorithm="SHA-256", digest=target.name, said_by=said_by)
    if _GIT_SHA1.fullmatch(target.name):
        return KnownHash(algorithm="git SHA-1", digest=target.name, said_by=said_by, begin=_git_blob)
    return None
