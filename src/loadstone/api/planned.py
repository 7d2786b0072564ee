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
from loadstone.plan.values import HOST, Asked, Plan, Run, Unit, UnitKind
from loadstone.units import format_bytes

if TYPE_CHECKING:
    import torch

    from loadstone.api.begun import Request

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
    if not wishes.limits and (asks_torch(request) or _easy_bytes(checkpoint, dtype, wishes.run) < host_memory()[1]):
        return None
    return _best(checkpoint, request, probe(checkpoint.root))


def asks_torch(request: Request) -> bool:
    """Whether an accelerator may be used, of which only torch can tell."""
    return request.device != HOST and may_have_accelerator()


def planned_with_torch(checkpoint: Checkpoint, request: Request, dtype: str) -> Plan | None:
    """The plan of a load that was begun without one, once torch can tell of accelerators; see `planned`.

    Returns:
        A plan, or None where all weights fit on one device with room to spare.
    """
    if request.wishes.limits or not asks_torch(request):
        return None
    machine = probe(checkpoint.root)
    wanted = f"{request.device}:0" if request.device in {"cuda", "xpu"} else request.device
    usable = [one for one in machine.devices if one.kind != "cpu" and wanted in (None, one.id)]
    needed_bytes = _easy_bytes(checkpoint, dtype, request.wishes.run)
    if not usable:  # a driver without a device, or one that is asked for and not there, which is told later
        fits = needed_bytes < host_memory()[1]
        return None if fits or request.device is not None else _best(checkpoint, request, machine)
    if any(needed_bytes < one.free_bytes for one in usable):
        return None
    return _best(checkpoint, request, machine)


def _best(checkpoint: Checkpoint, request: Request, machine: Machine) -> Plan | None:
    try:
        made = _made(checkpoint, machine, _asked(request, machine))
    except DoesNotFit as error:
        if request.wishes.limits or error.shortfall_bytes < _ABSURD_BYTES:
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


def _easy_bytes(checkpoint: Checkpoint, dtype: str, run: Run) -> int:
    """What must be free where no plan is needed."""
    cache_bytes = (kv_cache_bytes_per_token(checkpoint.config or {}, 32) or 0) * run.context * run.batch
    bits = DTYPES[dtype].bits
    nbytes = sum(
        max(info.numel * bits // 8, nbytes_of(DTYPES[info.dtype], info.numel)) for info in checkpoint.tensors.values()
    )
    return int(_EASY_FACTOR * nbytes) + cache_bytes + _EASY_BYTES


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
    # It cannot be carried out, but the host can be streamed to.
    return make_plan(
        checkpoint, machine, replace(asked, device=HOST), process_at_hand(is_here=True), str(checkpoint.root)
    )


def _is_supported(plan: Plan) -> bool:
    return len(_streamed_to(plan)) < 2


def _streamed_to(plan: Plan) -> list[str]:
    """The devices that something is streamed to."""
    return sorted({placement.compute for placement in plan.placements if placement.is_streamed})


def check_supported(plan: Plan) -> None:
    """Refuse what cannot be carried out yet.

    Raises:
        PlanNotSupported: it streams to several devices.
    """
    if not _is_supported(plan):
        raise PlanNotSupported(
            f"the plan streams to {' and to '.join(_streamed_to(plan))}; expected one device that is streamed to, "
            "beside others that keep what they compute. Make the plan anew, or pass device= for one of them."
        )


def main_device(plan: Plan) -> str:
    """Where the first block computes: the device that inputs are brought to."""
    blocks = [one for one in plan.placements if one.kind is UnitKind.BLOCK]
    return (blocks or list(plan.placements))[0].compute


def carried(plan: Plan, checkpoint: Checkpoint) -> tuple[Streaming | None, dict[str, str]]:
    """What a load must know of a plan to carry it out.

    Args:
        plan: what goes where.
        checkpoint: what it was made for.

    Returns:
        What is read anew in each pass, None where all of it stays; and where each tensor is computed with, by its name
        in the checkpoint, empty where one device computes.
    """
    is_spread = len(plan.computing) > 1
    if not plan.streams and not is_spread:
        return None, {}
    found = inventory(checkpoint, facts_of(checkpoint.config), plan.dtype)
    units = found.placed([placement.unit for placement in plan.placements])
    streaming = _streaming_of(plan, units) if plan.streams else None
    if not is_spread:
        return streaming, {}
    return streaming, {name: one.compute for one in plan.placements for name in units[one.unit].tensors}


def _streaming_of(plan: Plan, units: Mapping[str, Unit]) -> Streaming:
    away = {placement.unit: placement.home for placement in plan.placements if placement.is_streamed}
    device = _streamed_to(plan)[0]
    tensors = {tensor: name for name in away for tensor in units[name].tensors}
    room = expert_room(plan, units, device)
    return Streaming(
        num_slots=max(1, plan.num_slots),
        tensors=frozenset(tensors) | room.tensors,
        expert_tensors=room.tensors,
        expert_bytes=room.nbytes,
        unit_of=tensors,
        device=device,
        in_memory=frozenset(name for name, unit in tensors.items() if away[unit] == HOST != device)
        | {name for one in plan.placements if one.spare_bytes for name in units[one.unit].tensors},
        slot_bytes=plan.slot_bytes,
        read_bytes=plan.read_bytes,
        slices={one.unit: one.slice_bytes for one in plan.placements if one.is_streamed and one.slice_bytes},
    )


def plan_line(plan: Plan | None) -> str:
    """A plan in a line, for the report."""
    if plan is None:
        return "none needed: everything fits with room to spare"
    on = {device: format_bytes(nbytes) for device, nbytes in _kept_bytes(plan).items()}
    kept = " and ".join(f"{size} on {device}" if len(on) > 1 else size for device, size in on.items())
    peak = format_bytes(plan.devices[-1].peak_bytes)
    if not plan.streams:
        return f"{kept} resident, peak at most {peak}"
    slots = "one slot" if plan.num_slots == 1 else f"{plan.num_slots} slots"
    return f"{kept} resident, {format_bytes(plan.streamed_bytes)} read in each pass by {slots}, peak at most {peak}"


def _kept_bytes(plan: Plan) -> dict[str, int]:
    """What is resident on each device that computes."""
    kept: dict[str, int] = {}
    for one in plan.placements:
        kept[one.compute] = kept.get(one.compute, 0) + (one.kept_bytes if one.is_streamed else one.home_bytes)
    return kept
