"""`load`: the first half, without torch. Headers are read and bytes set in motion before anything heavy is imported."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.api.begun import Begun, Request
from loadstone.api.described import described
from loadstone.api.pause import paused_gc
from loadstone.api.planned import (
    Wishes,
    asks_torch,
    carried,
    plan_line,
    planned,
    planned_with_torch,
)
from loadstone.api.registry import Loaded, remember
from loadstone.architecture.gguf import tensor_targets
from loadstone.architecture.keymap import RenameRules
from loadstone.checkpoint.cache import cache_folder
from loadstone.checkpoint.excerpt import Excerpt, Select
from loadstone.checkpoint.files import check_unchanged
from loadstone.checkpoint.hub_cache import HubAccess
from loadstone.checkpoint.open import open_checkpoint
from loadstone.checkpoint.packed import in_torch_pairs
from loadstone.checkpoint.resolve import Source
from loadstone.checkpoint.values import Checkpoint, Format, TensorInfo
from loadstone.dtypes import DTYPES
from loadstone.errors import InvalidConfig
from loadstone.events import Observer, Recorder, ignore
from loadstone.execute.values import States, Streaming
from loadstone.hardware.memory import PeakWatch, host_memory, resident
from loadstone.hardware.openmp import sleeping_waits
from loadstone.hardware.probe import may_have_accelerator
from loadstone.plan.choose import Choice, choose_dtype
from loadstone.plan.values import HOST, Plan
from loadstone.stream import import_files
from loadstone.stream.host import Ahead
from loadstone.units import format_bytes, format_count

if TYPE_CHECKING:
    import torch
    from torch import nn

# The part of free memory that mapped files may be brought into: beyond it they would push out each other.
_PREFAULT_SHARE = 0.8


def load(
    source: Source,
    *,
    architecture: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    plan: Plan | None = None,
    max_memory: Mapping[str | int, str | int] | str | None = None,
    device_map: str | int | torch.device | Mapping[str, str | int | torch.device] | None = None,
    context: int | None = None,
    batch: int | None = None,
    prompt_tokens: int | None = None,
    offload: bool = True,
    states: States | None = None,
    local_files_only: bool = False,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    prefix: str | None = None,
    select: Select | None = None,
    trust_remote_code: bool = False,
    strict: bool = True,
    allow_missing: Collection[str] = (),
    progress: Observer | None = None,
    into: Callable[..., nn.Module] | None = None,
    config: Mapping[str, Any] | None = None,
    rename: RenameRules | None = None,
    convert: Callable[..., Any] | None = None,
) -> nn.Module:
    """Load a model, ready to use: in eval mode, ties, buffers and generation config in place.

    Args:
        source: a folder in Hugging Face layout or Meta's, a weight file (.safetensors, .gguf, .bin, .pt, .pth, .ckpt),
            a list of weight files that are one checkpoint, or a hub id. Complete local or cached files are used without
            a network call.
        architecture: the name of a transformers class, `"LlamaModel"` or `"AutoModelForCausalLM"`; by default what
            config.json's `architectures` says.
        dtype: a torch dtype or its name; "auto" means as stored, as in transformers; None lets Loadstone choose, which
            is as stored for now (float32 for GGUF blocks).
        device: where the weights go, as torch writes it; None lets Loadstone choose.
        attn_implementation: as in transformers: "sdpa", "eager", "flash_attention_2", ...
        plan: what `loadstone.plan` gave, to be followed. Without one, and where not everything fits with ease, one is
            made from the six arguments that follow, and what does not fit is read from its files in each pass.
        max_memory: the most that may be used, by device; see `loadstone.plan`.
        device_map: as in transformers: "auto", a device for everything, or devices (or "disk") by the
            start of names.
        context: tokens of prompt and answer together, to plan memory for.
        batch: sequences at a time, to plan memory for.
        prompt_tokens: of one sequence, computed in one pass, to plan memory for.
        offload: whether what does not fit may be read in each pass; otherwise that is an error.
        states: where blocks are and in which dtypes while the model is in use, instead of a plan; the same as
            `loadstone.offload(model, states=...)` for a model whose files are mapped.
        local_files_only: never ask the network.
        revision: the branch, tag or commit of a hub id.
        token: a hub token for gated models; by default the one `hf auth login` has stored.
        cache_dir: the hub cache, where it is not the usual one.
        subfolder: a folder inside the source, such as a component of a diffusers pipeline.
        variant: the `fp16` of files named `model.fp16.safetensors`.
        prefix: only the tensors whose names begin with it, without it: one model of a file that holds several.
        select: only tensors whose names (without the prefix) match a shell pattern, one of several, or a function of
            the name. What is not selected is not read.
        trust_remote_code: run the model code that the checkpoint brings. Read it first.
        strict: a missing, left-over or mismatched tensor is an error; otherwise it is a note in the report. A load in
            which no tensor fits is always an error.
        allow_missing: names (or shell patterns) of parameters that may be missing although `strict`; they get the value
            that their class initialises them with.
        progress: is called with the events of `loadstone.events`.
        into: any `nn.Module` class, or a function that returns a module, instead of a transformers class; it is built
            without running its initialisers.
        config: the keyword arguments of `into`.
        rename: for `into`: whole names or dotted prefixes and what replaces them, or (pattern, replacement) pairs.
        convert: for `into`: takes the renamed checkpoint as a lazy mapping from names to tensors and returns the
            state dict; what it does not touch is not read.

    Returns:
        The module. `loadstone.of(model).report` tells what was done.

    Raises:
        LoadstoneError: see `loadstone.errors`; nothing is left behind.
        ValueError: an argument means nothing, or contradicts another.
    """
    request = Request(
        source=source,
        architecture=architecture,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        device=None if device is None else str(device),
        attn_implementation=attn_implementation,
        access=HubAccess(
            revision=revision,
            local_files_only=local_files_only,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            trust_remote_code=trust_remote_code,
        ),
        excerpt=Excerpt(subfolder=subfolder or "", variant=variant, prefix=prefix, select=select),
        trust_remote_code=trust_remote_code,
        strict=strict,
        allow_missing=tuple(allow_missing),
        into=into,
        config=config,
        rename=rename,
        convert=convert,
        wishes=Wishes(
            plan=plan,
            max_memory=max_memory,
            context=context,
            batch=batch,
            prompt_tokens=prompt_tokens,
            device_map=device_map,
            offload=offload,
        ),
    )
    if states is not None:
        return _in_states(request, states, progress or ignore)
    return carry_out(request, progress or ignore)


def _in_states(request: Request, states: States, observer: Observer) -> nn.Module:
    """Load without a plan, to the host, where files are mapped and nothing is read that is not used; then arrange."""
    if request.device is not None or request.wishes.any:
        raise ValueError(
            "states= says where everything is; leave device=, plan=, max_memory=, device_map= and the like out."
        )
    from loadstone.api.offload import arranged_as_loaded

    return arranged_as_loaded(carry_out(replace(request, device="cpu", streaming=Streaming()), observer), states)


def carry_out(request: Request, observer: Observer = ignore) -> nn.Module:
    """Load what a request asks for; see `load`."""
    _check(request)
    with PeakWatch() as watch, paused_gc(), _begun(request, observer) as begun:
        to_host = begun.streaming is not None and begun.streaming.device == HOST
        with begun.recorder.stage("import") as told, sleeping_waits(to_host):
            from loadstone.api.assemble import assemble

            told.text = "torch and the model code, while the weights are on their way"
        made = assemble(_planned_with_torch(begun))
        with begun.recorder.stage("page in") as told:
            begun.ahead.wait_for_pages()
            check_unchanged(begun.checkpoint.files)
            told.text = _paged_line(begun.ahead)
    import_files.learn(cache_folder())
    report = made.finish_report(watch.peak, time.perf_counter() - begun.start)
    remember(made.model, Loaded(made.model, report=report, origin=made.origin, residency=made.residency))
    return made.model


def _paged_line(ahead: Ahead) -> str:
    if not ahead.paged_bytes:
        return "nothing to wait for"
    return f"{format_bytes(ahead.paged_bytes)} brought in, beside everything above"


def _check(request: Request) -> None:
    for name in ("config", "rename", "convert"):
        if request.into is None and getattr(request, name) is not None:
            raise ValueError(f"{name}= needs into=, the module class that it is for.")
    for name in ("architecture", "attn_implementation"):
        if request.into is not None and getattr(request, name) is not None:
            raise ValueError(f"{name}= names something of transformers and cannot go with into=.")
    if request.into is not None and request.wishes.any:
        raise ValueError(
            "a plan needs config.json and cannot go with into=; leave plan=, max_memory= and the like out."
        )
    says_more = request.wishes != Wishes(plan=request.wishes.plan) or request.dtype or request.device
    if request.wishes.plan is not None and says_more:
        raise ValueError("plan= says everything already; leave dtype=, device=, max_memory= and the like out.")
    if request.streaming is not None and request.device not in (None, "cpu"):
        raise ValueError(f"device={request.device!r}: units can be streamed to the CPU only.")


@contextmanager
def _begun(request: Request, observer: Observer) -> Iterator[Begun]:
    """Read the headers and set the bytes in motion; what is still under way at the end is stopped."""
    recorder = Recorder(observer=observer)
    asked = import_files.read_ahead(cache_folder())
    start, before = time.perf_counter(), resident()
    checkpoint = read_headers(request.source, request.access, recorder, request.excerpt)
    checkpoint = in_torch_pairs(checkpoint) if request.into is not None else _with_class(described(checkpoint))
    wanted = request.wishes.plan.dtype if request.wishes.plan is not None else request.dtype
    dtype = choose_dtype(checkpoint, wanted)
    plan, streaming, devices = _planned(checkpoint, request, dtype, recorder)
    ahead = Ahead(observer, after=asked.wait)
    begun = Begun(
        request=request,
        checkpoint=checkpoint,
        dtype=dtype,
        plan=plan,
        streaming=streaming,
        devices=devices,
        ahead=ahead,
        recorder=recorder,
        start=start,
        before=before,
    )
    try:
        _set_in_motion(begun)
        yield begun
    finally:
        ahead.close()


def _planned(
    checkpoint: Checkpoint, request: Request, dtype: Choice, recorder: Recorder
) -> tuple[Plan | None, Streaming | None, Mapping[str, str]]:
    """What goes where. Modules of other kinds than transformers' are loaded whole."""
    if request.into is not None or request.streaming is not None:
        return None, request.streaming, {}
    with recorder.stage("plan") as told:
        plan = planned(checkpoint, request, dtype.value)
        told.text = plan_line(plan)
        if plan is None and asks_torch(request):
            told.text = "when torch is there, which can tell of accelerators"
        told.lines = plan.reasons if plan is not None else ()
    return (None, None, {}) if plan is None else (plan, *carried(plan, checkpoint))


