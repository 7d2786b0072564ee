"""`inspect`: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loadstone.architecture.gguf import config_from_metadata
from loadstone.checkpoint.hub_cache import HubAccess
from loadstone.checkpoint.open import open_checkpoint
from loadstone.checkpoint.resolve import Source
from loadstone.checkpoint.values import Format
from loadstone.errors import ConfigError
from loadstone.events import Observer, ignore
from loadstone.report.inspection import Inspection, inspect_checkpoint


def inspect(
    source: Source,
    *,
    local_files_only: bool = False,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Observer | None = None,
) -> Inspection:
    """Read the headers of a checkpoint and explain them. No tensor data is read, torch is not imported.

    Args:
        source: as for `loadstone.load`.
        local_files_only: never ask the network.
        revision: the branch, tag or commit of a hub id.
        token: a hub token for gated models.
        cache_dir: the hub cache, where it is not the usual one.
        progress: is called with the events of `loadstone.events`, of which a download has many.

    Returns:
        Files, blocks, tensors, and every field of the config explained.

    Raises:
        SourceError: there is no such source.
        CorruptCheckpoint: a file contradicts itself.
    """
    checkpoint = open_checkpoint(
        source,
        revision=revision,
        local_files_only=local_files_only,
        hub=HubAccess(token=token, cache_dir=None if cache_dir is None else Path(cache_dir)),
        observer=progress or ignore,
    )
    if checkpoint.format is Format.GGUF:
        try:
            checkpoint = replace(checkpoint, config=config_from_metadata(checkpoint))
        except ConfigError as error:
            # The tensors can be shown all the same.
            checkpoint = replace(checkpoint, notes=(*checkpoint.notes, str(error)))
    return inspect_checkpoint(checkpoint)
