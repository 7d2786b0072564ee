"""Look at this machine. torch is imported only where an accelerator may be here that it was built for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadstone.checkpoint.cache import cache_folder as own_cache_folder
from loadstone.hardware.cpu import cpu
from loadstone.hardware.link import pci_bytes_per_s
from loadstone.hardware.measured import known_rates, with_known_devices
from loadstone.hardware.memory import host_limits, host_memory
from loadstone.hardware.spec import Cpu, Device, Limit, Machine, Rates
from loadstone.hardware.storage import disk_under
from loadstone.hardware.torch_build import torch_build

# The files that drivers make, by what torch must have been built for to use them.
_DRIVERS = {"cuda": ("/dev/nvidiactl", "/dev/dxg"), "hip": ("/dev/kfd", "/dev/dxg"), "xpu": ("/dev/dri", "/dev/dxg")}


def probe(model_folder: Path | None = None, cache_folder: Path | None = None) -> Machine:
    """What can compute here, what it may use, and what it was measured to do before.

    Args:
        model_folder: the folder (or file) of a model, whose disk matters too.
        cache_folder: where measures are kept; Loadstone's own by default.

    Returns:
        The machine as it is now; free memory is that of this moment.
    """
    cache = cache_folder or own_cache_folder()
    folders = [cache] if model_folder is None else [model_folder, cache]
    limits = host_limits()
    processor = cpu()
    machine = Machine(
        devices=_devices(processor, limits),
        cpu=processor,
        disks=tuple(disk for folder in folders if (disk := disk_under(folder)) is not None),
        rates=known_rates(folders[0], cache) or Rates(),
        host_limits=limits,
    )
    return with_known_devices(machine, cache)


def devices_here() -> tuple[Device, ...]:
    """What can compute here, the host last, without what was measured of it: most of a probe's time."""
    return _devices(cpu(), host_limits())


def _devices(processor: Cpu, limits: tuple[Limit, ...]) -> tuple[Device, ...]:
    total, free = host_memory(limits)
    host = Device(id="cpu", kind="cpu", name=processor.name, total_bytes=total, free_bytes=free)
    return (*(_accelerators(processor, host) if may_have_accelerator() else ()), host)


def may_have_accelerator() -> bool:
    """Whether torch could find a GPU here, told without torch: its build, and drivers' files on Linux."""
    if sys.platform in {"darwin", "win32"}:
        return True
    build = torch_build()
    return build is not None and any(
        getattr(build, kind) is not None and any(Path(file).exists() for file in files)
        for kind, files in _DRIVERS.items()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Backend:
    """How one of torch's device modules answers; the module is the first argument of each.

    Attributes:
        memory: (free, total) bytes of the device with an index.
        name: what its maker calls it.
        capability: what code it runs.
    """

    memory: Callable[[Any, int], tuple[int, int]]
    name: Callable[[Any, int], str]
    capability: Callable[[Any, int], str | None]


def _rocm() -> str | None:
    """The version of ROCm: torch reaches AMD's GPUs as `cuda`."""
    import torch

    return torch.version.hip


def _cuda_name(cuda: Any, index: int) -> str:
    name = str(cuda.get_device_name(index))
    return f"{name} (ROCm {rocm})" if (rocm := _rocm()) is not None else name


def _cuda_capability(cuda: Any, index: int) -> str:
    if _rocm() is not None:
        return str(cuda.get_device_properties(index).gcnArchName).partition(":")[0]
    major, minor = cuda.get_device_capability(index)
    return f"{major}.{minor}"


def _xpu_memory(xpu: Any, index: int) -> tuple[int, int]:
    if hasattr(xpu, "mem_get_info"):
        free, total = xpu.mem_get_info(index)
    else:  # torch before 2.7 knows only what this process took
        total = xpu.get_device_properties(index).total_memory
        free = total - xpu.memory_reserved(index)
    return free, total


def _mps_memory(mps: Any, _: int) -> tuple[int, int]:
    """Metal's advice on how much of the shared memory the GPU should have at most."""
    total = int(mps.recommended_max_memory())
    return max(0, total - int(mps.driver_allocated_memory())), total


_BACKENDS = {
    "cuda": _Backend(memory=lambda cuda, index: cuda.mem_get_info(index), name=_cuda_name, capability=_cuda_capability),
    "xpu": _Backend(
        memory=_xpu_memory,
        name=lambda xpu, index: str(xpu.get_device_name(index)),
        capability=lambda *_: None,
    ),
    "mps": _Backend(memory=_mps_memory, name=lambda *_: "GPU", capability=lambda *_: None),
}


def _accelerators(processor: Cpu, host: Device) -> Iterator[Device]:
    import torch

    for kind, backend in _BACKENDS.items():
        module = getattr(torch, kind, None)
        if module is None or not module.is_available():
            continue
        shared = kind == "mps"  # one device, in the host's memory
        for index in range(1 if shared else module.device_count()):
            try:
                free, total = backend.memory(module, index)
            except RuntimeError as error:  # a GPU that others hold alone, or that is broken
                import logging

                log = logging.getLogger("loadstone.hardware")
                log.warning("%s:%d is left out, because torch cannot use it: %s", kind, index, error)
                continue
            name = backend.name(module, index)
            yield Device(
                id=kind if shared else f"{kind}:{index}",
                kind=kind,
                name=f"{processor.name} {name}" if shared else name,
                total_bytes=total,
                free_bytes=min(free, host.free_bytes) if shared else free,
                capability=backend.capability(module, index),
                link_bytes_per_s=None if shared else _link(module.get_device_properties(index)),
            )


def _link(properties: Any) -> float | None:
    """What the device's slot says, where torch tells which slot that is."""
    numbers = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if any(number is None for number in numbers):
        return None
    domain, bus, device = numbers
    return pci_bytes_per_s(f"{domain:04x}:{bus:02x}:{device:02x}.0")
