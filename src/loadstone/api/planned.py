"""Which plan a load follows: the one that was given, one that is made now, or none where everything fits with ease."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loadstone.architecture.config import kv_cache_bytes_per_token
from loadstone.checkpoint.values import Checkpoint
from loadstone.dtypes import DTYPES, nbytes_of
from loadstone.errors import DoesNotFit, InvalidPlan, PlanNotSupported
from loadstone.execute.values import Streaming
from loadstone.hardware.memory import host_memory
from loadstone.hardware.probe import may_have_accelerator, probe
from loadstone.hardware.spec import Machine
from loadstone.plan.budget import checked_max_memory, device_id
from loadstone.plan.device_map import checked_map
from loadstone.plan.experts import expert_room
from loadstone.plan.facts import facts_of
from loadstone.plan.make import check_run, make_plan
from loadstone.plan.plan_file import changes
from loadstone.plan.units import inventory
from loadstone.plan.values import HOST, Asked, Plan, Run, UnitKind
from loadstone.units import format_bytes

if TYPE_CHECKING:
    import torch

    from loadstone.api.load import Request

# Weights of which this many times the bytes, and this much beside them, are free need no plan: making one for tens of
# thousands of tensors takes longer than loading them.
_EASY_FACTOR = 1.5
_EASY_BYTES = 2_000_000_000
# More than any machine has.
_ABSURD_BYTES = 10**15
# What a load is planned for where nothing is said of the run.
_USUAL = Run(context=1024, batch=1, prompt_tokens=512)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What was said of the plan; see `loadstone.plan`.

    Attributes:
        plan: one that was made before.
        max_memory: budgets by device.
        context: tokens of prompt and answer.
        batch: sequences at a time.
        prompt_tokens: of one prompt.
        device_map: where modules go.
        offload: whether streaming is allowed.
    """

    plan: Plan | None = None
    max_memory: Mapping[str | int, str | int] | str | None = None
    context: int | None = None
    batch: int | None = None
    prompt_tokens: int | None = None
    device_map: str | int | torch.device | Mapping[str, str | int | torch.device] | None = None
    offload: bool = True

    @property
    def any(self) -> bool:
        """Whether anything was said."""
        return self != Wishes()

    @property
    def limits(self) -> bool:
        """Whether something was said that only a plan can keep."""
        return self.max_memory is not None or self.device_map is not None or not self.offload

    @property
    def run(self) -> Run:
        """What the model is to be used for."""
        context, prompt = self.context, self.prompt_tokens
        if prompt is None:
            prompt = _USUAL.prompt_tokens if context is None else min(_USUAL.prompt_tokens, context)
        if context is None:
            context = max(_USUAL.context, 2 * prompt)
        return Run(context=context, batch=_USUAL.batch if self.batch is None else self.batch, prompt_tokens=prompt)


def planned(checkpoint: Checkpoint, request: Request, dtype: str) -> Plan | None:
    """The plan that a load follows.

    Args:
        checkpoint: what is loaded, with its config.
        request: what was asked for.
        dtype: the model's main dtype.

    Returns:
        A plan that can be carried out, or None where all weights fit on one device with room to spare.

    Raises:
        DoesNotFit: there is none.
        InvalidPlan: the plan that was given was made for another checkpoint or machine.
        PlanNotSupported: it spreads the model in a way that cannot be carried out yet.
        ValueError: what was asked for means nothing.
    """
    wishes = request.wishes
    if wishes.plan is not None:
        return _given(wishes.plan, checkpoint)
    check_run(wishes.run)
    on_host = request.device == HOST or not may_have_accelerator()
    if not wishes.limits and (not on_host or _fits_with_ease(checkpoint, dtype, wishes.run)):
        return None
    machine = probe(checkpoint.root)
    try:
        made = _made(checkpoint, machine, _asked(request, machine))
    except DoesNotFit as error:
        if wishes.limits or error.shortfall_bytes < _ABSURD_BYTES:
            raise
        return None  # no model is that large: the config lies, and its class will say in what
    check_supported(made)
    return made


def _given(plan: Plan, checkpoint: Checkpoint) -> Plan:
    found = changes(plan, checkpoint, probe(checkpoint.root))
    if found:
        raise InvalidPlan(f"the plan no longer fits what it was made for: {'; '.join(found)}; make it anew.")
    check_supported(plan)
    return plan


