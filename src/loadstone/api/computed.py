"""What only torch can compute of parts that are streamed: computed once, then read from a file of the cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from loadstone.architecture.keymap import Assignment, Conversion, KeyMap, Part, Target
from loadstone.architecture.skeleton import Slot
from loadstone.checkpoint.cache import cache_folder
from loadstone.checkpoint.files import version_of
from loadstone.checkpoint.safetensors import read_safetensors
from loadstone.checkpoint.values import Checkpoint, CheckpointFile
from loadstone.checkpoint.write import NewTensor
from loadstone.dtypes import DTYPES
from loadstone.errors import DestinationError, LoadstoneError
from loadstone.execute.streamed import unit_of_name
from loadstone.execute.values import Streaming
from loadstone.stream.computed_file import ComputedFiles, InUse
from loadstone.stream.materialize import torch_dtype
from loadstone.units import format_bytes, parse_bytes

LIMIT_VARIABLE = "LOADSTONE_COMPUTED_LIMIT"
_LIMIT = "200GB"
# Files that an older version wrote are not found.
_VERSION = 1
# In front of the names of computed tensors: no checkpoint's name begins so.
_PREFIX = "computed:"

MakeTensor = Callable[[str, str | None], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a load knows before its tensors are made.

    Attributes:
        checkpoint: where they come from.
        keymap: what fills what.
        targets: shape and dtype of what is assigned, by fqn.
        streaming: which of it is streamed.
        notes: for the report.
        in_use: the file of computed weights; it must stay open for as long as the model lives.
    """

    checkpoint: Checkpoint
    keymap: KeyMap
    targets: Mapping[str, Target]
    streaming: Streaming
    notes: tuple[str, ...] = ()
    in_use: InUse | None = None


@dataclass(frozen=True, slots=True)
class _Recipe:
    """A conversion, and what comes out of it."""

    conversion: Conversion
    makes: tuple[NewTensor, ...]


def with_computed(known: Known, slots: Mapping[str, Slot], belongs_to: Any, make: MakeTensor) -> Known:
    """Have what torch computes of streamed parts read from a file, which is written now if there is none.

    Args:
        known: before.
        slots: the places of the module.
        belongs_to: the class of the model and its config, as JSON can tell them: conversions may look at them.
        make: gives a tensor of the checkpoint in a dtype.

    Returns:
        The same, with assignments in place of conversions; or as it was, with a note, where no file can be written.
    """
    wanted = [one for one in known.keymap.conversions if _is_streamed(one, known.streaming)]
    recipes = [recipe for one in wanted if (recipe := _foretold(one, known.checkpoint, slots)) is not None]
    if not recipes:
        return known
    files = ComputedFiles(cache_folder() / "computed", _limit_bytes())
    key = _key(recipes, known.checkpoint, belongs_to)
    found, how = files.find(key), "found in"
    if found is None:
        tensors = [tensor for recipe in recipes for tensor in recipe.makes]
        try:
            found, how = files.write(key, tensors, _values(recipes, make)), "computed once, and kept in"
        except DestinationError as error:
            return replace(known, notes=(*known.notes, f"computed weights are kept in memory: {error}"))
    return _from_file(known, recipes, found, how)


def _limit_bytes() -> int:
    return parse_bytes(os.environ.get(LIMIT_VARIABLE) or _LIMIT, option=LIMIT_VARIABLE)


def _is_streamed(conversion: Conversion, streaming: Streaming) -> bool:
    if streaming.unit_of:
        return any(source in streaming.unit_of for source in conversion.sources)
    return unit_of_name(conversion.name, streaming) is not None


