"""The report of a load, made of what its stages decided once its peak and its time are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from loadstone.api.begun import Begun
from loadstone.architecture.blueprint import Blueprint
from loadstone.checkpoint.cache import cache_folder
from loadstone.hardware.measured import known_rates
from loadstone.hardware.memory import ResidentBytes
from loadstone.plan.choose import Choice
from loadstone.plan.load_peak import LoadPeak
from loadstone.report.load_report import CudaMemory, LoadReport
from loadstone.stream.materialize import Materialized
from loadstone.stream.transfer import torch_device

FinishReport = Callable[[ResidentBytes, float], LoadReport]


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What the stages decided, for the report."""

    device: Choice
    foretold: LoadPeak
    notes: tuple[str, ...]


def reporter(
    begun: Begun,
    blueprint: Blueprint,
    module: nn.Module,
    made: Materialized,
    told: Told,
) -> FinishReport:
    """What makes the report.

    Args:
        begun: what was asked for, and the bytes.
        blueprint: the class.
        module: the model, complete.
        made: its tensors.
        told: what the stages decided.

    Returns:
        A function of the peak of resident memory and of the seconds of the whole load.
    """
    tensors = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}

    def finish(peak: ResidentBytes, seconds: float) -> LoadReport:
        return LoadReport(
            source=begun.request.name,
            model_class=blueprint.name,
            chosen_by=blueprint.chosen_by,
            files=tuple(str(file.path) for file in begun.checkpoint.files),
            num_parameters=sum(parameter.numel() for parameter in module.parameters()),
            weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
            dtype=begun.dtype,
            device=told.device,
            attention=_attention(begun, module),
            phases=tuple(begun.recorder.finished),
            seconds=seconds,
            mapped_bytes=made.mapped_bytes,
            read_bytes=made.read_bytes,
            read_s=made.read_s,
            paged_bytes=begun.ahead.paged_bytes,
            paged_s=begun.ahead.paged_s,
            before=begun.before,
            peak=peak,
            rates=known_rates(begun.checkpoint.files[0].path, cache_folder()),
            foretold=told.foretold,
            plan=begun.plan,
            cuda=_cuda_memory(told.device.value),
            notes=told.notes,
        )

    return finish


def _attention(begun: Begun, module: nn.Module) -> Choice:
    chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if chosen is None:
        return Choice(value="its own", reason="the class does not say")
    if begun.request.attn_implementation is not None:
        return Choice(value=chosen, reason="asked for")
    if chosen == "sdpa":
        return Choice(value=chosen, reason="torch's fused attention, which this class supports")
    return Choice(value=chosen, reason="the class supports nothing faster here")


def _cuda_memory(device: str) -> CudaMemory | None:
    if torch_device(device).type != "cuda":
        return None
    stats = torch.cuda.memory_stats(device)
    return CudaMemory(
        allocated_bytes=stats["allocated_bytes.all.current"],
        reserved_bytes=stats["reserved_bytes.all.current"],
        peak_bytes=stats["allocated_bytes.all.peak"],
        fragmented_bytes=stats["inactive_split_bytes.all.current"],
        num_retries=stats["num_alloc_retries"],
    )
