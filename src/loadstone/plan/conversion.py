"""What a checkpoint becomes when it is written anew: names, dtypes and shapes, and which stored tensors fill them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from loadstone.architecture.gguf import assignments_of, tensor_targets
from loadstone.architecture.gguf_layouts import computes, shape_without
from loadstone.architecture.keymap import Assignment, KeyMap, Part, list_names
from loadstone.architecture.meta_llama import map_whole_model
from loadstone.checkpoint.values import Checkpoint, Format, TensorInfo
from loadstone.checkpoint.write import NewTensor
from loadstone.dtypes import DTYPES
from loadstone.errors import CheckpointMismatch, UnsupportedDtype

# Narrower ones are parts of a quantisation: their values mean nothing without their scales.
_CASTABLE = ("float16", "bfloat16", "float32", "float64")
# Pairs of dtypes of which the second holds every value of the first.
_EXACT = {("float16", "float32"), ("bfloat16", "float32"), *((dtype, "float64") for dtype in _CASTABLE)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """What the model class says of tensors that are not like the others, by the names they have in the checkpoint.

    Attributes:
        kept: loaded in a dtype of their own, whatever the model as a whole is loaded in.
        spare: the same bytes as another tensor, which the class ties them to.
    """

    kept: frozenset[str] = frozenset()
    spare: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What is written.

    Attributes:
        tensors: in the order in which their bytes are read.
        assignments: what fills each, by its name.
        notes: what was noticed.
    """

    tensors: tuple[NewTensor, ...]
    assignments: Mapping[str, Assignment]
    notes: tuple[str, ...] = ()


def check_castable(checkpoint: Checkpoint, dtype: str) -> None:
    """Refuse to cast what a quantiser made.

    Raises:
        UnsupportedDtype: the config says that the weights are quantised.
    """
    quantised = (checkpoint.config or {}).get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, Mapping) else "unknown"
        raise UnsupportedDtype(
            f"{checkpoint.root / 'config.json'}: the weights are quantised ({method}); casting them or their scales to "
            f"{dtype} would change what they mean. Convert them as they are, without a dtype."
        )


def needs_roles(checkpoint: Checkpoint, dtype: str | None) -> bool:
    """Whether what the model class says can make a difference: bits would be lost, or bytes written twice."""
    if dtype is not None:
        stored = {info.dtype for info in checkpoint.tensors.values()}
        if any(kind != dtype and (kind, dtype) not in _EXACT for kind in stored & set(_CASTABLE)):
            return True
    return bool(same_bytes(checkpoint.tensors.values()))