def _planned_with_torch(begun: Begun) -> Begun:
    """The same with a plan, where an accelerator is here and the model does not fit on it with ease."""
    request, checkpoint = begun.request, begun.checkpoint
    if begun.plan is not None or request.into is not None or request.streaming is not None:
        return begun
    plan = planned_with_torch(checkpoint, request, begun.dtype.value)
    if plan is None:
        return begun
    with begun.recorder.stage("plan for accelerators") as told:
        told.text, told.lines = plan_line(plan), plan.reasons
    streaming, devices = carried(plan, checkpoint)
    begun = replace(begun, plan=plan, streaming=streaming, devices=devices)
    if plan.streams or devices:
        begun.ahead.stop_paging()  # from now on only of what the host computes
        _set_in_motion(begun)
    return begun


def read_headers(source: Source, access: HubAccess, recorder: Recorder, excerpt: Excerpt | None = None) -> Checkpoint:
    """Resolve the source and read its headers, as a stage of a load.

    Args:
        source: as for `load`.
        access: how the hub may be used.
        recorder: times the stage.
        excerpt: which part of the source is meant.

    Returns:
        The checkpoint.
    """
    with recorder.stage("headers") as told:
        checkpoint = open_checkpoint(
            source,
            revision=access.revision,
            local_files_only=access.local_files_only,
            hub=access,
            observer=recorder.observer,
            excerpt=excerpt,
        )
        told.text = (
            f"{checkpoint.format.value}, {len(checkpoint.files)} file{'s' if len(checkpoint.files) > 1 else ''}, "
            f"{len(checkpoint.tensors):,} tensors, {format_count(checkpoint.num_parameters)} parameters, "
            f"{format_bytes(checkpoint.nbytes)}"
        )
        told.lines = _header_lines(checkpoint)
    return checkpoint


