"""Which files of a folder are its weights: the names that the field uses, in order of preference."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from loadstone.checkpoint.sharded import Index, read_index
from loadstone.errors import MissingShard, NotACheckpoint

# Source: https://github.com/huggingface/transformers/blob/main/src/transformers/utils/__init__.py (WEIGHTS_NAME, ...)
#         https://github.com/huggingface/diffusers/blob/main/src/diffusers/utils/constants.py
PREFERRED = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
)
INDEX_SUFFIX = ".index.json"
SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth")

# What trainers leave beside the weights.
# Source: https://github.com/huggingface/transformers/blob/main/src/transformers/trainer.py (OPTIMIZER_NAME, ...)
_NOT_WEIGHTS = re.compile(r"(adapter_model|training_args|optimizer|scheduler|scaler|rng_state)\b.*|rng_state_\d+\.pth")

# The names of numbered parts, as transformers and gguf-split write them.
_SPLIT = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5,6})-of-(?P<count>\d{5,6})\.(?P<suffix>\w+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The weight files of a checkpoint.

    Attributes:
        files: in reading order; some may be missing where an index names them.
        index: what the index says, where there is one.
    """

    files: tuple[Path, ...]
    index: Index | None = None


def weights_in(folder: Path) -> Weights:
    """Find the weights of a folder.

    Raises:
        NotACheckpoint: there are none, or several that exclude one another.
        MissingShard: a part of a numbered set is missing.
        InvalidIndex: the index cannot be used.
    """
    names = pick([path.name for path in folder.iterdir()], where=str(folder))
    return weights_at(folder / names[0]) if len(names) == 1 else Weights(files=tuple(folder / name for name in names))


def pick(names: Iterable[str], *, where: str) -> tuple[str, ...]:
    """Pick the weights by name: one file, one index, or the parts of a numbered set.

    Args:
        names: all names of one folder, here or on the hub.
        where: what a message begins with.

    Raises:
        NotACheckpoint: there are none, or several that exclude one another.
        MissingShard: a part of a numbered set is missing.
    """
    names = sorted(names)
    for name in PREFERRED:
        if name in names:
            return (name,)
    for suffix in SUFFIXES:
        indexes = [name for name in names if name.endswith(suffix + INDEX_SUFFIX)]
        if len(indexes) == 1:
            return tuple(indexes)
        found = indexes or [name for name in names if name.endswith(suffix) and not _NOT_WEIGHTS.fullmatch(name)]
        if found:
            return _only(found, where)
    raise NotACheckpoint(_nothing_found(names, where))


def weights_at(path: Path) -> Weights:
    """The weights that one file stands for: itself, or the shards that it names if it is an index."""
    if path.name.endswith(INDEX_SUFFIX):
        index = read_index(path)
        return Weights(files=index.files, index=index)
    return Weights(files=(path,))


def missing_in(folder: Path) -> tuple[str, ...]:
    """What a folder lacks to be a complete checkpoint, as names of files; empty if it is one."""
    try:
        weights = weights_in(folder)
    except NotACheckpoint:
        return ("the weights",)
    except MissingShard as error:
        return (str(error),)
    lacking = [] if weights.files[0].suffix == ".gguf" or (folder / "config.json").is_file() else ["config.json"]
    missing = weights.index.missing() if weights.index else [file.name for file in weights.files if not file.is_file()]
    return (*lacking, *missing)


def _only(names: list[str], where: str) -> tuple[str, ...]:
    splits = [_SPLIT.fullmatch(name) for name in names]
    sets = {(split["prefix"], split["count"]) if split else None for split in splits}
    if len(sets) == 1 and (split := splits[0]) is not None:
        count = int(split["count"])
        if len(names) < count:
            raise MissingShard(
                f"{where}: expected {count} files like {names[0]}, found {len(names)}; download what is missing."
            )
        return tuple(names)
    if len(names) == 1:
        return tuple(names)
    raise NotACheckpoint(
        f"{where}: expected one checkpoint, found {len(names)} files that could be one: {_listed(names)}; "
        "pass the path of one of them, or a list of those that belong together."
    )


def _nothing_found(names: list[str], where: str) -> str:
    looked_for = f"expected {', '.join(PREFERRED[:2])}, pytorch_model.bin or one file of {' '.join(SUFFIXES)}"
    if "adapter_config.json" in names:
        return (
            f"{where}: {looked_for}; found a LoRA adapter (adapter_config.json), which is not a model by itself: "
            "load the base model that it names."
        )
    if "model_index.json" in names:
        return (
            f"{where}: {looked_for}; found a diffusers pipeline (model_index.json): pass one of its subfolders, "
            "such as transformer or unet."
        )
    found = _listed(names) if names else "an empty folder"
    return f"{where}: {looked_for}; found {found}; pass the folder or file that holds the weights."


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
