"""Which files of a folder are its weights: the names that the field uses, in order of preference."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
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
SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt")
# Meta's and Mistral's own layout: what config.json is elsewhere, and the names beside it.
PARAMS_NAME = "params.json"
PIPELINE_NAME = "model_index.json"
# `consolidated.00.pth`, one for each rank of model parallelism; also the one file and the parts that Mistral writes.
META_NAME = re.compile(
    r"consolidated(\.(?P<rank>\d{2}))?(\.pth|\.safetensors)|consolidated-\d{5}-of-\d{5}\.safetensors"
)
# The files by which a tokenizer is recognised.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")

# What trainers leave beside the weights.
# Source: https://github.com/huggingface/transformers/blob/main/src/transformers/trainer.py (OPTIMIZER_NAME, ...)
_NOT_WEIGHTS = re.compile(r"(adapter_model|training_args|optimizer|scheduler|scaler|rng_state)\b.*|rng_state_\d+\.pth")

# The names of numbered parts, as transformers and gguf-split write them.
_SPLIT = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5,6})-of-(?P<count>\d{5,6})\.(?P<suffix>\w+)")

_INDEX = re.compile(r".+\.index(\.[^.]+)?\.json")
# A variant stands before the suffix, of an index before .json; some write it where the shards have it.
# Source: https://github.com/huggingface/diffusers/blob/main/src/diffusers/utils/hub_utils.py (_add_variant)
_VARIANT = re.compile(
    r"(?P<stem>(diffusion_)?(pytorch_)?model)(\.(?P<early>[^.]+?))?(?P<number>-\d{5}-of-\d{5})?"
    r"(?P<suffix>\.(safetensors|bin))((?P<index>\.index)(\.(?P<late>[^.]+))?\.json)?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The weight files of a checkpoint.

    Attributes:
        files: in reading order; some may be missing where an index names them.
        index: what the index says, where there is one.
    """

    files: tuple[Path, ...]
    index: Index | None = None


def weights_in(folder: Path, variant: str | None = None) -> Weights:
    """Find the weights of a folder.

    Args:
        folder: where to look.
        variant: the `fp16` of `model.fp16.safetensors`; None means files without one.

    Raises:
        NotACheckpoint: there are none, or several that exclude one another.
        MissingShard: a part of a numbered set is missing.
        InvalidIndex: the index cannot be used.
    """
    found = [path.name for path in folder.iterdir()]
    if not any(name.endswith(SUFFIXES) for name in found):
        found += below(folder)
    names = pick(found, where=str(folder), variant=variant)
    return weights_at(folder / names[0]) if len(names) == 1 else Weights(files=tuple(folder / name for name in names))


def pick(names: Iterable[str], *, where: str, variant: str | None = None) -> tuple[str, ...]:
    """Pick the weights by name: one file, one index, or the parts of a numbered set.

    Args:
        names: all names of one folder, here or on the hub; those with a slash only tell of its subfolders.
        where: what a message begins with.
        variant: the `fp16` of `model.fp16.safetensors`; None means files without one.

    Raises:
        NotACheckpoint: there are none, or several that exclude one another.
        MissingShard: a part of a numbered set is missing.
    """
    everything = sorted(names)
    here = [name for name in everything if "/" not in name]
    if variant is not None:
        plain = {_without(variant, name): name for name in here}
        plain.pop(None, None)
        candidates = [name for name in plain if name is not None]
    else:
        plain = {}
        candidates = [name for name in here if variant_of(name) is None]
    found = _picked(candidates, where)
    if not found:
        raise NotACheckpoint(_no_variant(variant, here, where) or _nothing_found(everything, where))
    return tuple(plain.get(name, name) for name in found)


def _picked(names: list[str], where: str) -> tuple[str, ...]:
    for name in PREFERRED:
        if name in names:
            return (name,)
    if PARAMS_NAME in names and (ranks := _ranks(names, where)):
        return ranks
    for suffix in SUFFIXES:
        indexes = [name for name in names if name.endswith(suffix + ".index.json")]
        if len(indexes) == 1:
            return tuple(indexes)
        found = indexes or [name for name in names if name.endswith(suffix) and not _NOT_WEIGHTS.fullmatch(name)]
        if found:
            return _only(found, where)
    return ()


def _ranks(names: list[str], where: str) -> tuple[str, ...]:
    """The files of a model-parallel checkpoint, `consolidated.00.pth` and so on; how many there must be is not told."""
    ranks = {int(match["rank"]): match[0] for name in names if (match := META_NAME.fullmatch(name)) and match["rank"]}
    for rank in range(len(ranks)):
        if rank not in ranks:
            raise MissingShard(
                f"{where}: expected consolidated.{rank:02d}.pth before {ranks[max(ranks)]}, did not find it; download "
                "what is missing."
            )
    return tuple(ranks[rank] for rank in sorted(ranks))


