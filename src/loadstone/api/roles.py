"""What the model class says of a checkpoint's tensors: which keep a dtype of their own, and which are made by ties."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from loadstone.architecture.blueprint import Surroundings
from loadstone.architecture.match import unwrapped
from loadstone.architecture.skeleton import slots_of
from loadstone.architecture.transformers import Wanted, describe
from loadstone.architecture.transformers_model import TransformersModel
from loadstone.checkpoint.values import Checkpoint
from loadstone.plan.choose import check_counts
from loadstone.plan.conversion import Roles, spare_of
from loadstone.stream.materialize import torch_dtype


def roles_of(checkpoint: Checkpoint, dtype: str) -> Roles:
    """Ask the class that the config names, on meta; nothing is read, and no code of the checkpoint runs.

    Args:
        checkpoint: with its config.
        dtype: torch's name of the dtype of the model as a whole.

    Raises:
        LoadstoneError: no class can be built from the config.
    """
    config = checkpoint.config or {}
    check_counts(config, checkpoint)
    blueprint = TransformersModel(described=describe(config, Wanted(root=checkpoint.root, name=str(checkpoint.root))))
    module = blueprint.build(torch_dtype(dtype))
    slots = slots_of(module)
    renamed = unwrapped(checkpoint, slots, getattr(module, "base_model_prefix", ""))
    dtypes = blueprint.dtypes(module, slots, dtype)
    keymap = blueprint.map_keys(
        module, Surroundings(checkpoint=renamed, slots=slots, dtypes=dtypes, source=_refuse_to_read)
    )
    places = {part.source: entry.target for entry in keymap.assignments for part in entry.parts}
    wanted = {source: dtypes[place] for source, place in places.items()}
    for conversion in keymap.conversions:
        wanted.update(zip(conversion.sources, conversion.dtypes, strict=True))
    ties: Mapping[str, str] = getattr(module, "all_tied_weights_keys", {})
    tied = {renamed.tensors[source].name for source, place in places.items() if place in ties}
    return Roles(
        kept=frozenset(renamed.tensors[source].name for source, kept in wanted.items() if kept not in (None, dtype)),
        spare=spare_of(checkpoint.tensors.values(), tied),
    )


def _refuse_to_read(name: str) -> NoReturn:
    raise NotImplementedError(f"{name} is asked for while only its role is wanted")
