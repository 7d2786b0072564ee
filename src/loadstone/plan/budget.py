"""How many bytes of each device a plan may use: what was asked for, else what is free less a margin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loadstone.errors import DeviceUnavailable
from loadstone.hardware.spec import Device, Machine
from loadstone.plan.values import HOST
from loadstone.units import parse_bytes

# What is left alone of free memory where no budget is named: other processes breathe, allocators round up.
HOST_MARGIN_SHARE = 0.05
DEVICE_MARGIN_SHARE = 0.03
# Devices whose memory is the host's, and the part of it that they leave to the host.
# Source: https://developer.apple.com/documentation/metal/mtldevice/recommendedmaxworkingsetsize
SHARED_MEMORY = {"mps": 0.25}
# A CUDA context with the kernels of torch, before the first tensor: 0.3-0.6 GB by generation.
# Source: https://github.com/pytorch/pytorch/issues/20532
CONTEXT_BYTES = {"cuda": 600_000_000, "xpu": 300_000_000}


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What this process takes of the host, beside a model.

    Attributes:
        level_bytes: after torch and transformers are imported.
        pages_bytes: of libraries, which are first needed when a model computes. The kernel can drop them, and where all
            else is in use it does, and reads them again in each pass.
        is_taken: whether the imports are there, so that free memory is already less by them.
        shows_pages: whether it can show the same memory at several addresses, which fronts of units need.
        compresses: whether it can keep weights compressed.
    """

    level_bytes: int = 0
    pages_bytes: int = 0
    is_taken: bool = False
    shows_pages: bool = True
    compresses: bool = False


def parse_max_memory(text: str) -> dict[str, str]:
    """`cuda:0=8GiB,cpu=12GiB` as a mapping; a size without a device is the host's.

    Raises:
        ValueError: a part is empty, or a device is named twice.
    """
    found: dict[str, str] = {}
    for part in text.split(","):
        device, equals, size = (piece.strip() for piece in part.rpartition("="))
        device = device if equals else HOST
        if not size or not device:
            raise ValueError(f'max_memory "{text}": expected device=size pairs such as cuda:0=8GiB,cpu=12GiB.')
        if device in found:
            raise ValueError(f'max_memory "{text}": {device} is named twice.')
        found[device] = size
    return found


def device_id(name: str | int, machine: Machine) -> str:
    """A device as the machine calls it: `0` and `cuda` are `cuda:0`.

    Raises:
        DeviceUnavailable: it is not there.
    """
    text = str(name)
    accelerators = [device.id for device in machine.devices if device.kind != "cpu"]
    if text.isdecimal():
        text = accelerators[int(text)] if int(text) < len(accelerators) else f"cuda:{text}"
    elif text in {"cuda", "xpu"}:
        text = f"{text}:0"
    ids = [device.id for device in machine.devices]
    if text not in ids:
        raise DeviceUnavailable(f'device "{name}" is not on this machine, which has: {", ".join(ids)}.')
    return text


def checked_max_memory(given: Mapping[str | int, str | int] | str | None, machine: Machine) -> dict[str, int]:
    """Budgets in bytes by the machine's device ids.

    Args:
        given: sizes by device, one text of pairs, or None.
        machine: what is there.

    Raises:
        ValueError: a budget that is no size, or a device twice.
        DeviceUnavailable: a device that is not there.
    """
    pairs = parse_max_memory(given) if isinstance(given, str) else dict(given or {})
    found: dict[str, int] = {}
    for name, size in pairs.items():
        device = device_id(name, machine)
        if device in found:
            raise ValueError(f"max_memory names {device} twice.")
        found[device] = parse_bytes(size, option=f"max_memory of {device}")
    return found


def budgets(machine: Machine, max_memory: Mapping[str, int], process: Process) -> dict[str, int]:
    """What may be used of each device, the process's level after imports included on the host.

    Args:
        machine: what is there.
        max_memory: what was asked for, by device id; the rest is used up to what is free, less a margin.
        process: this process.

    Returns:
        Bytes by device id; never more than is free.
    """
    return {device.id: _budget(device, max_memory.get(device.id), process) for device in machine.devices}


def _budget(device: Device, asked: int | None, process: Process) -> int:
    free = device.free_bytes
    if device.kind == "cpu":
        free += process.level_bytes if process.is_taken else 0
        return min(free, asked) if asked is not None else int(free * (1 - HOST_MARGIN_SHARE))
    free = max(0, free - CONTEXT_BYTES.get(device.kind, 0))
    margin = SHARED_MEMORY.get(device.kind, DEVICE_MARGIN_SHARE)
    return min(free, asked) if asked is not None else int(free * (1 - margin))