def same_bytes(tensors: Iterable[TensorInfo]) -> list[list[str]]:
    """The names of tensors that are one and the same in a file (torch pickles), group by group."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for info in tensors:
        if info.nbytes:
            place = (info.file, info.offset, info.dtype, info.shape, info.strides)
            groups.setdefault(place, []).append(info.name)
    return [names for names in groups.values() if len(names) > 1]


def spare_of(tensors: Iterable[TensorInfo], tied: Collection[str]) -> frozenset[str]:
    """The tensors that need not be written: tied ones whose bytes are written under another name.

    Args:
        tensors: of the checkpoint.
        tied: the names that the class fills from others.
    """
    spare: set[str] = set()
    for group in same_bytes(tensors):
        own = next((name for name in group if name not in tied), group[0])
        spare.update(name for name in group if name in tied and name != own)
    return frozenset(spare)


def plan_conversion(checkpoint: Checkpoint, dtype: str | None, roles: Roles) -> Conversion:
    """Say what is written.

    Args:
        checkpoint: what is read; with its config, if its headers imply one.
        dtype: torch's name of the dtype that floating-point tensors are cast to; None leaves each as it is stored, and
            decodes blocks to float32.
        roles: what the class says of its tensors.

    Raises:
        CheckpointMismatch: tensors of GGUF or of Meta's layout that have no place, or that leave a part of one empty.
        MissingShard: the slices of a rank are missing.
    """
    keymap = _keymap(checkpoint, roles)
    return Conversion(
        tensors=tuple(_new_tensor(entry, checkpoint.tensors, dtype, roles.kept) for entry in keymap.assignments),
        assignments={entry.target: entry for entry in keymap.assignments},
        notes=(*keymap.notes, *_notes(checkpoint, dtype, roles)),
    )


def _keymap(checkpoint: Checkpoint, roles: Roles) -> KeyMap:
    if checkpoint.format is Format.GGUF:
        return KeyMap(assignments=assignments_of(checkpoint, tensor_targets(checkpoint, checkpoint.config or {})))
    if checkpoint.params is not None:
        return map_whole_model(checkpoint)
    names = [name for name in checkpoint.tensors if name not in roles.spare]
    return KeyMap(assignments=tuple(Assignment(target=name, parts=(Part(source=name),)) for name in names))


def _notes(checkpoint: Checkpoint, dtype: str | None, roles: Roles) -> Iterable[str]:
    yield from checkpoint.notes
    kept = sorted(name for name in roles.kept if dtype is not None and _can_be_cast(checkpoint.tensors[name], dtype))
    if kept:
        yield f"{len(kept)} tensors stay as stored, because their class keeps them in a dtype of their own: " + _some(
            kept
        )
    narrow = [
        info.name
        for info in checkpoint.tensors.values()
        if dtype is not None and DTYPES[info.dtype].floating and info.dtype not in _CASTABLE
    ]
    if narrow:
        kind = checkpoint.tensors[narrow[0]].dtype
        yield f"{len(narrow)} tensors stay as stored, because {kind} means nothing without its scales: {_some(narrow)}"
    if checkpoint.config is None:
        yield f"{checkpoint.root} holds no config.json; the result has none either, so that it loads only with into="
    if code := (checkpoint.config or {}).get("auto_map"):
        yield f"config.json names code of the checkpoint's own ({', '.join(map(str, code))}), which was not copied"
    if roles.spare:
        yield f"{len(roles.spare)} tied tensors are written once, under their first name: {_some(sorted(roles.spare))}"


def _some(names: Sequence[str]) -> str:
    return list_names(names, limit=3)


def _can_be_cast(info: TensorInfo, dtype: str) -> bool:
    return info.dtype in _CASTABLE and info.dtype != dtype


def _new_tensor(
    entry: Assignment, tensors: Mapping[str, TensorInfo], dtype: str | None, kept: Collection[str]
) -> NewTensor:
    infos = [tensors[part.source] for part in entry.parts]
    stored = {info.dtype for info in infos}
    # What is computed, or made of tensors of several dtypes, is made in float32.
    found = "float32" if len(stored) > 1 or any(computes(part.layout) for part in entry.parts) else infos[0].dtype
    casts = dtype is not None and found in _CASTABLE and not any(info.name in kept for info in infos)
    return NewTensor(name=entry.target, dtype=dtype if casts and dtype else found, shape=_shape(entry, infos))


def _shape(entry: Assignment, infos: Sequence[TensorInfo]) -> tuple[int, ...]:
    """The shape of a tensor that parts fill; all of it must be filled."""
    shapes = [shape_without(part.layout, info.shape) for part, info in zip(entry.parts, infos, strict=True)]
    if len(entry.parts) == 1 and entry.parts[0].index is None:
        return shapes[0]
    whole = list(shapes[0])
    filled = 0
    for part, shape in zip(entry.parts, shapes, strict=True):
        dim = 0 if part.index is None else len(part.index) - 1
        if len(shape) != len(whole) or len(shape) <= dim:
            raise _unfilled(entry)
        # Stretches follow one another in the order of the parts; slices lie where their index says.
        if part.index is None and part.start != filled * prod(shape[1:]):
            raise _unfilled(entry)
        filled += shape[dim]
        whole[dim] = max(whole[dim], filled if part.index is None else part.index[-1].stop)
    if filled != whole[dim]:
        raise _unfilled(entry)
    return tuple(whole)


def _unfilled(entry: Assignment) -> CheckpointMismatch:
    names = ", ".join(part.source for part in entry.parts)
    return CheckpointMismatch(
        f"{entry.target}: expected tensors that fill all of it, found only {names}; the file is not a complete model.",
        missing=(entry.target,),
    )
