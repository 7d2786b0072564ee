"""Device maps in the sense of transformers: which module goes where, by the start of its name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from loadstone.errors import DeviceUnavailable
from loadstone.hardware.spec import Machine
from loadstone.plan.budget import device_id
from loadstone.plan.cost import rows_bytes
from loadstone.plan.experts import ring_bytes
from loadstone.plan.layout import Layout, Problem
from loadstone.plan.place import buffer_bytes
from loadstone.plan.segment import Assignment, Missing
from loadstone.plan.values import DISK, HOST, Plan, Unit, UnitKind

# Words with which transformers leaves the choice to the planner.
AUTOMATIC = frozenset({"auto", "balanced", "balanced_low_0", "sequential"})


def checked_map(given: Any, machine: Machine) -> dict[str, str] | None:
    """A device map with the machine's own ids.

    Args:
        given: one of `AUTOMATIC`, a device for everything, or devices (or "disk") by the start of names; devices are
            texts, numbers of GPUs, or torch's own.
        machine: what is there.

    Returns:
        Devices by the start of names, "" for everything; None where the planner chooses.

    Raises:
        DeviceUnavailable: it names a device that is not there.
        ValueError: it is empty, or no map.
    """
    if given is None or (isinstance(given, str) and given in AUTOMATIC):
        return None
    expected = 'expected "auto", a device, or devices by the start of module names.'
    if isinstance(given, Collection) and not isinstance(given, str | Mapping):
        raise ValueError(f"device_map is {str(given)[:40]}; {expected}")
    pairs = dict(given) if isinstance(given, Mapping) else {"": given}
    if not pairs:
        raise ValueError(f"device_map is empty; {expected}")
    found = {}
    for name, device in pairs.items():
        try:
            found[name] = DISK if device == DISK else device_id(str(device), machine)
        except DeviceUnavailable as error:
            where = f' for "{name}"' if name else ""
            raise DeviceUnavailable(f"device_map{where}: {error}") from None
    return found


def layout_of(problem: Problem, device_map: Mapping[str, str]) -> Layout | Missing:
    """Place everything as a map says.

    As in transformers, what a map puts on the host or the disk is brought to the first accelerator that it names;
    where it names none, the host computes.

    Args:
        problem: units and budgets.
        device_map: devices by the start of names.

    Returns:
        The layout, or what is missing on the fullest device.

    Raises:
        ValueError: a unit is covered by no entry, or an entry covers nothing.
    """
    main = next((device for device in device_map.values() if device not in {HOST, DISK}), HOST)
    found: list[Assignment] = []
    used: set[str] = set()
    for unit, key in _covered(problem, device_map):
        used.add(key)
        home = device_map[key]
        found.append(Assignment(unit=unit, home=home, compute=main if home in {HOST, DISK} else home))
    unused = [key for key in device_map if key not in used]
    if unused:
        raise ValueError(
            f'device_map: "{unused[0]}" is the start of no module here; check it against `loadstone inspect`.'
        )
    return _with_rings(problem, _with_whole_layers(problem, found))


def _with_whole_layers(problem: Problem, found: Sequence[Assignment]) -> list[Assignment]:
    """The same with a layer and its experts as one, where all of it is brought to an accelerator."""
    by_order: dict[int, list[Assignment]] = {}
    for one in found:
        by_order.setdefault(one.unit.order, []).append(one)
    joined: list[Assignment] = []
    for together in by_order.values():
        first = together[0]
        if all((one.home, one.compute) == (first.home, first.compute) for one in together):
            units = [one.unit for one in together]
            if first.home != first.compute != HOST:
                units = problem.inventory.whole_layers(units)
            joined += [replace(first, unit=unit) for unit in units]
        else:
            joined += together
    return joined


def _covered(problem: Problem, device_map: Mapping[str, str]) -> Iterable[tuple[Unit, str]]:
    """Every unit, or its parts where the map divides it, with the entry that it falls under."""
    for unit in problem.inventory.units:
        divided = any(key.startswith(f"{unit.name}.") for key in device_map)
        for part in problem.inventory.parts(unit) if divided else (unit,):
            key = _key(part.name, device_map)
            if key is None:
                raise ValueError(
                    f'device_map has no entry for {part.name}; add one, or "" for everything that is not named.'
                )
            yield part, key


def _key(name: str, device_map: Mapping[str, str]) -> str | None:
    """The longest entry that `name` falls under."""
    while name:
        if name in device_map:
            return name
        name = name.rpartition(".")[0]
    return "" if "" in device_map else None


def _with_rings(problem: Problem, found: list[Assignment]) -> Layout | Missing:
    """Rings for what a map streams: two slots where they fit, else one."""
    streams = any(one.home != one.compute for one in found)
    missing = 0
    for num_slots in (2, 1) if streams else (0,):
        rings = _rings(problem, found, num_slots)
        missing = _missing(problem, found, rings)
        if missing <= 0:
            return Layout(assignments=tuple(found), num_slots=num_slots, ring_bytes=rings)
    return Missing(nbytes=missing)


def _rings(problem: Problem, found: Sequence[Assignment], num_slots: int) -> dict[str, int]:
    units: dict[str, list[Unit]] = {}
    rows: dict[str, int] = {}
    for one in found:
        if one.home == one.compute:
            continue
        units.setdefault(one.compute, []).append(one.unit)
        if one.unit.kind is UnitKind.EMBEDDING:
            rows[one.compute] = rows.get(one.compute, 0) + rows_bytes(one.unit, max(problem.tokens))
    rings = {device: ring_bytes(away, num_slots, device) + rows.get(device, 0) for device, away in units.items()}
    for device in rings.keys() - {HOST}:
        rings[device] += problem.expanding_bytes
    if buffers := buffer_bytes(found):
        rings[HOST] = rings.get(HOST, 0) + buffers
    return rings


def _missing(problem: Problem, found: list[Assignment], rings: Mapping[str, int]) -> int:
    """The bytes by which the fullest device is over its budget; below zero where all fit."""
    accelerators = {one.compute for one in found} - {HOST}
    over = []
    for device in (*accelerators, HOST):
        computing = [one.unit for one in found if one.compute == device]
        held = sum(
            one.unit.memory_bytes if one.home == one.compute else one.unit.carried_bytes
            for one in found
            if one.home == device
        )
        if device == HOST:
            room = problem.host_room(computing, len(accelerators))
        else:
            room = problem.device_room(device) - problem.cache_of(computing)
        over.append(held + rings.get(device, 0) - room)
    return max(over)


def to_device_map(plan: Plan) -> dict[str, str]:
    """The plan as a device map, for whoever loads with transformers: where each module is kept, shortest names first.

    Args:
        plan: any plan.

    Returns:
        Devices (or "disk") by the start of names. An expert that is one slice of a larger tensor cannot be told
        apart there, so a layer's experts go where most of them are.
    """
    homes: dict[str, str] = {}
    experts: dict[str, dict[str, int]] = {}
    for one in plan.placements:
        stem, _, number = one.unit.rpartition(".")
        if one.kind is UnitKind.EXPERT and number.isdecimal():
            counts = experts.setdefault(stem, {})
            counts[one.home] = counts.get(one.home, 0) + 1
        else:
            homes[one.unit] = one.home
    homes |= {stem: max(counts, key=lambda home: counts[home]) for stem, counts in experts.items()}
    return _joined(homes)


def _joined(homes: Mapping[str, str]) -> dict[str, str]:
    """Drop entries that say what the entry above them says already, and use one where all below it agree."""
    if len(set(homes.values())) == 1:
        return {"": next(iter(homes.values()))}
    found: dict[str, str] = {}
    for name, home in sorted(homes.items(), key=lambda pair: pair[0].count(".")):
        above = name.rpartition(".")[0]
        while above and above not in found:
            above = above.rpartition(".")[0]
        if not above or found[above] != home:
            found[name] = home
    return found
