"""What a machine is made of, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# The number of tokens that stands for many where rates are measured, and where they are used.
MANY_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensRate:
    """A rate of matrix products that depends on how many tokens are multiplied together.

    Attributes:
        tokens: rows of the other matrix.
        flops_per_s: floating-point operations.
    """

    tokens: int
    flops_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeRate:
    """How fast a device computes in one dtype; the first two suffice for a plan, the others make it exact.

    Attributes:
        weight_bytes_per_s: bytes of weights read with one token, where memory is the bound.
        flops_per_s: floating-point operations with many tokens, where arithmetic is.
        few_tokens: the same with few tokens, in rising order; () where it is not known.
        query_flops_per_s: attention of one query of a sequence to all its keys and values.
        attention_flops_per_s: attention of a whole prompt to itself.
        activation_bytes_per_s: results that operations without weights hand on to each other.
        step_s: seconds beside all these for each tensor of weights in a pass: the small operations around it.
    """

    weight_bytes_per_s: float
    flops_per_s: float
    few_tokens: tuple[TokensRate, ...] = ()
    query_flops_per_s: float | None = None
    attention_flops_per_s: float | None = None
    activation_bytes_per_s: float | None = None
    step_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device that can compute.

    Attributes:
        id: as torch writes it, `cuda:0`.
        kind: `cpu`, `cuda` (ROCm too, as in torch), `xpu`, `mps`.
        name: what its maker calls it.
        total_bytes: of its memory; for the CPU what this process may use, container limits included.
        free_bytes: of it.
        capability: what code it runs: `8.9` on CUDA, `gfx942` on ROCm; None where there is no such number.
        link_bytes_per_s: host memory that is page-locked -> device; None where it is not known, and for the CPU.
        compute: rates by torch's name of a dtype; empty where they are not known.
    """

    id: str
    kind: str
    name: str
    total_bytes: int
    free_bytes: int
    capability: str | None = None
    link_bytes_per_s: float | None = None
    compute: Mapping[str, ComputeRate] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """The processor.

    Attributes:
        name: what its maker calls it.
        num_cores: the cores this process may run on, limits of time included.
        num_threads: that torch multiplies matrices with; None for one for each core.
        features: what matters to matrix products, as Linux writes it: `avx2`, `avx512f`, `avx512_bf16`, `amx_bf16`,
            `amx_int8`, `neon`, `bf16`, ...
    """

    name: str
    num_cores: int
    num_threads: int | None = None
    features: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """What a folder lies on.

    Attributes:
        path: the folder that was asked about.
        file_system: the kernel's name of its type, `ext4`; "" where it is not told.
        network: its bytes come over a network, or from another program.
        rotational: whether the disk turns; None where that is not told.
        total_bytes: of the file system.
        free_bytes: of it, for this user.
    """

    path: Path
    file_system: str = ""
    network: bool = False
    rotational: bool | None = None
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A limit on the memory of this process that is less than what the machine has.

    Attributes:
        what: who sets it: `cgroup v2 /docker/abc memory.max`, `ulimit -v`.
        limit_bytes: the most it allows.
        used_bytes: what counts against it now and cannot be reclaimed.
    """

    what: str
    limit_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        """What may still be taken."""
        return max(0, self.limit_bytes - self.used_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the disk and the memory were measured to do at best, in bytes per second; None where it was not measured.

    Attributes:
        disk_bytes_per_s: reading the checkpoint's disk past the page cache.
        cached_bytes_per_s: reading a file that is in the page cache into memory that was touched before, all cores.
        copy_bytes_per_s: copying into memory that was touched before, all cores.
        touch_bytes_per_s: touching memory for the first time, all cores.
        expand_bytes_per_s: what comes out of compressed weights, all cores.
    """

    disk_bytes_per_s: float | None = None
    cached_bytes_per_s: float | None = None
    copy_bytes_per_s: float | None = None
    touch_bytes_per_s: float | None = None
    expand_bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What can compute, what it may use, and how fast it is known to be.

    Attributes:
        devices: the fastest kind first; the CPU is the last one.
        cpu: the processor.
        disks: under the cache folder and, where it was named, the model's folder.
        rates: of the disk and the memory.
        host_limits: what keeps this process below the machine's memory.
        name: of a machine that was saved or comes from the gallery; "" for the one at hand.
        sources: where the figures come from, for the gallery.
    """

    devices: tuple[Device, ...]
    cpu: Cpu
    disks: tuple[Disk, ...] = ()
    rates: Rates = field(default_factory=Rates)
    host_limits: tuple[Limit, ...] = ()
    name: str = ""
    sources: tuple[str, ...] = ()

    @property
    def host(self) -> Device:
        """The CPU as a device: its memory is what the process may use."""
        return self.devices[-1]

    @property
    def num_cores(self) -> int:
        """The cores this process may run on."""
        return self.cpu.num_cores
