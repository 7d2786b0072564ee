"""`plan`: what loading and running a model would take, before a byte of a tensor is read. torch is not imported."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loadstone.api.described import described
from loadstone.api.pause import paused_gc
from loadstone.checkpoint.excerpt import Excerpt, Select
from loadstone.checkpoint.hub_cache import HubAccess
from loadstone.checkpoint.open import open_checkpoint
from loadstone.checkpoint.resolve import Source
from loadstone.checkpoint.values import Checkpoint, TensorInfo
from loadstone.compression import can_compress
from loadstone.events import Observer, ignore
from loadstone.hardware.memory import can_show_pages, resident
from loadstone.hardware.probe import probe
from loadstone.hardware.spec import Machine
from loadstone.plan.budget import Process, checked_max_memory, device_id
from loadstone.plan.device_map import checked_map
from loadstone.plan.facts import facts_of
from loadstone.plan.make import make_plan
from loadstone.plan.units import inventory
from loadstone.plan.values import Asked, Plan, Run

if TYPE_CHECKING:
    import torch

# A process after `import torch` and a model class of transformers: 263 MB of its own and 86 MB of mapped libraries.
# Measured with torch 2.13 and transformers 5.23 on Linux, x86-64.
IMPORTS_BYTES = 350_000_000
# Measured: with less than 100 MB for them, forwards in a full control group read 0.2-0.5 GB of libraries in each pass.
PAGES_BYTES = 120_000_000

# The prompt that is planned for where none is named: a page of text.
_PROMPT_TOKENS = 512


def plan(
    source: Source,
    *,
    max_memory: Mapping[str | int, str | int] | str | None = None,
    dtype: str | torch.dtype | None = None,
    context: int = 4096,
    batch: int = 1,
    prompt_tokens: int | None = None,
    device: str | torch.device | None = None,
    device_map: str | int | torch.device | Mapping[str, str | int | torch.device] | None = None,
    offload: bool = True,
    machine: Machine | None = None,
    local_files_only: bool = False,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    prefix: str | None = None,
    select: Select | None = None,
    progress: Observer | None = None,
) -> Plan:
    """Plan a whole run: where each unit lives and computes, the peak of every device, and how long things take.

    Args:
        source: as for `loadstone.load`.
        max_memory: the most that may be used, by device: `{"cuda:0": "8GiB", "cpu": "12GiB"}`, or as one text,
            `"cuda:0=8GiB,cpu=12GiB"`; GPUs may be called by number. The others are used up to what is free.
        dtype: a torch dtype or its name; "auto" or None for as stored.
        context: tokens of prompt and answer together, of one sequence.
        batch: sequences at a time.
        prompt_tokens: of one sequence, computed in one pass; by default 512, or the context where that is shorter.
        device: the one device to compute on.
        device_map: as in transformers: "auto", a device for everything, or devices (or "disk") by the
            start of names.
        offload: whether what does not fit may be streamed; otherwise that is an error.
        machine: what to plan for, where it is not this one.
        local_files_only: never ask the network.
        revision: the branch, tag or commit of a hub id.
        token: a hub token for gated models.
        cache_dir: the hub cache, where it is not the usual one.
        subfolder: a folder inside the source, such as a component of a diffusers pipeline.
        variant: the `fp16` of files named `model.fp16.safetensors`.
        prefix: only the tensors whose names begin with it, without it: one model of a file that holds several.
        select: only tensors whose names (without the prefix) match a shell pattern, one of several, or a function of
            the name.
        progress: is called with the events of `loadstone.events`.

    Returns:
        The fastest plan that keeps within every budget.

    Raises:
        DoesNotFit: there is none; it names what is missing and has the alternatives that do fit.
        SourceError: there is no such source.
        DeviceUnavailable: a device that the machine does not have.
        ValueError: an argument means nothing, or contradicts another.
    """
    access = HubAccess(
        revision=revision,
        local_files_only=local_files_only,
        token=token,
        cache_dir=None if cache_dir is None else Path(cache_dir),
    )
    excerpt = Excerpt(subfolder=subfolder or "", variant=variant, prefix=prefix, select=select)
    with paused_gc():
        checkpoint = _opened(source, access, excerpt, progress or ignore)
        planned_for = machine or probe(checkpoint.root)
        default_prompt = min(_PROMPT_TOKENS, context) if isinstance(context, int) else _PROMPT_TOKENS
        asked = Asked(
            run=Run(
                context=context, batch=batch, prompt_tokens=default_prompt if prompt_tokens is None else prompt_tokens
            ),
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
            max_memory=checked_max_memory(max_memory, planned_for),
            device=None if device is None else device_id(str(device), planned_for),
            device_map=checked_map(device_map, planned_for),
            offload=offload,
        )
        return make_plan(checkpoint, planned_for, asked, process_at_hand(machine is None), _called(source))


def tensors_by_unit(source: Source, made: Plan, access: HubAccess, excerpt: Excerpt) -> dict[str, list[TensorInfo]]:
    """The tensors of each unit of a plan, by the unit's name.

    Args:
        source: what the plan was made for.
        made: the plan.
        access: how the hub may be used.
        excerpt: which part of the source the plan was made for.
    """
    checkpoint = _opened(source, access, excerpt, ignore)
    found = inventory(checkpoint, facts_of(checkpoint.config), made.dtype)
    units = found.placed([placement.unit for placement in made.placements])
    return {name: [checkpoint.tensors[tensor] for tensor in unit.tensors] for name, unit in units.items()}


def _opened(source: Source, access: HubAccess, excerpt: Excerpt, observer: Observer) -> Checkpoint:
    return described(
        open_checkpoint(
            source,
            revision=access.revision,
            local_files_only=access.local_files_only,
            hub=access,
            observer=observer,
            excerpt=excerpt,
        )
    )


def process_at_hand(is_here: bool) -> Process:
    """What this process takes of the host, or will once it has imported what a model needs.

    Args:
        is_here: it is this machine that is planned for, so that what is imported already is missing from its free
            memory.
    """
    known = Process(
        pages_bytes=PAGES_BYTES,
        shows_pages=not is_here or can_show_pages(),
        compresses=can_compress(),
    )
    if not (is_here and "torch" in sys.modules and "transformers" in sys.modules):
        return replace(known, level_bytes=IMPORTS_BYTES)
    now = resident()
    return replace(known, level_bytes=now.anonymous_bytes + now.file_bytes, is_taken=True)


def _called(source: Source) -> str:
    """The source as people call it."""
    return str(source) if isinstance(source, str | Path) else ", ".join(str(part) for part in source)
