"""How fast the way from host memory to a PCI device is, from what its slot says."""

from __future__ import annotations

import re
from pathlib import Path

_PCI_DEVICES = Path("/sys/bus/pci/devices")
_SPEED = re.compile(r"([\d.]+) GT/s")

# What is left of a lane's transfers after the line code: 8b/10b up to 5 GT/s, 128b/130b above.
# Source: https://en.wikipedia.org/wiki/PCI_Express#Comparison_table
_SLOW_GT, _SLOW_CODE, _FAST_CODE = 5.0, 8 / 10, 128 / 130

# Packet headers and flow control take their part, so that copies out of page-locked memory reach some 25 of the
# 31.5 GB/s of PCIe 4.0 x16. `loadstone machine --measure` finds the true rate.
LINK_EFFICIENCY = 0.8


def pci_bytes_per_s(address: str) -> float | None:
    """The rate that a device's slot can reach.

    Args:
        address: as the kernel writes it, `0000:65:00.0`.

    Returns:
        Bytes per second; None where the kernel does not tell, as in many virtual machines.
    """
    device = _PCI_DEVICES / address
    # A link that idles is slow, so its speed is read as the most that both ends can do; its width is what is wired.
    speeds = [_speed(device), _speed(device.resolve().parent)]
    told = [speed for speed in speeds if speed is not None]
    try:
        width = int((device / "current_link_width").read_text())
    except (OSError, ValueError):
        return None
    if not told or not 1 <= width <= 32:
        return None
    transfers = min(told)
    code = _SLOW_CODE if transfers <= _SLOW_GT else _FAST_CODE
    return transfers * 1e9 * code / 8 * width * LINK_EFFICIENCY


def _speed(device: Path) -> float | None:
    """In 10^9 transfers per second and lane."""
    try:
        match = _SPEED.match((device / "max_link_speed").read_text())
    except OSError:
        return None
    return float(match[1]) if match else None
