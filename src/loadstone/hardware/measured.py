"""What was measured before, in the cache folder, so that every later plan uses it."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from loadstone.errors import InvalidMachine
from loadstone.hardware.json_values import from_plain, to_plain, write_json
from loadstone.hardware.memory import num_cores
from loadstone.hardware.spec import ComputeRate, Machine, Rates
from loadstone.hardware.storage import existing_parent
from loadstone.hardware.torch_build import torch_build


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredDevice:
    """What one device was measured to do.

    Attributes:
        link_bytes_per_s: page-locked host memory -> device; None for the CPU.
        compute: rates by dtype.
    """

    link_bytes_per_s: float | None = None
    compute: Mapping[str, ComputeRate] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredDevices:
    """What the devices of one machine were measured to do, with the torch that did it.

    Attributes:
        key: which machine, cores and torch.
        devices: by id.
    """

    key: str
    devices: Mapping[str, MeasuredDevice] = field(hash=False)


def known_rates(path: Path, cache: Path) -> Rates | None:
    """What was measured before for the disk under `path`.

    Args:
        path: a file or folder; where it does not exist yet, its nearest parent counts.
        cache: the folder that keeps what was measured.
    """
    try:
        value = _read(_rates_file(path, cache))
    except OSError:
        return None
    if value is None or value.keys() != {rate.name for rate in fields(Rates)}:  # an older Loadstone measured less
        return None
    with contextlib.suppress(InvalidMachine):
        return from_plain(Rates, value, "")
    return None


def remember_rates(rates: Rates, path: Path, cache: Path) -> None:
    """Keep them for later; a cache that cannot be written only costs the next measurement."""
    with contextlib.suppress(OSError):
        write_json(_rates_file(path, cache), to_plain(rates))


def with_known_devices(machine: Machine, cache: Path) -> Machine:
    """The machine with what its devices were measured to do, where that was done with this torch."""
    key = _key(machine)
    value = _read(_devices_file(key, cache))
    try:
        known = None if value is None else from_plain(MeasuredDevices, value, "")
    except InvalidMachine:
        return machine
    return with_measures(machine, known.devices) if known is not None and known.key == key else machine


def remember_devices(machine: Machine, measures: Mapping[str, MeasuredDevice], cache: Path) -> None:
    """Keep what was measured of a machine's devices; a cache that cannot be written only costs the next measurement."""
    key = _key(machine)
    with contextlib.suppress(OSError):
        write_json(_devices_file(key, cache), to_plain(MeasuredDevices(key=key, devices=measures)))


def with_measures(machine: Machine, measures: Mapping[str, MeasuredDevice]) -> Machine:
    """The machine with these measures in the place of what was read from slots."""
    devices = tuple(
        replace(device, compute=found.compute, link_bytes_per_s=found.link_bytes_per_s or device.link_bytes_per_s)
        if (found := measures.get(device.id)) is not None
        else device
        for device in machine.devices
    )
    return replace(machine, devices=devices)


def _key(machine: Machine) -> str:
    build = torch_build()
    devices = ", ".join(f"{device.id} {device.name}" for device in machine.devices)
    return f"{devices}; {machine.num_cores} cores; torch {build.version if build else 'none'}"


def _devices_file(key: str, cache: Path) -> Path:
    return cache / "rates" / f"devices-{zlib.crc32(key.encode()):08x}.json"


def _rates_file(path: Path, cache: Path) -> Path:
    return cache / "rates" / f"{existing_parent(path).stat().st_dev}-{num_cores()}.json"


def _read(file: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
