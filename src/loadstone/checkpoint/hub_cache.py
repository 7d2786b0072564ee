"""The cache of the hub on this machine, read without importing huggingface_hub.

Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache (the layout of the cache)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from loadstone.errors import SourceNotFound


@dataclass(frozen=True, slots=True, kw_only=True)
class HubAccess:
    """How the hub and its cache are used.

    Attributes:
        revision: a branch, tag or commit; `main` if None.
        local_files_only: never ask the network.
        token: for private and gated models; the one that `hf auth login` stored if None.
        cache_dir: the folder of the hub cache; the one of the environment if None.
        trust_remote_code: also download the model's own Python files.
    """

    revision: str | None = None
    local_files_only: bool = False
    token: str | None = None
    cache_dir: Path | None = None
    trust_remote_code: bool = False


def cache_root(access: HubAccess) -> Path:
    """The folder of the hub cache, found as huggingface_hub finds it, without importing it.

    Source: https://github.com/huggingface/huggingface_hub/blob/main/src/huggingface_hub/constants.py (HF_HUB_CACHE)
    """
    if access.cache_dir is not None:
        return access.cache_dir
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := os.environ.get(variable):
            return local_path(value)
    if home := os.environ.get("HF_HOME"):
        return local_path(home) / "hub"
    return local_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def cached_snapshot(repo_id: str, access: HubAccess) -> Path | None:
    """The folder of a revision in the cache, complete or not; None if there is none."""
    folder = cache_root(access) / f"models--{repo_id.replace('/', '--')}"
    revision = access.revision or "main"
    if ".." in revision.split("/"):
        raise SourceNotFound(f"{repo_id}: expected a branch, tag or commit as revision, found {revision!r}.")
    snapshot = folder / "snapshots" / revision
    if snapshot.is_dir():
        return snapshot
    try:
        commit = (folder / "refs" / revision).read_text().strip()
    except OSError:
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if commit and "/" not in commit and snapshot.is_dir() else None


def local_path(value: str | Path) -> Path:
    """A path as people type it, `~` for their home."""
    try:
        return Path(value).expanduser()
    except RuntimeError:  # `~name` of a user who does not exist is an ordinary name
        return Path(value)
