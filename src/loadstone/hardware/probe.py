"""Look at this machine. torch is asked only when it is imported already or by `machine()`."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from loadstone.hardware.memory import host_memory, num_cores
from loadstone.hardware.spec import Cpu, Device, Machine


def may_have_accelerator() -> bool:
    """Whether a GPU could be here, told without torch: device files on Linux, any Mac."""
    return sys.platform == "darwin" or any(
        Path(name).exists() for name in ("/dev/nvidiactl", "/dev/kfd", "/dev/dri", "/dev/dxg")
    )


def machine() -> Machine:
    """The devices that torch can use here, accelerators first."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        devices.append(Device(id=f"cuda:{index}", kind="cuda", name=name, total_bytes=total, free_bytes=free))
    total, free = host_memory()
    if torch.backends.mps.is_available():
        devices.append(Device(id="mps", kind="mps", name="Apple GPU", total_bytes=total, free_bytes=free))
    # platform.processor() would start a process to ask.
    devices.append(Device(id="cpu", kind="cpu", name=platform.machine(), total_bytes=total, free_bytes=free))
    return Machine(devices=tuple(devices), cpu=Cpu(name=platform.machine(), num_cores=num_cores()))
