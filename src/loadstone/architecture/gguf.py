"""GGUF headers -> a config as config.json would have it, and where each tensor belongs in transformers' module.

The families stand in tables (`gguf_families`, `gguf_families_other`); this file applies them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loadstone.architecture import keymap
from loadstone.architecture.gguf_config import one_value
from loadstone.architecture.gguf_families import DECODERS
from loadstone.architecture.gguf_families_other import OTHERS
from loadstone.architecture.gguf_layouts import GgufTarget, Part, apply_layout
from loadstone.architecture.gguf_rules import Facts, Family, Fused, Names
from loadstone.checkpoint.values import Checkpoint, TensorInfo
from loadstone.errors import CheckpointMismatch, InvalidConfig, UnknownArchitecture

__all__ = ["FAMILIES", "GgufTarget", "Part", "apply_layout", "assignments_of", "config_from_metadata", "tensor_targets"]

FAMILIES: dict[str, Family] = {**DECODERS, **OTHERS}

# Token ids of the config, and the metadata they come from.
# Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (special tokens)
_TOKEN_IDS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
    "unk_token_id": "unknown_token_id",
}

_MAX_BLOCK_DIGITS = 9

# Facts of the architecture that are stored as tensors: the config has them.
_IN_CONFIG = ("rope_freqs", "rope_factors_long", "rope_factors_short")


def config_from_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """Say what a GGUF header says in the words of config.json.

    Args:
        checkpoint: what `read_gguf` gave.

    Returns:
        A new dict with `model_type`, `architectures` and every size that the file states.

    Raises:
        UnknownArchitecture: `general.architecture` is not one of the families.
        InvalidConfig: the metadata lacks something, or contradicts the tensors.
        UnsupportedFormat: a variant that transformers' class has no room for.
    """
    facts, family = _family(checkpoint)
    _check_block_count(facts, family)
    config: dict[str, Any] = {"model_type": family.model_type, "architectures": [family.model_class]}
    for key, name in family.keys.items():
        value = facts.get(key)
        if value is not None:
            config[name] = one_value(facts, key, value)
    config["vocab_size"] = facts.shape("token_embd.weight")[0]
    config["tie_word_embeddings"] = not facts.has("output.weight")
    for name, key in _TOKEN_IDS.items():
        config[name] = checkpoint.metadata.get(f"tokenizer.ggml.{key}")
    for finish in family.finish:
        finish(facts, config)
    return config


def tensor_targets(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, GgufTarget]:
    """Find the parameter that each tensor belongs to.

    Args:
        checkpoint: what `read_gguf` gave.
        config: what `config_from_metadata` made of it.

    Returns:
        For each GGUF tensor its target; tensors whose content is in the config (rotary factors) and the blocks of
        multi-token prediction, which transformers does not have, are left out.

    Raises:
        UnknownArchitecture: `general.architecture` is not one of the families.
        CheckpointMismatch: a tensor that the family does not know.
    """
    facts, family = _family(checkpoint)
    num_extra = facts.get("nextn_predict_layers", 0)
    num_blocks = facts.get("block_count", 0) - num_extra
    targets: dict[str, GgufTarget] = {}
    unknown: list[str] = []
    for tensor in checkpoint.tensors.values():
        place = _split(tensor.name, family)
        is_extra = num_extra and place.index is not None and place.index >= num_blocks
        if is_extra or tensor.name.partition(".")[0] in _IN_CONFIG:
            continue
        target = _target(tensor, place, facts, config)
        if target is None:
            unknown.append(tensor.name)
        else:
            targets[tensor.name] = target
    if unknown:
        raise CheckpointMismatch(
            f"{facts.where}: {len(unknown)} tensors have no place in {family.model_class}, such as {unknown[0]}; the "
            "file is of a variant that is not known. Upgrade Loadstone, or use the safetensors checkpoint.",
            unexpected=tuple(unknown),
        )
    return targets


def assignments_of(checkpoint: Checkpoint, targets: Mapping[str, GgufTarget]) -> tuple[keymap.Assignment, ...]:
    """The same by parameter: which tensors fill it, and how each is rearranged first.

    Args:
        checkpoint: what `read_gguf` gave.
        targets: what `tensor_targets` found in it, or some of that.
    """
    parts: dict[str, list[keymap.Part]] = {}
    for name, target in targets.items():
        index = None if target.part is None else target.part.index
        part = keymap.Part(source=name, shape=checkpoint.tensors[name].shape, index=index, layout=target.layout)
        parts.setdefault(target.name, []).append(part)
    return tuple(keymap.Assignment(target=fqn, parts=tuple(found)) for fqn, found in parts.items())


def _family(checkpoint: Checkpoint) -> tuple[Facts, Family]:
    architecture = checkpoint.metadata.get("general.architecture")
    facts = Facts(checkpoint=checkpoint, architecture=str(architecture))
    name = "llama moe" if architecture == "llama" and facts.get("expert_count") else architecture
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is not None:
        return facts, family
    known = sorted(name for name in FAMILIES if " " not in name)
    if architecture is None:
        raise UnknownArchitecture(
            f"{facts.where}: the metadata lacks general.architecture, which says what the model is; expected one of "
            f"{', '.join(known)}."
        )
    close = difflib.get_close_matches(facts.architecture, known, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise UnknownArchitecture(
        f"{facts.where}: general.architecture is {architecture!r}; known are {', '.join(known)}.{hint} "
        "Use the safetensors checkpoint of this model."
    )


def _check_block_count(facts: Facts, family: Family) -> None:
    """Compare the blocks that are promised with those that are there, before anything is built from the number."""
    found: dict[str, set[int]] = {prefix: set() for prefix in family.blocks}
    for name in facts.checkpoint.tensors:
        place = _split(name, family)
        if place.index is not None:
            found[place.prefix].add(place.index)
    first, *others = found
    promised = {first: facts.need("block_count")}
    for prefix in others:
        promised[prefix] = facts.get("decoder_block_count", facts.need("block_count"))
    for prefix, count in promised.items():
        present = found[prefix]
        if count != len(present) or (present and max(present) != count - 1):
            raise InvalidConfig(
                f"{facts.where}: {facts.architecture}.block_count promises {count} blocks, the file has tensors of "
                f"{len(present)} blocks named {prefix}.N; the file is not a complete model."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """A tensor's name, taken apart.

    Attributes:
        names: the names that apply there.
        leaf: the name without its block.
        gguf_prefix: `blk.0.`, or nothing outside the blocks.
        module_prefix: `model.layers.0.`, or nothing.
        prefix: `blk`, or nothing.
        index: the block's number, or None.
    """

    names: Names
    leaf: str
    gguf_prefix: str = ""
    module_prefix: str = ""
    prefix: str = ""
    index: int | None = None


def _split(name: str, family: Family) -> _Place:
    for prefix, (module, names) in family.blocks.items():
        if name.startswith(f"{prefix}."):
            number, _, leaf = name[len(prefix) + 1 :].partition(".")
            if number.isdecimal() and len(number) <= _MAX_BLOCK_DIGITS:
                return _Place(
                    names=names,
                    leaf=leaf,
                    gguf_prefix=f"{prefix}.{number}.",
                    module_prefix=f"{module}.{number}.",
                    prefix=prefix,
                    index=int(number),
                )
    return _Place(names=family.top, leaf=name)


def _target(tensor: TensorInfo, place: _Place, facts: Facts, config: Mapping[str, Any]) -> GgufTarget | None:
    stem, _, suffix = place.leaf.rpartition(".")
    rule = place.names.get(place.leaf) or place.names.get(stem)
    if rule is None:
        return None
    if isinstance(rule, str):
        return GgufTarget(name=f"{place.module_prefix}{rule}.{suffix}")
    name = rule.name
    if rule.beside is not None and facts.has(place.gguf_prefix + rule.beside[0]):
        name = rule.beside[1]
    return GgufTarget(
        name=place.module_prefix + (name if rule.exact else f"{name}.{suffix}"),
        layout=rule.layout(config) if callable(rule.layout) else rule.layout,
        part=_part(tensor, rule.fused) if rule.fused else None,
    )


def _part(tensor: TensorInfo, fused: Fused) -> Part:
    """The half of the parameter that the tensor fills; where it is transposed, its own width is in dimension 1."""
    width = tensor.shape[1]
    if fused.interleaved:
        return Part(dim=fused.dim, start=fused.index, stop=2 * width, step=2)
    return Part(dim=fused.dim, start=fused.index * width, stop=(fused.index + 1) * width)
