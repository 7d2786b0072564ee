"""transformers' conversion mapping, applied to names once and turned into Loadstone's key map.

transformers copies a converter object per checkpoint key and stacks expert tensors in new memory; here the common case,
experts that are stacked and gate and up projections that are joined, becomes slices of the final tensor that the reader
fills directly, and only what really computes runs transformers' operations.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from math import prod
from typing import Any

from transformers import PreTrainedModel, conversion_mapping
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from loadstone.architecture.blueprint import Surroundings
from loadstone.architecture.keymap import Assignment, Conversion, KeyMap, Part
from loadstone.errors import CheckpointMismatch

_Rename = Callable[[str], tuple[str, str | None]]
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(slots=True)
class _Group:
    """The checkpoint tensors that one converter turns into one target, by source pattern, in natural order."""

    converter: Any
    sources: dict[str, list[str]] = field(default_factory=dict)


def map_keys(model: Any, around: Surroundings) -> KeyMap:
    """Map checkpoint names to the model's places through transformers' conversion mapping.

    Args:
        model: the transformers model on meta.
        around: checkpoint and places.

    Returns:
        The key map; names that nothing takes are in `unexpected`.
    """
    if _fits_as_it_is(model, around):
        model._weight_conversions = []
        return KeyMap(
            assignments=tuple(Assignment(target=name, parts=(Part(source=name),)) for name in around.checkpoint.tensors)
        )
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    copies, groups, unexpected = _by_target(model, around, renamings, converters)
    model._weight_conversions = [entry for entry in transforms if entry.was_used()]
    assignments = [Assignment(target=target, parts=(Part(source=name),)) for target, name in copies.items()]
    fused = {target: _as_parts(around, target, group) for target, group in groups.items()}
    assignments += [Assignment(target=target, parts=parts) for target, parts in fused.items() if parts is not None]
    conversions = [
        _as_conversion(model, around, target, groups[target]) for target, parts in fused.items() if not parts
    ]
    return KeyMap(assignments=tuple(assignments), conversions=tuple(conversions), unexpected=tuple(unexpected))


def _by_target(
    model: Any, around: Surroundings, renamings: list[Any], converters: list[Any]
) -> tuple[dict[str, str], dict[str, _Group], list[str]]:
    """Sort the checkpoint's names: those that fill a place as they are, those a converter takes, and the others."""
    copies: dict[str, str] = {}
    groups: dict[str, _Group] = {}
    unexpected: list[str] = []
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    # The order is part of the contract: experts are stacked in natural order, and some renamings are stateful.
    rename = _remembering_experts(_renamer(model.base_model_prefix, around, renamings, converters))
    for name in sorted(around.checkpoint.tensors, key=_natural_key):
        target, pattern = rename(name)
        if target not in around.slots:
            unexpected.append(name)
        elif pattern is None:
            copies.setdefault(target, name)
        else:
            group = groups.setdefault(target, _Group(converter=by_pattern[pattern]))
            group.sources.setdefault(pattern, []).append(name)
    return copies, groups, unexpected


def _natural_key(name: str) -> Any:
    """transformers' order of names; where it takes digits for a number that is none (`²`, 5,000 digits), a text's."""
    try:
        return dot_natural_key(name)
    except ValueError:
        return [(1, part) for part in name.split(".")]


def _fits_as_it_is(model: Any, around: Surroundings) -> bool:
    """Whether every name is already a place of the model and no conversion can be registered for its classes.

    transformers compiles the regular expressions of all its families to answer for one, which takes longer than the
    rest of a load of mapped weights. The names that have conversions are constants of the function that builds them;
    were one missed, its conversion would have to give tensors their own names to go unnoticed.
    """
    if not all(name in around.slots for name in around.checkpoint.tensors):
        return False
    known = conversion_mapping.USER_REGISTERED_MAPPINGS | _converted_families()
    return not any(
        {type(module).__name__, module.config.model_type} & known
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
    )


@functools.cache
def _converted_families() -> frozenset[str]:
    """The model types and class names that may have conversions, and other strings, which do no harm."""
    constants = conversion_mapping._build_checkpoint_conversion_mapping.__code__.co_consts
    names = {name for constant in constants for name in (constant if isinstance(constant, tuple) else (constant,))}
    return frozenset(name for name in names if isinstance(name, str)) | set(
        conversion_mapping._MODEL_TO_CONVERSION_PATTERN
    )


