"""What would fit instead: each a complete plan, labelled by what it does differently."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from loadstone.dtypes import DTYPES
from loadstone.hardware.spec import Machine
from loadstone.plan.segment import Missing
from loadstone.plan.values import DISK, HOST, Asked, Plan

Attempt = Plan | Missing

# A context shorter than this is no use to a conversation.
_SHORTEST_CONTEXT = 128


def alternatives(
    attempt: Callable[[Asked, str], Attempt], asked: Asked, machine: Machine, dtype: str
) -> tuple[Plan, ...]:
    """Try what could be changed, one thing at a time.

    Args:
        attempt: makes a plan with a label, or says what is missing.
        asked: what did not fit.
        machine: what else there is.
        dtype: the main dtype that did not fit.

    Returns:
        The plans that fit, in the order of what they give up: streaming, another device, a smaller dtype, a shorter
        context.
    """
    found: list[Plan] = []
    seen: set[str] = set()
    for changed, label in (*_streaming(asked), *_elsewhere(asked, machine), *_smaller(asked, dtype)):
        made = attempt(changed, label)
        if isinstance(made, Plan):
            made = _labelled(made, label)
            if made.label not in seen:
                found.append(made)
                seen.add(made.label)
    shorter = _shorter(attempt, asked)
    return (*found, shorter) if shorter is not None else tuple(found)


def _streaming(asked: Asked) -> Iterator[tuple[Asked, str]]:
    if not asked.offload:
        yield replace(asked, offload=True), "streaming"
    if asked.device_map is not None:
        yield replace(asked, device_map=None, offload=True), "the planner's own placement instead of the device map"


def _labelled(plan: Plan, label: str) -> Plan:
    """Say from where it streams, which is known only now."""
    if label != "streaming":
        return plan
    homes = {one.home for one in plan.placements if one.is_streamed}
    where = " and ".join({HOST: "RAM", DISK: "disk"}[home] for home in sorted(homes))
    return replace(plan, label=f"streaming from {where}" if where else label)


def _elsewhere(asked: Asked, machine: Machine) -> Iterator[tuple[Asked, str]]:
    """Other devices, and budgets up to what is free."""
    bare = replace(asked, device_map=None, device=None)
    if asked.device is not None:
        for device in machine.devices:
            if device.id != asked.device:
                yield replace(bare, device=device.id), f"on {device.id}"
    if asked.device is not None and len(machine.devices) > 1:
        yield bare, "on all devices"
    if asked.max_memory:
        yield replace(asked, max_memory={}), "with all the memory that is free"


def _smaller(asked: Asked, dtype: str) -> Iterator[tuple[Asked, str]]:
    if DTYPES[dtype].bits > 16:
        yield replace(asked, dtype="bfloat16"), "in bfloat16"


def _shorter(attempt: Callable[[Asked, str], Attempt], asked: Asked) -> Plan | None:
    """The longest context that fits, of halves of the one that did not."""
    context = asked.run.context // 2
    while context >= _SHORTEST_CONTEXT:
        run = replace(asked.run, context=context, prompt_tokens=min(asked.run.prompt_tokens, context))
        made = attempt(replace(asked, run=run), f"a context of {context:,}")
        if isinstance(made, Plan):
            return made
        context //= 2
    return None
