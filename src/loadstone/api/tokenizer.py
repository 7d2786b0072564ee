"""`load_tokenizer`: the tokenizer of any source, GGUF files included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loadstone.api.pause import paused_gc
from loadstone.checkpoint.excerpt import Excerpt
from loadstone.checkpoint.hub_cache import HubAccess, cached_snapshot, local_path
from loadstone.checkpoint.layout import TOKENIZER_FILES
from loadstone.checkpoint.open import open_checkpoint
from loadstone.checkpoint.resolve import Source
from loadstone.checkpoint.values import Format


def load_tokenizer(
    source: Source,
    *,
    local_files_only: bool = False,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    subfolder: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load the tokenizer of a checkpoint.

    Args:
        source: as for `loadstone.load`.
        local_files_only: never ask the network.
        revision: the branch, tag or commit of a hub id.
        token: a hub token for gated models.
        cache_dir: the hub cache, where it is not the usual one.
        subfolder: a folder inside the source.
        trust_remote_code: run the tokenizer code that the checkpoint brings.

    Returns:
        A transformers tokenizer. For a GGUF file it is made from the file's own metadata.

    Raises:
        SourceError: there is no such source, or it has no tokenizer.
    """
    access = HubAccess(
        revision=revision,
        local_files_only=local_files_only,
        token=token,
        cache_dir=None if cache_dir is None else Path(cache_dir),
        trust_remote_code=trust_remote_code,
    )
    folder = _folder(source, access, subfolder or "")
    if folder is not None:
        return _from_folder(folder, trust_remote_code)
    excerpt = Excerpt(subfolder=subfolder or "")
    checkpoint = open_checkpoint(
        source, revision=revision, local_files_only=local_files_only, hub=access, excerpt=excerpt
    )
    if checkpoint.format is not Format.GGUF:
        return _from_folder(checkpoint.root, trust_remote_code)
    with paused_gc():
        from loadstone.architecture.transformers_tokenizer import load_gguf_tokenizer

        return load_gguf_tokenizer(checkpoint.metadata)


def _folder(source: Source, access: HubAccess, subfolder: str) -> Path | None:
    """The folder on this machine that holds a tokenizer, if the source is one: its weights are not looked for."""
    if not isinstance(source, str | Path):
        return None
    path = local_path(source)
    snapshot = None if path.exists() else cached_snapshot(str(source), access)
    folder = (snapshot or path) / subfolder
    # What a snapshot lacks may be on the hub; a GGUF file describes its own tokenizer.
    wanted = ("tokenizer_config.json",) if snapshot else TOKENIZER_FILES
    holds = any((folder / name).is_file() for name in wanted) and not any(folder.glob("*.gguf"))
    return folder if holds else None


def _from_folder(folder: Path, trust_remote_code: bool) -> Any:
    with paused_gc():
        from loadstone.architecture.transformers_tokenizer import load_tokenizer as load_from_folder

        return load_from_folder(folder, trust_remote_code=trust_remote_code)
