"""How long things take, from measured rates; typical ones stand in where nothing was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from loadstone.dtypes import DTYPES
from loadstone.hardware.spec import MANY_TOKENS, ComputeRate, Device, Machine
from loadstone.plan.values import HOST, Unit, UnitKind

# Rates where none was measured, per kind of device, for 16-bit weights: of a desktop processor with two channels of
# DDR4, of a mid-range GPU (an RTX 3060: 360 GB/s, 51 TFLOPS), of an Apple M1 Pro (200 GB/s, 5 TFLOPS).
# Sources: https://www.techpowerup.com/gpu-specs/geforce-rtx-3060-12-gb.c3682,
# https://www.notebookcheck.net/Apple-M1-Pro-16-Core-GPU-GPU-Benchmarks-and-Specs.576656.0.html
TYPICAL_COMPUTE = {
    "cpu": ComputeRate(weight_bytes_per_s=20e9, flops_per_s=2e11),
    "cuda": ComputeRate(weight_bytes_per_s=300e9, flops_per_s=25e12),
    "xpu": ComputeRate(weight_bytes_per_s=300e9, flops_per_s=25e12),
    "mps": ComputeRate(weight_bytes_per_s=150e9, flops_per_s=4e12),
}
# Source: PCIe 3.0 x16 carries 15.75 GB/s raw, of which page-locked copies reach about 12.
TYPICAL_LINK_BYTES_PER_S = 12e9
# A SATA or cloud disk between a turning one (0.2 GB/s) and an NVMe one (3-7 GB/s).
TYPICAL_DISK_BYTES_PER_S = 1e9
# Measured on the virtual machines that Loadstone is developed on, see DECISIONS.md.
TYPICAL_TOUCH_BYTES_PER_S = 2e9
TYPICAL_COPY_BYTES_PER_S = 8e9
# The same, for each core.
TYPICAL_EXPAND_BYTES_PER_S = 1.5e9
# What asking for one piece costs before its first byte comes: a read of its own, a launch.
PIECE_S = {"disk": 1e-4, "link": 2e-5}
# What decoding a value of a block reads and writes on an accelerator, counted in the operations for Q4_K: no device was
# at hand to measure it.
_DECODING_BYTES = 24
# The most slots between disk and processor that plans try.
MAX_HOST_SLOTS = 3
# Measured: taking the pages of a slot away from behind a front, 0.1 s for 3.3 GB.
_HIDE_BYTES_PER_S = 30e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """The rates of a machine for one dtype, every one a number.

    Attributes:
        disk: reading the checkpoint, bytes per second.
        touch: memory that is touched for the first time.
        copy: casting or copying on the host.
        expand: what comes out of compressed memory.
        compute: by device id.
        link: host to device, by device id.
        measured: whether what matters for predictions was measured.
    """

    disk: float
    touch: float
    copy: float
    expand: float
    compute: Mapping[str, ComputeRate]
    link: Mapping[str, float]
    measured: bool

    @property
    def compress(self) -> float:
        """What is compressed; measured, a little less than half of what is expanded."""
        return 0.4 * self.expand

    def way(self, home: str, compute: str) -> tuple[float, str]:
        """The rate at which bytes reach their compute device, and what bounds it: `disk` or `link`."""
        link = self.link[compute] if compute != HOST else float("inf")
        return (self.disk, "disk") if home != HOST and self.disk < link else (link, "link")


def speeds_of(machine: Machine, dtype: str) -> Speeds:
    """The machine's rates for a dtype.

    Args:
        machine: with what was measured.
        dtype: that weights are computed in.
    """
    rates = machine.rates
    compute = {device.id: _compute_rate(device, dtype) for device in machine.devices}
    links = {device.id: device.link_bytes_per_s for device in machine.devices if device.kind != "cpu"}
    known = [rates.disk_bytes_per_s, rates.touch_bytes_per_s, *links.values()]
    measured = all(rate is not None for rate in known) and all(dtype in device.compute for device in machine.devices)
    return Speeds(
        disk=rates.disk_bytes_per_s or TYPICAL_DISK_BYTES_PER_S,
        touch=rates.touch_bytes_per_s or TYPICAL_TOUCH_BYTES_PER_S,
        copy=rates.copy_bytes_per_s or TYPICAL_COPY_BYTES_PER_S,
        expand=rates.expand_bytes_per_s or TYPICAL_EXPAND_BYTES_PER_S * machine.num_cores,
        compute=compute,
        link={name: rate or TYPICAL_LINK_BYTES_PER_S for name, rate in links.items()},
        measured=measured,
    )


def _compute_rate(device: Device, dtype: str) -> ComputeRate:
    rate = device.compute.get(dtype)
    if rate is not None:
        return rate
    typical = TYPICAL_COMPUTE.get(device.kind, TYPICAL_COMPUTE["cpu"])
    wider = max(1.0, DTYPES[dtype].bits / 16)
    return ComputeRate(weight_bytes_per_s=typical.weight_bytes_per_s, flops_per_s=typical.flops_per_s / wider)


def touched_share(kind: UnitKind, use_share: float, tokens: int) -> float:
    """The part of a unit that a pass of so many tokens touches, as is to be expected of independent choices."""
    if kind is UnitKind.EMBEDDING:
        return min(1.0, use_share * tokens)
    return 1.0 - (1.0 - use_share) ** tokens if use_share < 1 else 1.0


def moved_bytes(unit: Unit, tokens: int) -> int:
    """What travels of a streamed unit in a pass of so many tokens: whole units, chosen experts, rows that are used."""
    left = max(0, unit.stored_bytes - unit.front_bytes - unit.compressed_bytes)
    return -int(-left * touched_share(unit.kind, unit.use_share, tokens) // 1)


def rows_bytes(unit: Unit, tokens: int) -> int:
    """What must be held of a streamed table: the rows that a pass of so many tokens looks up."""
    return int(unit.memory_bytes * touched_share(unit.kind, unit.use_share, tokens)) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Computing with one unit.

    Attributes:
        memory_s: reading its weights.
        arithmetic_s: multiplying with them.
        steps_s: the small operations around its tensors, and what its front costs.
    """

    memory_s: float = 0.0
    arithmetic_s: float = 0.0
    steps_s: float = 0.0

    @property
    def seconds(self) -> float:
        """The slower of the first two, and the steps."""
        return max(self.memory_s, self.arithmetic_s) + self.steps_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What a pass does beside multiplying with weights.

    Attributes:
        cache_bytes: keys and values that are read.
        query_flops: of attention where each sequence has one query.
        attention_flops: of attention where each has many.
        activation_bytes: what operations hand on to each other.
        num_steps: small operations around all that, each as long as those around a tensor of weights.
    """

    cache_bytes: int = 0
    query_flops: float = 0.0
    attention_flops: float = 0.0
    activation_bytes: int = 0
    num_steps: int = 0

    def __add__(self, other: Beside) -> Beside:
        return Beside(
            cache_bytes=self.cache_bytes + other.cache_bytes,
            query_flops=self.query_flops + other.query_flops,
            attention_flops=self.attention_flops + other.attention_flops,
            activation_bytes=self.activation_bytes + other.activation_bytes,
            num_steps=self.num_steps + other.num_steps,
        )

    def seconds(self, rate: ComputeRate) -> float:
        """On a device with these rates; where only its rates of products are known, with those."""
        query_s = self.query_flops / (rate.query_flops_per_s or rate.flops_per_s)
        attention_s = self.attention_flops / (rate.attention_flops_per_s or rate.flops_per_s)
        handed_on_s = self.activation_bytes / (rate.activation_bytes_per_s or rate.weight_bytes_per_s)
        kept_s = max(query_s, self.cache_bytes / rate.weight_bytes_per_s)
        return kept_s + attention_s + handed_on_s + self.num_steps * (rate.step_s or 0.0)


def work(unit: Unit, rate: ComputeRate, tokens: int) -> Work:
    """Computing with a unit where its weights are at hand, with the tokens that it is given."""
    if not tokens:
        return Work()
    if unit.expert_parameters:
        dense, experts = (work(part, rate, tokens) for part in _divided(unit))
        memory_s, arithmetic_s = dense.memory_s + experts.memory_s, dense.arithmetic_s + experts.arithmetic_s
        # One comes after the other: where the one waits for memory, the other's arithmetic is no help.
        return Work(
            memory_s=memory_s,
            arithmetic_s=arithmetic_s,
            steps_s=dense.seconds + experts.seconds - max(memory_s, arithmetic_s),
        )
    touched = touched_share(unit.kind, unit.use_share, tokens)
    steps_s = touched * len(unit.tensors) * (rate.step_s or 0.0)
    if unit.front_bytes:
        steps_s += (unit.memory_bytes - unit.front_bytes) / _HIDE_BYTES_PER_S
    memory_s = unit.memory_bytes * touched / rate.weight_bytes_per_s
    if unit.kind is UnitKind.EMBEDDING or not unit.num_parameters:
        return Work(memory_s=memory_s, steps_s=steps_s)
    flops = 2.0 * unit.num_parameters * unit.use_share * tokens
    together = tokens * unit.use_share / touched  # of an expert: the tokens that chose it
    flops_per_s = _flops_per_s(rate, together, unit.memory_bytes / unit.num_parameters)
    return Work(memory_s=memory_s, arithmetic_s=flops / flops_per_s, steps_s=steps_s)


def _divided(unit: Unit) -> tuple[Unit, Unit]:
    """A block without its experts, and these."""
    expert_bytes = unit.memory_bytes * unit.expert_parameters // unit.num_parameters
    num_dense = len(unit.tensors) - unit.expert_tensors
    dense = replace(
        unit,
        tensors=unit.tensors[:num_dense],
        num_parameters=unit.num_parameters - unit.expert_parameters,
        memory_bytes=unit.memory_bytes - expert_bytes,
        expert_parameters=0,
    )
    experts = replace(
        dense,
        kind=UnitKind.EXPERT,
        tensors=unit.tensors[num_dense:],
        num_parameters=unit.expert_parameters,
        memory_bytes=expert_bytes,
        use_share=unit.expert_share,
    )
    return dense, experts


def _flops_per_s(rate: ComputeRate, tokens: float, width_bytes: float) -> float:
    """What products do with so many tokens: between counts that were measured, on a straight line of logarithms."""
    if not rate.few_tokens or tokens >= MANY_TOKENS:
        return rate.flops_per_s
    one = 2 * rate.weight_bytes_per_s / width_bytes
    known = [(1, one), *((few.tokens, few.flops_per_s) for few in rate.few_tokens), (MANY_TOKENS, rate.flops_per_s)]
    for (fewer, slower), (more, faster) in pairwise(known):
        if tokens <= more:
            way = math.log(max(1.0, tokens) / fewer) / math.log(more / fewer)
            return math.exp((1 - way) * math.log(slower) + way * math.log(faster))
    return rate.flops_per_s


def transfer_s(unit: Unit, tokens: int, way: tuple[float, str], rate: ComputeRate | None = None) -> float:
    """Bringing a streamed unit to its compute device in a pass of so many tokens.

    Args:
        unit: what is brought.
        tokens: of the pass.
        way: how fast bytes travel, and what bounds it.
        rate: of an accelerator, which decodes blocks in the stream that they come in; None for the host.
    """
    touched = touched_share(unit.kind, unit.use_share, tokens)
    decoding = 0.0 if rate is None else touched * unit.encoded_parameters * _DECODING_BYTES / rate.weight_bytes_per_s
    return moved_bytes(unit, tokens) / way[0] + PIECE_S[way[1]] * touched + decoding


def alone_s(unit: Unit, tokens: int, way: tuple[float, str], rate: ComputeRate | None = None) -> float:
    """The part of that in which nothing else is computed.

    Slices come ahead of their head as far as it has windows. Experts come when their router has chosen; an accelerator
    computes with them in next to no time. See `transfer_s`.
    """
    if unit.kind is UnitKind.EXPERT and rate is not None:
        return transfer_s(unit, tokens, way, rate)
    if not unit.slice_bytes:
        return 0.0
    ahead = min(1.0, unit.window_bytes / unit.memory_bytes)
    return (1 - ahead) * unit.stored_bytes / way[0]


def compared_s(unit: Unit, rate: ComputeRate, tokens: int) -> float:
    """What it takes, once, to find out of each slice of a head whether it gives the bits of the whole."""
    if not unit.slice_bytes:
        return 0.0
    return math.ceil(unit.memory_bytes / unit.slice_bytes) * work(unit, rate, tokens).seconds


def likeness(unit: Unit) -> tuple[object, ...]:
    """Everything that the cost of a unit depends on; units for which it is equal are interchangeable."""
    sizes = (
        unit.memory_bytes,
        unit.slot_bytes,
        unit.stored_bytes,
        unit.num_parameters,
        unit.encoded_parameters,
        unit.expert_parameters,
        unit.expert_tensors,
        len(unit.tensors),
    )
    divided = (unit.front_bytes, unit.compressed_bytes, unit.slice_bytes, unit.table_rows)
    return (unit.kind, unit.seen, unit.use_share, *divided, *sizes)


def overlapped_s(compute_s: float, moving_s: float, num_slots: int, device: str) -> float:
    """A pass in steady state: one goes on beneath the other, with one slot they take turns.

    Where the host computes, disk and processor are never as even as a link: now the one waits, now the other, the less
    the more slots are between them. Measured: 0.2-0.34 of the faster is not hidden by two slots, 0-0.2 by three.

    Args:
        compute_s: computing alone.
        moving_s: moving alone.
        num_slots: between them; 0 where nothing goes through slots.
        device: the one that computes.
    """
    slower, faster = max(compute_s, moving_s), min(compute_s, moving_s)
    num_slots = num_slots or MAX_HOST_SLOTS
    if num_slots < 2:
        return slower + faster
    return slower + faster / num_slots**2 if device == HOST else slower


def simulate(steps: Sequence[tuple[float, float]], num_slots: int, num_passes: int = 3) -> float:
    """The last of several passes through a walk, step by step, for any order of resident and streamed units.

    Args:
        steps: (seconds of computing, seconds of transfer) in execution order; transfer 0 where it is resident.
        num_slots: of the ring; a slot is free again when its unit has computed.
        num_passes: how often the walk is repeated.

    Returns:
        Seconds from the end of the pass before the last to the end of the last.
    """
    now = reader = before = 0.0
    freed = [0.0] * max(1, num_slots)
    turn = 0
    for _ in range(num_passes):
        before = now
        for compute, moving in steps:
            if moving > 0:
                slot = turn % len(freed)
                reader = max(reader, freed[slot]) + moving
                now = max(now, reader) + compute
                freed[slot] = now
                turn += 1
            else:
                now += compute
    return now - before