def weights_at(path: Path) -> Weights:
    """The weights that one file stands for: itself, or the shards that it names if it is an index."""
    if is_index(path.name):
        index = read_index(path)
        return Weights(files=index.files, index=index)
    return Weights(files=(path,))


def is_index(name: str) -> bool:
    """Whether a file is named like an index of shards."""
    return _INDEX.fullmatch(name) is not None


def variant_of(name: str) -> str | None:
    """The variant in a file's name, where it is one of the usual names."""
    match = _VARIANT.fullmatch(name)
    return (match["early"] or match["late"]) if match else None


def below(folder: Path) -> list[str]:
    """The names of files in the subfolders of a folder, with slashes."""
    return [f"{path.parent.name}/{path.name}" for path in folder.glob("*/*")]


def components(names: Iterable[str]) -> tuple[str, ...]:
    """The subfolders that hold weights.

    Args:
        names: of files below one folder, with slashes.
    """
    held = {name.split("/")[0] for name in names if name.count("/") == 1 and name.endswith(SUFFIXES)}
    return tuple(sorted(held))


def _without(variant: str, name: str) -> str | None:
    """The name without its variant; None if it has another or none."""
    match = _VARIANT.fullmatch(name)
    if match is None:
        # Any other name, such as unet.fp16.safetensors.
        stem, dot, suffix = name.rpartition(".")
        return stem.removesuffix(f".{variant}") + dot + suffix if stem.endswith(f".{variant}") else None
    if variant not in (match["early"], match["late"]):
        return None
    index = ".index.json" if match["index"] else ""
    return f"{match['stem']}{match['number'] or ''}{match['suffix']}{index}"


def _only(names: list[str], where: str) -> tuple[str, ...]:
    splits = [_SPLIT.fullmatch(name) for name in names]
    sets = {(split["prefix"], split["count"]) if split else None for split in splits}
    if len(sets) == 1 and (split := splits[0]) is not None:
        _check_complete([int(one["number"]) for one in splits if one], int(split["count"]), names, where)
        return tuple(names)
    if len(names) == 1:
        return tuple(names)
    if len(names) == 1:
        return tuple(names)
    raise NotACheckpoint(
        f"{where}: expected one checkpoint, found {len(names)} files that could be one: {_listed(names)}; "
        "pass the path of one of them, or a list of those that belong together."
    )


def _check_complete(numbers: list[int], count: int, names: list[str], where: str) -> None:
    if len(names) < count:
        lacking = next(number for number in range(1, count + 1) if number not in numbers)
        raise MissingShard(
            f"{where}: expected {count} files like {names[0]}, found {len(names)}: number {lacking} is missing; "
            "download it."
        )


def _no_variant(variant: str | None, names: list[str], where: str) -> str | None:
    """What to say where weights of another variant are there; None if there are none."""
    variants = sorted({found for name in names if (found := variant_of(name))})
    if variant is None:
        if not variants:
            return None
        return (
            f"{where}: expected weights without a variant, found only those of {', '.join(variants)}; pass "
            f'variant="{variants[0]}".'
        )
    there = ", ".join(variants) or "no variant"
    plain = " and weights without a variant" if any(_is_plain(name) for name in names) else ""
    return f'{where}: expected weights of the variant "{variant}", found {there}{plain}; pass one that is there.'


def _is_plain(name: str) -> bool:
    return name.endswith(SUFFIXES) and variant_of(name) is None and not _NOT_WEIGHTS.fullmatch(name)


def _nothing_found(names: list[str], where: str) -> str:
    looked_for = f"expected {', '.join(PREFERRED[:2])}, pytorch_model.bin or one file of {' '.join(SUFFIXES)}"
    for marker, say in _MARKERS.items():
        if marker in names:
            return f"{where}: {looked_for}; {say(names)}"
    here = [name for name in names if "/" not in name]
    found = _listed(here) if here else "an empty folder"
    hint = "pass the folder or file that holds the weights"
    if folders := components(names):
        hint = f"pass subfolder= with one of {', '.join(folders)}"
    return f"{where}: {looked_for}; found {found}; {hint}."


def _adapter_found(names: list[str]) -> str:
    return (
        "found a LoRA adapter (adapter_config.json), which is not a model by itself: load the base model that it names."
    )


def _pipeline_found(names: list[str]) -> str:
    return (
        f"found a diffusers pipeline ({PIPELINE_NAME}): load one of its components with subfolder=, which are "
        f"{', '.join(components(names)) or 'not there'}."
    )


# What a folder without weights is recognised by.
_MARKERS: dict[str, Callable[[list[str]], str]] = {
    "adapter_config.json": _adapter_found,
    PIPELINE_NAME: _pipeline_found,
}


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
