"""Do the tensors and the places fit together? Every fault is named, with the nearest name that would have fitted."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod

from loadstone.architecture.keymap import Assignment, KeyMap, list_names, unwrap_prefix
from loadstone.architecture.skeleton import Slot
from loadstone.checkpoint.values import Checkpoint, TensorInfo
from loadstone.errors import CheckpointMismatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What is tolerated.

    Attributes:
        where: the source, for messages.
        strict: faults are errors.
        allow_missing: names or shell patterns that may be missing all the same.
    """

    where: str
    strict: bool
    allow_missing: tuple[str, ...] = ()


def unwrapped(checkpoint: Checkpoint, slots: Mapping[str, Slot], base_prefix: str) -> Checkpoint:
    """Drop what a wrapper put in front of every name (`module.`, `_orig_mod.`), if more names fit without it.

    Args:
        checkpoint: as opened.
        slots: the module's places.
        base_prefix: what a base model's names lack or have in front, "" if nothing.

    Returns:
        The checkpoint, renamed and with a note, or as it was.
    """
    dotted = f"{base_prefix}." if base_prefix else ""

    def accepts(name: str) -> bool:
        return name in slots or dotted + name in slots or name.removeprefix(dotted) in slots

    prefix, gain = unwrap_prefix(checkpoint.tensors, accepts)
    if gain <= 0:
        return checkpoint
    return replace(
        checkpoint,
        tensors={name.removeprefix(prefix): info for name, info in checkpoint.tensors.items()},
        notes=(
            *checkpoint.notes,
            f'every tensor name began with "{prefix}", which a wrapper left there; it was dropped',
        ),
    )


def check_assignments(keymap: KeyMap, slots: Mapping[str, Slot], checkpoint: Checkpoint, rules: Rules) -> KeyMap:
    """Check names and shapes of a key map before a byte is read.

    Args:
        keymap: the mapping.
        slots: the module's places.
        checkpoint: its tensors.
        rules: what is tolerated.

    Returns:
        The key map without mismatched assignments (with `strict` there are none).

    Raises:
        CheckpointMismatch: nothing fits at all, or a shape does not and `strict` is on.
    """
    if not keymap.assignments and not keymap.conversions:
        raise CheckpointMismatch(
            f"{rules.where}: none of its {len(checkpoint.tensors):,} tensors belongs to the module; found "
            f"{list_names(list(checkpoint.tensors), limit=3)}, expected {list_names(list(slots), limit=3)}. "
            "Check that the config and the class belong to these weights, or pass rename=.",
            missing=tuple(slots),
            unexpected=tuple(checkpoint.tensors),
        )
    fitting, faults = [], []
    for assignment in keymap.assignments:
        fault = _shape_fault(assignment, slots[assignment.target], checkpoint.tensors)
        if fault is None:
            fitting.append(assignment)
        else:
            faults.append(fault)
    if faults and rules.strict:
        raise CheckpointMismatch(
            f"{rules.where}: {len(faults)} tensors have another shape than the module expects: "
            f"{list_names(faults, limit=4)}. Use the config that belongs to these weights, or pass strict=False.",
            mismatched=tuple(faults),
        )
    notes = (*keymap.notes, *(f"left out, wrong shape: {fault}" for fault in faults))
    return replace(keymap, assignments=tuple(fitting), notes=notes)


def _shape_fault(assignment: Assignment, slot: Slot, tensors: Mapping[str, TensorInfo]) -> str | None:
    if len(assignment.parts) == 1:
        part = assignment.parts[0]
        found = tensors[part.source].shape
        rearranged = part.layout is not None and prod(found) == prod(slot.shape)
        if found == slot.shape or rearranged:
            return None
        return f"{assignment.target} (expected {list(slot.shape)}, found {list(found)} in {part.source})"
    total = sum(tensors[part.source].numel for part in assignment.parts)
    if total == prod(slot.shape):
        return None
    return (
        f"{assignment.target} (expected {list(slot.shape)}, found {len(assignment.parts)} parts of {total:,} elements)"
    )


def check_unexpected(names: Sequence[str], slots: Collection[str], rules: Rules) -> tuple[str, ...]:
    """Left-over tensors are an error, or a note.

    Returns:
        Notes.

    Raises:
        CheckpointMismatch: there are some and `strict` is on.
    """
    if not names:
        return ()
    if rules.strict:
        raise CheckpointMismatch(
            f"{rules.where}: {len(names)} tensors belong to nothing in the module: {list_names(names, slots)}. "
            "Choose the class they belong to with architecture=, or pass strict=False to leave them out.",
            unexpected=tuple(names),
        )
    return (f"{len(names)} tensors belong to nothing in the module and were left out: {list_names(names)}",)


def check_missing(names: Collection[str], unused: Collection[str], rules: Rules) -> tuple[str, ...]:
    """Places that stay empty are an error, or a note.

    Args:
        names: the empty places.
        unused: left-over tensors, among which a misspelt one may be.
        rules: what is tolerated.

    Returns:
        Notes.

    Raises:
        CheckpointMismatch: one is missing that may not be.
    """
    faults = sorted(name for name in names if not any(fnmatchcase(name, pattern) for pattern in rules.allow_missing))
    if faults and rules.strict:
        raise CheckpointMismatch(
            f"{rules.where}: {len(faults)} parameters are in no file: {list_names(faults, unused)}. Loading would "
            "leave them random; use the files that belong to the model, or name them in allow_missing=.",
            missing=tuple(faults),
            unexpected=tuple(unused),
        )
    if not names:
        return ()
    return (f"{len(names)} parameters are in no file and were initialised by their class: {list_names(sorted(names))}",)