def _header_lines(checkpoint: Checkpoint) -> tuple[str, ...]:
    lines = [f"folder {checkpoint.root}"]
    lines += [f"{file.path.name}: {format_bytes(file.nbytes)}" for file in checkpoint.files]
    lines.append("config.json read" if checkpoint.config is not None else "no config.json")
    if checkpoint.params is not None:
        lines.append("params.json read: the tensors have the names of Meta's layout")
    if checkpoint.metadata:
        lines.append(f"metadata: {', '.join(list(checkpoint.metadata)[:6])}")
    return tuple(lines)


def _with_class(checkpoint: Checkpoint) -> Checkpoint:
    if checkpoint.config is None:
        raise InvalidConfig(
            f"{checkpoint.root}: there is no config.json beside the weights, so no class can be chosen; add it, or "
            "pass into= with your own class."
        )
    return checkpoint


def _set_in_motion(begun: Begun) -> None:
    request, checkpoint = begun.request, begun.checkpoint
    streamed = begun.streaming.tensors if begun.streaming is not None else frozenset()
    total_bytes = min(checkpoint.nbytes, sum(file.nbytes for file in checkpoint.files))
    total_bytes -= sum(checkpoint.tensors[name].nbytes for name in streamed if name in checkpoint.tensors)
    # A plan has counted all that it keeps.
    if begun.plan is None and total_bytes > _PREFAULT_SHARE * host_memory()[1]:
        return  # what comes in now would push out what came before
    on_cpu = request.device == "cpu" or (request.device is None and not may_have_accelerator())
    # What goes to accelerators is read straight into page-locked memory later.
    away = frozenset(name for name, device in begun.devices.items() if device != HOST)
    decode = (on_cpu or len(away) < len(begun.devices)) and request.convert is None
    begun.ahead.begin(checkpoint, _likely_dtype(begun), decode=decode, skip=streamed | away)


def _likely_dtype(begun: Begun) -> Callable[[TensorInfo], str]:
    """What each tensor will most likely be wanted in; a wrong guess costs time, never correctness."""
    rearranged: Sequence[str] = ()
    if begun.checkpoint.format is Format.GGUF and begun.request.into is None:
        targets = tensor_targets(begun.checkpoint, begun.checkpoint.config or {})
        rearranged = [name for name, target in targets.items() if target.layout is not None]
    as_float32 = frozenset(rearranged)
    stays = begun.request.into is not None and begun.request.dtype in (None, "auto")

    def likely(info: TensorInfo) -> str:
        if info.name in as_float32:
            return "float32"
        if stays or not DTYPES[info.dtype].floating:
            return info.dtype
        return begun.dtype.value

    return likely
