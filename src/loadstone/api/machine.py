"""The machine that is planned for: this one (looked at without torch if it has no accelerator), or a described one."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loadstone.checkpoint.cache import cache_folder
from loadstone.checkpoint.files import read_json_object
from loadstone.errors import InvalidMachine
from loadstone.hardware import probe
from loadstone.hardware.measure import cached
from loadstone.hardware.memory import host_memory, num_cores, resident
from loadstone.hardware.spec import ComputeRate, Cpu, Device, Machine, Rates
from loadstone.plan.budget import Process

# A process after `import torch` and a model class of transformers: 263 MB of its own and 86 MB of mapped libraries.
# Measured with torch 2.13 and transformers 5.23 on Linux, x86-64.
IMPORTS_BYTES = 350_000_000
_MAX_MACHINE_BYTES = 1_000_000
_DEVICE_FIELDS = {"id": str, "kind": str, "name": str, "total_bytes": int, "free_bytes": int}


def machine_at_hand(folder: Path) -> Machine:
    """This machine, with the rates of the disk under `folder` where they were measured before."""
    rates = cached(folder, cache_folder()) or Rates()
    if probe.may_have_accelerator():
        found = probe.machine()  # asks torch
        return Machine(devices=found.devices, cpu=found.cpu, rates=rates)
    total, free = host_memory()
    name = platform.machine()
    host = Device(id="cpu", kind="cpu", name=name, total_bytes=total, free_bytes=free)
    return Machine(devices=(host,), cpu=Cpu(name=name, num_cores=num_cores()), rates=rates)


def process_at_hand(is_here: bool) -> Process:
    """What this process takes of the host, or will once it has imported what a model needs.

    Args:
        is_here: it is this machine that is planned for, so that what is imported already is missing from its free
            memory.
    """
    is_taken = is_here and "torch" in sys.modules and "transformers" in sys.modules
    if not is_taken:
        return Process(level_bytes=IMPORTS_BYTES)
    now = resident()
    return Process(level_bytes=now.anonymous_bytes + now.file_bytes, is_taken=True)


def read_machine(path: Path) -> Machine:
    """A machine that is described in a JSON file, as `machine_to_json` has it.

    Raises:
        InvalidMachine: it is not such a description.
    """
    data = read_json_object(path, max_bytes=_MAX_MACHINE_BYTES, fault=InvalidMachine)
    try:
        devices = tuple(_device(one) for one in data["devices"])
        rates = Rates(**data.get("rates", {}))
        cores = int(data.get("num_cores", 1))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InvalidMachine(
            f"{path}: this is no description of a machine ({error}); expected devices and rates."
        ) from None
    if not devices or devices[-1].kind != "cpu" or len({device.id for device in devices}) != len(devices):
        raise InvalidMachine(f"{path}: expected devices with different ids, the last one of kind cpu.")
    return Machine(
        devices=devices, cpu=Cpu(name=devices[-1].name, num_cores=cores), rates=rates, name=str(data.get("name", ""))
    )


def _device(data: Mapping[str, Any]) -> Device:
    for name, kind in _DEVICE_FIELDS.items():
        if type(data[name]) is not kind or (kind is int and data[name] < 0):
            raise ValueError(f"{name} of a device is {data[name]!r}")
    compute = {name: ComputeRate(**rates) for name, rates in data.get("compute", {}).items()}
    plain = {name: data[name] for name in (*_DEVICE_FIELDS, "capability", "link_bytes_per_s") if name in data}
    return Device(**plain, compute=compute)
