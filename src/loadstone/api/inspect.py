"""`inspect`: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loadstone.architecture.implied import with_config
from loadstone.checkpoint.excerpt import Excerpt, Select
from loadstone.checkpoint.hub_cache import HubAccess
from loadstone.checkpoint.open import open_checkpoint
from loadstone.checkpoint.pipeline import pipeline_folder, read_pipeline
from loadstone.checkpoint.resolve import Source
from loadstone.errors import ConfigError, UnsupportedFormat
from loadstone.events import Observer, ignore
from loadstone.report.inspection import Inspection, inspect_checkpoint, inspect_pipeline


def inspect(
    source: Source,
    *,
    local_files_only: bool = False,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    prefix: str | None = None,
    select: Select | None = None,
    progress: Observer | None = None,
) -> Inspection:
    """Read the headers of a checkpoint and explain them. No tensor data is read, torch is not imported.

    Args:
        source: as for `loadstone.load`.
        local_files_only: never ask the network.
        revision: the branch, tag or commit of a hub id.
        token: a hub token for gated models.
        cache_dir: the hub cache, where it is not the usual one.
        subfolder: a folder inside the source, such as a component of a diffusers pipeline.
        variant: the `fp16` of files named `model.fp16.safetensors`.
        prefix: only the tensors whose names begin with it, without it.
        select: only tensors whose names (without the prefix) match a shell pattern, one of several, or a function.
        progress: is called with the events of `loadstone.events`, of which a download has many.

    Returns:
        Files, blocks, tensors, and every field of the config explained; of a diffusers pipeline, its components.

    Raises:
        SourceError: there is no such source.
        CorruptCheckpoint: a file contradicts itself.
    """
    access = HubAccess(
        revision=revision,
        local_files_only=local_files_only,
        token=token,
        cache_dir=None if cache_dir is None else Path(cache_dir),
    )
    excerpt = Excerpt(subfolder=subfolder or "", variant=variant, prefix=prefix, select=select)
    if (folder := pipeline_folder(source, access, excerpt)) is not None:
        return inspect_pipeline(read_pipeline(folder, excerpt))
    checkpoint = open_checkpoint(
        source,
        revision=revision,
        local_files_only=local_files_only,
        hub=access,
        observer=progress or ignore,
        excerpt=excerpt,
    )
    try:
        checkpoint = with_config(checkpoint)
    except (ConfigError, UnsupportedFormat) as error:
        # The tensors can be shown all the same.
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, str(error)))
    return inspect_checkpoint(checkpoint)