def _fits_with_ease(checkpoint: Checkpoint, dtype: str, run: Run) -> bool:
    cache_bytes = (kv_cache_bytes_per_token(checkpoint.config or {}, 32) or 0) * run.context * run.batch
    bits = DTYPES[dtype].bits
    nbytes = sum(
        max(info.numel * bits // 8, nbytes_of(DTYPES[info.dtype], info.numel)) for info in checkpoint.tensors.values()
    )
    return _EASY_FACTOR * nbytes + cache_bytes + _EASY_BYTES < host_memory()[1]


def _asked(request: Request, machine: Machine) -> Asked:
    wishes = request.wishes
    return Asked(
        run=wishes.run,
        dtype=request.dtype,
        max_memory=checked_max_memory(wishes.max_memory, machine),
        device=None if request.device is None else device_id(request.device, machine),
        device_map=checked_map(wishes.device_map, machine),
        offload=wishes.offload,
    )


def _made(checkpoint: Checkpoint, machine: Machine, asked: Asked) -> Plan:
    from loadstone.api.plan import process_at_hand

    plan = make_plan(checkpoint, machine, asked, process_at_hand(is_here=True), str(checkpoint.root))
    if _is_supported(plan) or asked.device is not None or asked.device_map is not None:
        return plan
    # Several devices: one that everything fits on is not there, but the host can be streamed to.
    return make_plan(
        checkpoint, machine, replace(asked, device=HOST), process_at_hand(is_here=True), str(checkpoint.root)
    )


def _is_supported(plan: Plan) -> bool:
    places = {placement.compute for placement in plan.placements}
    return len(places) == 1 and not _sends_experts(plan)


def _sends_experts(plan: Plan) -> bool:
    """Whether experts are streamed to an accelerator: the room that they share is in host memory."""
    return any(one.is_streamed and one.kind is UnitKind.EXPERT and one.compute != HOST for one in plan.placements)


def check_supported(plan: Plan) -> None:
    """Refuse what cannot be carried out yet.

    Raises:
        PlanNotSupported: several devices, or experts that are streamed to an accelerator.
    """
    if _sends_experts(plan):
        raise PlanNotSupported(
            "the plan streams experts to an accelerator; expected experts that stay there, or a model that computes on "
            'the host. Pass device="cpu", or a smaller dtype.'
        )
    if not _is_supported(plan):
        places = sorted({placement.compute for placement in plan.placements})
        raise PlanNotSupported(
            f"the plan computes on {', '.join(places)}{' and streams' if plan.streams else ''}; expected one device. "
            "Pass device= for one of them, or a smaller dtype."
        )


def streaming_of(plan: Plan, checkpoint: Checkpoint) -> Streaming | None:
    """What is read anew in each pass; None where all of it stays.

    Args:
        plan: what goes where.
        checkpoint: what it was made for.
    """
    if not plan.streams:
        return None
    away = {placement.unit: placement.home for placement in plan.placements if placement.is_streamed}
    found = inventory(checkpoint, facts_of(checkpoint.config), plan.dtype)
    device = plan.placements[0].compute
    tensors: dict[str, str] = {}
    for whole in found.units:
        for unit in (whole, *found.parts(whole)):
            if unit.name in away:
                tensors |= dict.fromkeys(unit.tensors, unit.name)
    room = expert_room(plan, found)
    return Streaming(
        num_slots=max(1, plan.num_slots),
        tensors=frozenset(tensors) | room.tensors,
        expert_tensors=room.tensors,
        expert_bytes=room.nbytes,
        unit_of=tensors,
        device=device,
        in_memory=frozenset(name for name, unit in tensors.items() if away[unit] == HOST != device),
        slot_bytes=plan.slot_bytes,
        read_bytes=plan.read_bytes,
        slices={one.unit: one.slice_bytes for one in plan.placements if one.is_streamed and one.slice_bytes},
    )


def plan_line(plan: Plan | None) -> str:
    """A plan in a line, for the report."""
    if plan is None:
        return "none needed: everything fits with room to spare"
    kept = format_bytes(sum(one.kept_bytes if one.is_streamed else one.home_bytes for one in plan.placements))
    peak = format_bytes(plan.devices[-1].peak_bytes)
    if not plan.streams:
        return f"{kept} resident, peak at most {peak}"
    slots = "one slot" if plan.num_slots == 1 else f"{plan.num_slots} slots"
    return f"{kept} resident, {format_bytes(plan.streamed_bytes)} read in each pass by {slots}, peak at most {peak}"
