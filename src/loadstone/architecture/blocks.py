"""Tensor names -> blocks in execution order: embeddings, numbered blocks, final norm and head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from loadstone.checkpoint.values import TensorInfo

# The first number in a name tells its block: model.layers.3.self_attn..., transformer.h.3.attn..., blk.3.attn_q...
_NUMBERED = re.compile(r"^(?P<stack>(?:[^.]+\.)*?(?:[^.]*\D))\.(?P<index>[0-9]{1,9})\.(?P<rest>.+)$")
_EXPERT = re.compile(r"(?:^|\.)experts?\.(\d+)(?:\.|$)")
# What comes before and after the numbered blocks, told by words that occur in names.
_FIRST_WORDS = ("embed", "wte", "wpe", "token_embd", "position_embd", "patch", "shared", "conv1", "conv2", "cls_token")
_HEAD_WORDS = ("head", "output", "classifier", "pooler", "score", "cls")
_NORM_WORDS = ("norm", "ln_f")
# Stacks of blocks that run before the others, and those that run after them.
_EARLY_STACKS = ("vision", "visual", "image", "audio", "encoder", "enc.")
_LATE_STACKS = ("decoder", "language", "text_model", "dec.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Tensors that compute together.

    Attributes:
        fqn: the common start of their names.
        stack: the numbered list it stands in, `model.layers`; None for what stands alone.
        tensors: their names, in the order of the checkpoint.
        nbytes: their bytes as stored.
        num_parameters: their elements.
        order: its place in execution, from 0.
        num_experts: how many experts it holds one tensor set each for; 0 if none.
    """

    fqn: str
    stack: str | None
    tensors: tuple[str, ...]
    nbytes: int
    num_parameters: int
    order: int
    num_experts: int = 0


def group_blocks(tensors: Mapping[str, TensorInfo]) -> tuple[Block, ...]:
    """Group tensors into blocks in execution order.

    Args:
        tensors: by name.

    Returns:
        Blocks: what embeds first, then each stack of numbered blocks in natural order (encoders before decoders), then
        what stands behind them.
    """
    grouped: dict[tuple[str | None, int, str], list[TensorInfo]] = {}
    start, members = "", list[TensorInfo]()
    for info in tensors.values():
        # The tensors of a block mostly follow each other, and what begins like the last one is in the same.
        if start and info.name.startswith(start) and len(info.name) > len(start):
            members.append(info)
            continue
        match = _NUMBERED.match(info.name)
        if match is not None and not match["stack"].endswith("experts"):
            key = (match["stack"], int(match["index"]), f"{match['stack']}.{match['index']}")
            start = f"{key[2]}."
        else:
            key, start = (None, 0, info.name.rpartition(".")[0] or info.name), ""
        members = grouped.setdefault(key, [])
        members.append(info)
    stacks = list(dict.fromkeys(stack for stack, _, _ in grouped if stack is not None))
    ordered = sorted(grouped, key=lambda key: (_rank(key, stacks), key[1]))
    return tuple(_block(key, grouped[key], order) for order, key in enumerate(ordered))


def tied_groups(tensors: Mapping[str, TensorInfo]) -> tuple[tuple[str, ...], ...]:
    """Names that share the very same bytes of a file, group by group (torch pickles keep ties)."""
    places: dict[tuple[object, int, int], list[str]] = {}
    for info in tensors.values():
        if info.nbytes:
            places.setdefault((info.file, info.offset, info.nbytes), []).append(info.name)
    return tuple(tuple(names) for names in places.values() if len(names) > 1)


def _rank(key: tuple[str | None, int, str], stacks: list[str]) -> tuple[int, int]:
    stack, _, fqn = key
    if stack is not None:
        early = any(word in f"{stack}." for word in _EARLY_STACKS)
        late = any(word in f"{stack}." for word in _LATE_STACKS)
        return (1, 1000 * (1 + late - early) + stacks.index(stack))
    leaf = fqn.lower()
    if any(word in leaf for word in _FIRST_WORDS):
        return (0, 0)
    is_head = any(word in leaf for word in _HEAD_WORDS) and not any(word in leaf for word in _NORM_WORDS)
    return (2, 1 if is_head else 0)


def _block(key: tuple[str | None, int, str], infos: list[TensorInfo], order: int) -> Block:
    experts = {match[1] for info in infos if "expert" in info.name and (match := _EXPERT.search(info.name))}
    return Block(
        fqn=key[2],
        stack=key[0],
        tensors=tuple(info.name for info in infos),
        nbytes=sum(info.nbytes for info in infos),
        num_parameters=sum(info.numel for info in infos),
        order=order,
        num_experts=len(experts),
    )
