"""What the processor is, and which of its features speed up matrix products."""

from __future__ import annotations

import sys
from pathlib import Path

from loadstone.hardware.memory import num_cores
from loadstone.hardware.openmp import num_threads
from loadstone.hardware.spec import Cpu

_CPUINFO = Path("/proc/cpuinfo")

# The kernel's flags that kernels for matrix products ask for, x86 and then ARM.
# Source: https://github.com/torvalds/linux/blob/master/arch/x86/include/asm/cpufeatures.h,
# https://docs.kernel.org/arch/arm64/elf_hwcaps.html
_FEATURES = (
    *("avx2", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni"),
    *("amx_tile", "amx_bf16", "amx_int8", "amx_fp16"),
    *("neon", "asimddp", "bf16", "i8mm", "sve", "sve2", "sme"),
)
_SAME = {"asimd": "neon"}

# Source: https://developer.apple.com/documentation/kernel/1387446-sysctlbyname/determining_instruction_set_characteristics
_SYSCTLS = {
    "hw.optional.neon": "neon",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_SME": "sme",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512f",
}


def cpu() -> Cpu:
    """Ask the kernel; what it does not tell is left out."""
    name, features = _from_sysctl() if sys.platform == "darwin" else _from_cpuinfo()
    return Cpu(name=name or _machine(), num_cores=num_cores(), num_threads=num_threads(), features=features)


def _machine() -> str:
    import platform  # seldom needed, and slow to import

    return platform.machine()  # platform.processor() would start a process to ask


def _from_cpuinfo() -> tuple[str, tuple[str, ...]]:
    name, flags = "", set[str]()
    try:
        with _CPUINFO.open() as file:
            for line in file:
                key, _, value = line.partition(":")
                if not line.strip():  # the other cores are the same, and the kernel takes a while to describe each
                    break
                if key.strip() == "model name":
                    name = " ".join(value.split())
                elif key.strip() in {"flags", "Features"}:
                    flags = {_SAME.get(flag, flag) for flag in value.split()}
    except OSError:
        pass
    return name, tuple(feature for feature in _FEATURES if feature in flags)


def _from_sysctl() -> tuple[str, tuple[str, ...]]:
    name = _sysctl("machdep.cpu.brand_string").rstrip(b"\0").decode(errors="replace")
    present = [feature for key, feature in _SYSCTLS.items() if any(_sysctl(key))]
    return name, tuple(present)


def _sysctl(name: str) -> bytes:
    """The raw value of a name, without starting a process; empty where there is none."""
    import ctypes  # Linux does without, and starts sooner

    libc = ctypes.CDLL(None)
    size = ctypes.c_size_t(256)
    buffer = ctypes.create_string_buffer(size.value)
    found = libc.sysctlbyname(name.encode(), buffer, ctypes.byref(size), None, ctypes.c_size_t(0))
    return buffer.raw[: size.value] if found == 0 else b""
