"""`load_tokenizer`: the tokenizer of any source, GGUF files included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from loadstone.api.pause import paused_gc
from loadstone.checkpoint.hub_cache import HubAccess
from loadstone.checkpoint.open import open_checkpoint
from loadstone.checkpoint.resolve import Source
from loadstone.checkpoint.values import Format
from loadstone.errors import InvalidHeader, UnsupportedFormat


def load_tokenizer(
    source: Source,
    *,
    local_files_only: bool = False,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load the tokenizer of a checkpoint.

    Args:
        source: as for `loadstone.load`.
        local_files_only: never ask the network.
        revision: the branch, tag or commit of a hub id.
        token: a hub token for gated models.
        cache_dir: the hub cache, where it is not the usual one.
        trust_remote_code: run the tokenizer code that the checkpoint brings.

    Returns:
        A transformers tokenizer. For a GGUF file it is made from the file's own metadata.

    Raises:
        SourceError: there is no such source, or it has no tokenizer.
    """
    access = replace(
        HubAccess(),
        token=token,
        cache_dir=None if cache_dir is None else Path(cache_dir),
        trust_remote_code=trust_remote_code,
    )
    checkpoint = open_checkpoint(source, revision=revision, local_files_only=local_files_only, hub=access)
    with paused_gc():
        from loadstone.architecture.transformers_tokenizer import load_gguf_tokenizer
        from loadstone.architecture.transformers_tokenizer import load_tokenizer as load_from_folder

        if checkpoint.format is Format.GGUF:
            try:
                return load_gguf_tokenizer(checkpoint.metadata)
            except (InvalidHeader, UnsupportedFormat) as error:
                raise type(error)(f"{checkpoint.files[0].path}: {error}") from error
        return load_from_folder(checkpoint.root, trust_remote_code=trust_remote_code)
