"""Plans as JSON: versioned, read strictly, compared with each other and with what they were made for."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from loadstone.checkpoint.values import Checkpoint
from loadstone.errors import InvalidPlan
from loadstone.hardware.spec import Machine
from loadstone.plan.identity import identity
from loadstone.plan.values import Placement, Plan
from loadstone.units import format_bytes, format_seconds

VERSION = 4
_VERSION_FIELD = "loadstone_plan"


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, its version first."""
    return {_VERSION_FIELD: VERSION, **_plain(plan)}


def from_json(data: Any, where: str = "the plan") -> Plan:
    """Read what `to_json` gave.

    Args:
        data: parsed JSON.
        where: its file, for messages.

    Raises:
        InvalidPlan: it is not a plan of this version, or a field is missing, unknown, or of another kind.
    """
    if not isinstance(data, Mapping) or _VERSION_FIELD not in data:
        raise InvalidPlan(f"{where} is not a plan: it has no {_VERSION_FIELD}; write one with `loadstone plan --save`.")
    version = data[_VERSION_FIELD]
    if version != VERSION or isinstance(version, bool):
        raise InvalidPlan(
            f"{where} is of version {version!r}; this Loadstone reads version {VERSION}: make the plan anew."
        )
    content = {name: value for name, value in data.items() if name != _VERSION_FIELD}
    plan: Plan = _value(Plan, content, where, "")
    names = [placement.unit for placement in plan.placements]
    if len(set(names)) != len(names):
        raise InvalidPlan(f"{where}: a unit is placed twice; make the plan anew.")
    return plan


def changes(plan: Plan, checkpoint: Checkpoint, machine: Machine) -> tuple[str, ...]:
    """What is no longer as it was when the plan was made.

    Args:
        plan: made earlier.
        checkpoint: as it is now.
        machine: as it is now.

    Returns:
        A sentence for each change that matters; empty if the plan still holds.
    """
    return tuple(_changes(plan, checkpoint, machine))


def _changes(plan: Plan, checkpoint: Checkpoint, machine: Machine) -> Iterator[str]:
    before, now = plan.identity, identity(checkpoint, machine, plan.identity.source)
    if before.architecture != now.architecture:
        yield f"the checkpoint's architecture was {before.architecture or 'none'}, is {now.architecture or 'none'}"
    if before.num_tensors != now.num_tensors:
        yield f"the checkpoint had {before.num_tensors:,} tensors, has {now.num_tensors:,}"
    if before.stored_bytes != now.stored_bytes:
        yield f"the checkpoint had {before.stored_bytes:,} bytes, has {now.stored_bytes:,}"
    if before.digest != now.digest and before.num_tensors == now.num_tensors:
        yield "names, dtypes, shapes or places of the checkpoint's tensors are others"
    used = {device.device: device for device in plan.devices}
    for name, planned in used.items():
        if name not in now.machine:
            yield f"{name} is gone"
        elif now.machine[name] != before.machine.get(name):
            total = before.machine.get(name, 0)
            yield f"{name} had {format_bytes(total)} of memory, has {format_bytes(now.machine[name])}"
        else:
            free = next(device.free_bytes for device in machine.devices if device.id == name)
            needed = planned.peak_bytes - planned.level_bytes
            if free < needed:
                yield f"{name} has {format_bytes(free)} free, the plan needs {format_bytes(needed)}"


def diff(before: Plan, after: Plan) -> tuple[str, ...]:
    """What two plans do differently, a line each; empty if nothing.

    Args:
        before: one plan.
        after: another, of the same model or not.
    """
    return tuple(_differences(before, after))


