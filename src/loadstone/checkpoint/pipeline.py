"""Folders of diffusers pipelines: model_index.json, and a component in each subfolder, of which some hold weights.

Source: https://huggingface.co/docs/diffusers/using-diffusers/other-formats#layout-comparison
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loadstone.checkpoint.excerpt import Excerpt, excerpt_of
from loadstone.checkpoint.files import read_json_object
from loadstone.checkpoint.hub_cache import HubAccess, cached_snapshot, local_path
from loadstone.checkpoint.layout import PIPELINE_NAME, below, components, variant_of, weights_in
from loadstone.checkpoint.open import MAX_CONFIG_BYTES, open_checkpoint
from loadstone.checkpoint.resolve import Source
from loadstone.checkpoint.values import Checkpoint
from loadstone.errors import InvalidConfig, NotACheckpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One part of a pipeline.

    Attributes:
        name: its subfolder.
        library: where its class comes from, `diffusers` or `transformers`.
        class_name: its class.
        num_tensors: how many tensors it holds; 0 for schedulers and tokenizers.
        nbytes: what they take.
    """

    name: str
    library: str
    class_name: str
    num_tensors: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """A pipeline.

    Attributes:
        class_name: the class of the pipeline.
        checkpoint: the tensors of all components, each name with its component in front.
        components: in the order of model_index.json.
    """

    class_name: str
    checkpoint: Checkpoint
    components: tuple[Component, ...]


def pipeline_folder(source: Source, access: HubAccess, excerpt: Excerpt) -> Path | None:
    """The folder of a pipeline on this machine, if the source is one and has no weights of its own."""
    if not isinstance(source, str | Path) or excerpt.subfolder:
        return None
    path = local_path(source)
    folder = path if path.exists() else cached_snapshot(str(source), access)
    if folder is None or not (folder / PIPELINE_NAME).is_file():
        return None
    try:
        weights_in(folder, excerpt.variant)
    except NotACheckpoint:
        return folder
    return None


def read_pipeline(folder: Path, excerpt: Excerpt) -> Pipeline:
    """Read the headers of every component.

    Args:
        folder: that of model_index.json.
        excerpt: which variant, and which of the tensors.

    Raises:
        NotACheckpoint: no component holds weights, or of this variant.
        InvalidConfig: model_index.json is no JSON object.
    """
    index = read_json_object(folder / PIPELINE_NAME, max_bytes=MAX_CONFIG_BYTES, fault=InvalidConfig)
    opened = _opened(folder, _declared(index), excerpt.variant)
    if not opened:
        raise NotACheckpoint(
            f"{folder}: expected components with weights, as {PIPELINE_NAME} names them, found none; download them."
        )
    merged = _merged(folder, opened)
    return Pipeline(
        class_name=str(index.get("_class_name", "a pipeline")),
        checkpoint=excerpt_of(merged, excerpt),
        components=tuple(
            Component(
                name=name,
                library=library,
                class_name=class_name,
                num_tensors=len(opened[name].tensors) if name in opened else 0,
                nbytes=opened[name].nbytes if name in opened else 0,
            )
            for name, (library, class_name) in _declared(index).items()
        ),
    )


def _opened(folder: Path, names: Iterable[str], variant: str | None) -> dict[str, Checkpoint]:
    """The components that hold weights; those that lack the variant are taken without, as diffusers does."""
    there = below(folder)
    varied = {path.split("/")[0] for path in there if variant and variant_of(path.split("/")[1]) == variant}
    if variant and not varied:
        variants = sorted({found for path in there if (found := variant_of(path.split("/")[1]))})
        raise NotACheckpoint(
            f'{folder}: expected components of the variant "{variant}", found {", ".join(variants) or "none"}; pass '
            "one that is there."
        )
    holding = components(there)
    return {
        name: open_checkpoint(folder / name, excerpt=Excerpt(variant=variant if name in varied else None))
        for name in names
        if name in holding
    }


def _declared(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Library and class of each component; optional ones that are left out are written as two nulls."""
    return {
        name: (value[0], value[1])
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(item, str) for item in value)
    }


def _merged(folder: Path, opened: Mapping[str, Checkpoint]) -> Checkpoint:
    first = next(iter(opened.values()))
    return Checkpoint(
        format=first.format,
        root=folder,
        files=tuple(file for checkpoint in opened.values() for file in checkpoint.files),
        tensors={
            f"{component}.{name}": replace(info, name=f"{component}.{name}")
            for component, checkpoint in opened.items()
            for name, info in checkpoint.tensors.items()
        },
        notes=tuple(note for checkpoint in opened.values() for note in checkpoint.notes),
    )