def _renamer(prefix: str, around: Surroundings, renamings: list[Any], converters: list[Any]) -> _Rename:
    def rename(name: str) -> tuple[str, str | None]:
        target, pattern = rename_source_key(name, renamings, converters, prefix, around.slots)
        if target not in around.slots and name in around.slots:
            return rename_source_key(name, [], [], prefix, around.slots)  # type: ignore[no-any-return]
        return target, pattern

    return rename


def _remembering_experts(rename: _Rename) -> _Rename:
    """Ask once for all experts of a layer: tens of thousands of names differ only in the number of the expert.

    A number that shows in the answer is noticed by asking for another expert too, and nothing is remembered then.
    """
    known: dict[tuple[str, str], tuple[str, str | None] | None] = {}

    def remembered(name: str) -> tuple[str, str | None]:
        match = _EXPERT.search(name)
        if match is None:
            return rename(name)
        head, tail = name[: match.start(1)], name[match.end(1) :]
        if (head, tail) not in known:
            answers = {rename(f"{head}{number}{tail}") for number in (0, 1)}
            known[head, tail] = answers.pop() if len(answers) == 1 else None
        return known[head, tail] or rename(name)

    return remembered


def _as_parts(around: Surroundings, target: str, group: _Group) -> tuple[Part, ...] | None:
    """Stacked experts, optionally joined along the next dimension, as contiguous stretches of the target.

    The target is `(experts, rows of all patterns, ...)`; the rows of an expert are those of its patterns in order.
    """
    operations = group.converter.operations
    infos = around.checkpoint.tensors
    stacked = [type(op) for op in operations] in ([MergeModulelist], [MergeModulelist, Concatenate])
    if not stacked or operations[0].dim != 0 or (len(operations) == 2 and operations[1].dim != 1):
        return None
    ordered = [group.sources[p] for p in group.converter.source_patterns if p in group.sources]
    num_experts = len(ordered[0])
    shapes = [infos[names[0]].shape for names in ordered]
    whole = (num_experts, sum(shape[0] for shape in shapes if shape), *shapes[0][1:])
    uniform = all(len(names) == num_experts for names in ordered) and all(
        infos[name].shape == shape for names, shape in zip(ordered, shapes, strict=True) for name in names
    )
    if (
        not uniform
        or around.slots[target].shape != whole
        or (len(operations) == 1 and len(ordered) != 1)
        or any(shape[1:] != shapes[0][1:] for shape in shapes)
    ):
        return None  # transformers' own operations decide what to make of it
    parts, start = [], 0
    for expert in range(num_experts):
        for names, shape in zip(ordered, shapes, strict=True):
            parts.append(Part(source=names[expert], start=start, shape=shape))
            start += prod(shape)
    return tuple(parts)


def _as_conversion(model: Any, around: Surroundings, target: str, group: _Group) -> Conversion:
    patterns = [(pattern, name) for pattern, names in group.sources.items() for name in names]

    def run(tensors: Sequence[Any]) -> Mapping[str, Any]:
        converter = deepcopy(group.converter)
        for (pattern, name), tensor in zip(patterns, tensors, strict=True):
            converter.add_tensor(target, name, pattern, _given(tensor))
        try:
            made = converter.convert(target, model=model, config=model.config)
        except (ValueError, RuntimeError, TypeError, KeyError, IndexError) as error:
            names = ", ".join(name for _, name in patterns[:4])
            raise CheckpointMismatch(
                f"{target}: transformers' conversion of {names} failed: {' '.join(str(error).split())}"
            ) from error
        return {fqn: value[0] if isinstance(value, list) else value for fqn, value in made.items()}

    return Conversion(
        name=target,
        sources=tuple(name for _, name in patterns),
        # transformers casts before it converts, to the dtype of the first target.
        dtypes=(around.dtypes[target],) * len(patterns),
        run=run,
    )


def _given(tensor: Any) -> Callable[[], Any]:
    return lambda: tensor