def _foretold(conversion: Conversion, checkpoint: Checkpoint, slots: Mapping[str, Slot]) -> _Recipe | None:
    """What a conversion will make, from shapes alone; None where those do not tell, or the module wants another."""
    infos = [checkpoint.tensors[name] for name in conversion.sources]
    try:
        made = conversion.run(
            [
                torch.empty(info.shape, dtype=torch_dtype(dtype or info.dtype), device="meta")
                for info, dtype in zip(infos, conversion.dtypes, strict=True)
            ]
        )
    except (LoadstoneError, RuntimeError, NotImplementedError):
        return None  # it looks at values
    if not all(fqn in slots and slots[fqn].shape == tuple(tensor.shape) for fqn, tensor in made.items()):
        return None  # the load will say so
    makes = []
    for fqn, tensor in made.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES or DTYPES[dtype].safetensors is None:
            return None
        makes.append(NewTensor(name=fqn, dtype=dtype, shape=tuple(tensor.shape)))
    return _Recipe(conversion, tuple(makes))


def _key(recipes: Sequence[_Recipe], checkpoint: Checkpoint, belongs_to: Any) -> str:
    """A name for what comes out: which bytes of which files go in, and what is done with them."""
    import transformers

    files = {file.path: file.version for file in checkpoint.files}
    said: list[Any] = [_VERSION, torch.__version__, transformers.__version__, belongs_to]
    for recipe in recipes:
        said.append([recipe.conversion.name, recipe.conversion.dtypes, [str(tensor) for tensor in recipe.makes]])
        for name in recipe.conversion.sources:
            info = checkpoint.tensors[name]
            # Not the path: the same file may be reached by several. Of one that was changed, the version differs.
            version = files[info.file]
            identity = (version.inode, version.nbytes, version.mtime_ns) if version is not None else str(info.file)
            said.append([name, info.dtype, info.shape, info.offset, info.nbytes, info.encoding, identity])
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def _values(recipes: Sequence[_Recipe], make: MakeTensor) -> Iterator[dict[str, torch.Tensor]]:
    for recipe in recipes:
        sources = [make(*pair) for pair in zip(recipe.conversion.sources, recipe.conversion.dtypes, strict=True)]
        yield dict(recipe.conversion.run(sources))


def _from_file(known: Known, recipes: Sequence[_Recipe], found: InUse, how: str) -> Known:
    tensors, _ = read_safetensors(found.path)
    version = version_of(found.path.stat())
    file = CheckpointFile(path=found.path, nbytes=version.nbytes, version=version)
    targets, added, assignments = dict(known.targets), {}, list(known.keymap.assignments)
    for one in (one for recipe in recipes for one in recipe.makes):
        name = f"{_PREFIX}{one.name}"
        added[name] = replace(tensors[one.name], name=name)
        assignments.append(Assignment(target=one.name, parts=(Part(source=name),)))
        targets[one.name] = Target(shape=one.shape, dtype=one.dtype)
    done = {recipe.conversion.name for recipe in recipes}
    left = tuple(one for one in known.keymap.conversions if one.name not in done)
    nbytes = sum(info.nbytes for info in added.values())
    note = f"{format_bytes(nbytes)} that torch has to compute were {how} {found.path}"
    checkpoint = known.checkpoint
    return Known(
        checkpoint=replace(checkpoint, files=(*checkpoint.files, file), tensors={**checkpoint.tensors, **added}),
        keymap=replace(known.keymap, assignments=tuple(assignments), conversions=left),
        targets=targets,
        streaming=_streaming(known.streaming, recipes),
        notes=(*known.notes, note),
        in_use=found,
    )


def _streaming(streaming: Streaming, recipes: Sequence[_Recipe]) -> Streaming:
    """The same, said of what is computed instead of what goes in."""
    unit_of, experts, in_memory = dict(streaming.unit_of), set(streaming.expert_tensors), set(streaming.in_memory)
    for recipe in recipes:
        names, sources = {f"{_PREFIX}{one.name}" for one in recipe.makes}, recipe.conversion.sources
        unit = next((unit_of[source] for source in sources if source in unit_of), None)
        if unit is not None:
            unit_of |= dict.fromkeys(names, unit)
        if experts.intersection(sources):
            experts |= names
        if in_memory.issuperset(sources):
            in_memory |= names
    return replace(streaming, unit_of=unit_of, expert_tensors=frozenset(experts), in_memory=frozenset(in_memory))
