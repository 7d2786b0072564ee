"""What a machine is made of, as values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device that can compute.

    Attributes:
        id: as torch writes it, `cuda:0`.
        kind: `cpu`, `cuda`, `mps`, `xpu`.
        name: what its maker calls it.
        total_bytes: of its memory; for the CPU what this process may use, container limits included.
        free_bytes: of it.
    """

    id: str
    kind: str
    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The devices of this machine; the CPU is the last one.

    Attributes:
        devices: the fastest kind first.
        num_cores: the cores this process may run on.
    """

    devices: tuple[Device, ...]
    num_cores: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What this machine was measured to do at best, in bytes per second; None where it was not measured.

    Attributes:
        disk_bytes_per_s: reading the checkpoint's disk past the page cache.
        copy_bytes_per_s: copying into memory that was touched before, all cores.
        touch_bytes_per_s: touching memory for the first time, all cores.
    """

    disk_bytes_per_s: float | None = None
    copy_bytes_per_s: float | None = None
    touch_bytes_per_s: float | None = None