def _differences(before: Plan, after: Plan) -> Iterator[str]:
    for name in ("dtype", "run", "num_slots", "slot_bytes", "read_bytes"):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            yield f"{name}: {_words(old)} -> {_words(new)}"
    old_units = {placement.unit: placement for placement in before.placements}
    new_units = {placement.unit: placement for placement in after.placements}
    for name in dict.fromkeys((*old_units, *new_units)):
        old, new = _place(old_units.get(name)), _place(new_units.get(name))
        if old != new:
            yield f"{name}: {old} -> {new}"
    old_peaks = {device.device: device.peak_bytes for device in before.devices}
    new_peaks = {device.device: device.peak_bytes for device in after.devices}
    for name in dict.fromkeys((*old_peaks, *new_peaks)):
        old_peak, new_peak = old_peaks.get(name, 0), new_peaks.get(name, 0)
        if old_peak != new_peak:
            yield f"peak of {name}: {format_bytes(old_peak)} -> {format_bytes(new_peak)}"
    for what in ("load", "prefill", "decode"):
        old_s, new_s = _seconds(before, what), _seconds(after, what)
        if not math.isclose(old_s, new_s, rel_tol=1e-3):
            yield f"{what}: {format_seconds(old_s)} -> {format_seconds(new_s)}"


def _seconds(plan: Plan, what: str) -> float:
    predicted = plan.prediction
    return {"load": predicted.load_s, "prefill": predicted.prefill.seconds, "decode": predicted.decode.seconds}[what]


def _place(placement: Placement | None) -> str:
    if placement is None:
        return "not a unit"
    how = f"from {placement.home} to {placement.compute}" if placement.is_streamed else f"on {placement.home}"
    return f"{how} in {placement.compute_dtype}"


def _words(value: Any) -> str:
    if not is_dataclass(value):
        return str(value)
    return ", ".join(f"{field.name} {getattr(value, field.name)}" for field in fields(value))


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value):
        return {name: _plain(getattr(value, name)) for name in _field_types(value.__class__)}
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return dict(value) if isinstance(value, Mapping) else value


@cache
def _field_types(kind: Hashable) -> dict[str, Any]:
    """The fields of a dataclass with their types, worked out once: a plan can have 20,000 placements."""
    return get_type_hints(kind)


def _value(kind: Any, data: Any, where: str, path: str) -> Any:
    """`data` as a value of `kind`: a dataclass, an enum, a tuple or mapping of one kind, a plain type; or None."""
    if get_origin(kind) is UnionType:
        return None if data is None else _value(get_args(kind)[0], data, where, path)
    if is_dataclass(kind):
        return _record(kind, data, where, path)
    if get_origin(kind) is tuple and isinstance(data, list):
        inner = get_args(kind)[0]
        return tuple(_value(inner, one, where, f"{path}[{index}]") for index, one in enumerate(data))
    if get_origin(kind) is not None and isinstance(data, Mapping):
        inner = get_args(kind)[1]
        return {str(name): _value(inner, one, where, f"{path}.{name}") for name, one in data.items()}
    if isinstance(kind, type) and issubclass(kind, Enum) and data in [one.value for one in kind]:
        return kind(data)
    if kind is float and isinstance(data, int | float) and not isinstance(data, bool) and math.isfinite(data):
        return float(data)
    if kind in (int, str, bool) and type(data) is kind and (kind is not int or data >= 0):
        return data
    expected = getattr(kind, "__name__", str(kind))
    raise InvalidPlan(f"{where}: {path.lstrip('.')} is {str(data)[:40]!r}; expected {expected}. Make the plan anew.")


def _record(kind: Any, data: Any, where: str, path: str) -> Any:
    known = _field_types(kind)
    name = path.lstrip(".") or "it"
    if not isinstance(data, Mapping):
        raise InvalidPlan(f"{where}: {name} is {str(data)[:40]!r}; expected an object. Make the plan anew.")
    missing, unknown = [one for one in known if one not in data], [str(one) for one in data if one not in known]
    if missing or unknown:
        fault = f"lacks {missing[0]}" if missing else f"has an unknown field {unknown[0]}"
        raise InvalidPlan(f"{where}: {name} {fault}; make the plan anew.")
    return kind(**{field: _value(inner, data[field], where, f"{path}.{field}") for field, inner in known.items()})
