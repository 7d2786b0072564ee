"""How llama.cpp's converter laid a tensor out differently from transformers, as data, and how to undo it.

What undoes it takes numpy's arrays and torch's tensors alike.

Source: https://github.com/ggml-org/llama.cpp/tree/master/conversion (modify_tensors of each model)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

# Of numpy or of torch.
Array = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpermuteHeads:
    """Rows of each of `num_heads` heads are pairs (x0, y0, x1, y1, ...); transformers wants halves (x..., y...)."""

    num_heads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AddConstant:
    """A constant was folded in; add `value` to take it out again (norms stored as `weight + 1`: -1)."""

    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Transpose:
    """The last two dimensions are swapped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsqueeze:
    """Dimension `dim`, of size one, was dropped; unless the array has `ndim` dimensions and kept it."""

    dim: int
    ndim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LogNegate:
    """Stored is `-exp(x)`; transformers wants x."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupQkv:
    """Stored are all queries, all keys, all values; transformers wants them by key-value head: queries, key, value."""

    num_heads: int
    num_kv_heads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupHeads:
    """Value heads lie tiled (all first ones of each key head, all second ones, ...); transformers has them by key head.

    Attributes:
        num_groups: the key heads.
        heads_per_group: value heads of each.
        head_dim: the entries of a value head along `dim`.
        dim: the dimension they lie along.
        offset: entries of `dim` in front of them, which stay.
    """

    num_groups: int
    heads_per_group: int
    head_dim: int = 1
    dim: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Several differences, undone in this order."""

    layouts: tuple[Layout, ...]


Layout = UnpermuteHeads | AddConstant | Transpose | Unsqueeze | LogNegate | GroupQkv | GroupHeads | Chain


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A slice of the parameter: entries `start`, `start + step`, ... below `stop` of dimension `dim`."""

    dim: int
    start: int
    stop: int
    step: int = 1

    @property
    def index(self) -> tuple[slice, ...]:
        """The index that takes this part from the parameter (from a numpy array or a torch tensor)."""
        return (slice(None),) * self.dim + (slice(self.start, self.stop, self.step),)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTarget:
    """Where a GGUF tensor belongs.

    Attributes:
        name: the fqn of the parameter.
        layout: how the decoded array differs from it, or None.
        part: the slice of the parameter that it fills after its layout is undone, or None for all of it.
    """

    name: str
    layout: Layout | None = None
    part: Part | None = None


def apply_layout(layout: Layout | None, array: Array) -> Array:
    """Undo a layout.

    Args:
        layout: the difference, or None.
        array: the decoded tensor, in the shape that the GGUF header gives.

    Returns:
        The array as transformers has it: a view of `array` where that is possible, else a new array.
    """
    return array if layout is None else _UNDO[type(layout)](layout, array)


def _unpermute_heads(layout: UnpermuteHeads, array: Array) -> Array:
    half = array.shape[0] // layout.num_heads // 2
    return array.reshape(layout.num_heads, half, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _group_qkv(layout: GroupQkv, array: Array) -> Array:
    heads, groups = layout.num_heads, layout.num_kv_heads
    split = np.arange(array.shape[0]).reshape(heads + 2 * groups, -1)
    queries = split[:heads].reshape(groups, heads // groups, -1)
    keys, values = split[heads : heads + groups, None], split[heads + groups :, None]
    return array[np.concatenate((queries, keys, values), axis=1).reshape(-1)]


def _group_heads(layout: GroupHeads, array: Array) -> Array:
    entries = np.arange(array.shape[layout.dim])
    head, tail = entries[: layout.offset], entries[layout.offset :]
    grouped = tail.reshape(layout.heads_per_group, layout.num_groups, layout.head_dim).swapaxes(0, 1).reshape(-1)
    return array[(slice(None),) * layout.dim + (np.concatenate((head, grouped)),)]


def _chain(layout: Chain, array: Array) -> Array:
    for step in layout.layouts:
        array = apply_layout(step, array)
    return array


_UNDO: dict[type, Callable[[Any, Array], Array]] = {
    UnpermuteHeads: _unpermute_heads,
    AddConstant: lambda layout, array: array + layout.value,
    Transpose: lambda layout, array: array.swapaxes(-1, -2),
    Unsqueeze: lambda layout, array: array.reshape(shape_without(layout, array.shape)),
    LogNegate: lambda layout, array: np.log(-array),
    GroupQkv: _group_qkv,
    GroupHeads: _group_heads,
    Chain: _chain,
}


def computes(layout: Layout | None) -> bool:
    """Whether undoing a layout computes new values, for which float32 is wanted, instead of only moving them."""
    if isinstance(layout, Chain):
        return any(computes(step) for step in layout.layouts)
    return isinstance(layout, AddConstant | LogNegate)


def moves_rows(layout: Layout | None) -> bool:
    """Whether undoing a layout changes the order of entries of the first dimension, and nothing else."""
    return isinstance(layout, UnpermuteHeads | GroupQkv) or (isinstance(layout, GroupHeads) and layout.dim == 0)


def ordering_bytes(layout: Layout | None, index: tuple[slice, ...] | None, nbytes: int, numel: int) -> int:
    """What it takes beside a tensor to put it in order where it arrives as stored (`loadstone.stream.expand`).

    Args:
        layout: the difference, or None.
        index: the slice of the parameter that it fills, or None.
        nbytes: of the stored tensor.
        numel: its elements.
    """
    if moves_rows(layout):
        return 2 * nbytes  # as stored, before and after
    if layout is None and (index is None or (len(index) < 3 and index[-1].step in (None, 1))):
        return 0  # straight to its place, or entry by entry
    # In float32 at most: before, after, and between two steps.
    return 4 * numel * (3 if isinstance(layout, Chain) else 2)


def is_exact(layout: Layout | None) -> bool:
    """Whether undoing a layout gives the same bits wherever it is done; a logarithm is each library's own."""
    if isinstance(layout, Chain):
        return all(map(is_exact, layout.layouts))
    return not isinstance(layout, LogNegate)


def shape_without(layout: Layout | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor once its layout is undone.

    Args:
        layout: the difference, or None.
        shape: as the GGUF header gives it.
    """
    match layout:
        case Transpose():
            return (*shape[:-2], shape[-1], shape[-2])
        case Unsqueeze() if len(shape) != layout.ndim:
            dim = layout.dim % (len(shape) + 1)
            return (*shape[:dim], 1, *shape[dim:])
        case Chain():
            for step in layout.layouts:
                shape = shape_without(step, shape)
    return shape
