"""`make_plan`: headers, config, machine and what was asked for -> the plan, or why there is none. Values only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from loadstone.checkpoint.values import Checkpoint
from loadstone.dtypes import DTYPES
from loadstone.errors import DoesNotFit
from loadstone.hardware.spec import Cpu, Machine, Rates
from loadstone.plan.alternatives import Attempt, alternatives
from loadstone.plan.beside import beside_by_order, cache_by_order
from loadstone.plan.budget import Process, budgets
from loadstone.plan.choose import Choice, choose_dtype
from loadstone.plan.cost import speeds_of
from loadstone.plan.device_map import checked_map, layout_of
from loadstone.plan.facts import Facts, facts_of
from loadstone.plan.identity import identity
from loadstone.plan.layout import Layout, Problem, best_layout
from loadstone.plan.predict import device_plans, placements, prediction
from loadstone.plan.reserve import (
    CAST_BYTES,
    DECODE_BYTES,
    DEVICE_WORKSPACE_BYTES,
    Loading,
    Pressure,
    activation_bytes,
    beside_cache,
    cache_bytes,
    heap_bytes,
    logits_bytes,
    strip_bytes,
    sums_apart,
    terms,
)
from loadstone.plan.segment import Missing
from loadstone.plan.units import Inventory, inventory
from loadstone.plan.values import HOST, Asked, Plan, Run, UnitKind
from loadstone.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """What one plan is made from, worked out.

    Attributes:
        problem: units, budgets and rates.
        facts: of the config.
        dtype: the model's main one, and why.
        terms: what a pass allocates.
    """

    problem: Problem
    facts: Facts
    dtype: Choice
    terms: Mapping[str, int]


def make_plan(
    checkpoint: Checkpoint, machine: Machine, asked: Asked, process: Process | None = None, source: str = ""
) -> Plan:
    """Plan a whole run.

    Args:
        checkpoint: its headers, with a config (for GGUF the one that the metadata imply).
        machine: what is there, and how fast.
        asked: what is wanted; budgets and devices by the machine's own ids.
        process: what the process itself takes of the host.
        source: the checkpoint as it was called, for the plan.

    Returns:
        The fastest plan that keeps within every budget.

    Raises:
        DoesNotFit: there is none; with the shortfall and the alternatives that do fit.
        DeviceUnavailable: a device that is not there.
        ValueError: what was asked for means nothing, or contradicts itself.
    """
    check_asked(asked)
    planner = _Planner(checkpoint=checkpoint, machine=machine, process=process or Process(), source=source)
    made = planner.attempt(asked)
    if isinstance(made, Plan):
        return made
    fitting = alternatives(planner.attempt, asked, machine, planner.choose(asked).value)
    raise DoesNotFit(_sentence(asked, machine, made, fitting), shortfall_bytes=made.nbytes, alternatives=fitting)


def check_asked(asked: Asked) -> None:
    """Refuse what means nothing.

    Raises:
        ValueError: naming the argument.
    """
    check_run(asked.run)
    if asked.device is not None and asked.device_map is not None:
        raise ValueError("device and device_map both say where the model goes; give one of them.")
    streams = isinstance(asked.device_map, Mapping) and "disk" in asked.device_map.values()
    if streams and not asked.offload:
        raise ValueError('device_map puts modules on "disk", which offload=False forbids; drop one of them.')


def check_run(run: Run) -> None:
    """Refuse counts that mean nothing.

    Raises:
        ValueError: naming the argument.
    """
    for name in ("context", "batch", "prompt_tokens"):
        value = getattr(run, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; expected a whole number above zero.")
    if run.prompt_tokens > run.context:
        raise ValueError(
            f"prompt_tokens is {run.prompt_tokens:,} but the context of prompt and answer together is only "
            f"{run.context:,}; shorten the prompt or raise the context."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planner:
    """Makes plans of one checkpoint for one machine."""

    checkpoint: Checkpoint
    machine: Machine
    process: Process
    source: str

    def choose(self, asked: Asked) -> Choice:
        return choose_dtype(self.checkpoint, asked.dtype)

    def attempt(self, asked: Asked, label: str = "") -> Attempt:
        """One plan, or what is missing for it."""
        device_map = checked_map(asked.device_map, self.machine)
        case = self._case(asked)
        layout = best_layout(case.problem) if device_map is None else layout_of(case.problem, device_map)
        if isinstance(layout, Missing):
            return layout
        problem = case.problem
        return Plan(
            identity=identity(self.checkpoint, self.machine, self.source),
            run=asked.run,
            dtype=case.dtype.value,
            placements=placements(problem, layout),
            devices=device_plans(problem, layout, logits_bytes(case.terms)),
            prediction=prediction(problem, layout, generates=case.facts.caches),
            num_slots=layout.num_slots,
            slot_bytes=layout.slot_bytes,
            read_bytes=layout.read_bytes,
            reasons=tuple(_reasons(case, asked, layout, self.machine.cpu)),
            label=label,
        )

    def _case(self, asked: Asked) -> _Case:
        dtype = self.choose(asked)
        facts = facts_of(self.checkpoint.config)
        found = inventory(self.checkpoint, facts, dtype.value)
        pressure = Pressure(
            run=asked.run,
            dtype_bits=DTYPES[dtype.value].bits,
            sums_apart=asked.device in (None, HOST) and sums_apart(dtype.value, self.machine.cpu.features),
            num_threads=self.machine.cpu.num_threads or self.machine.cpu.num_cores,
        )
        allocated = terms(facts, pressure)
        ids = {asked.device, HOST}
        devices = tuple(d for d in self.machine.devices if asked.device is None or d.id in ids)
        caches = cache_bytes(facts, pressure)
        between = activation_bytes(allocated)
        if len(devices) == 1:
            between = beside_cache(facts, pressure, allocated, sum(caches))
        problem = Problem(
            inventory=found,
            devices=devices,
            budgets=budgets(self.machine, asked.max_memory, self.process),
            level_bytes=self.process.level_bytes + self.process.pages_bytes,
            cache_bytes=cache_by_order(found.units, caches),
            beside=beside_by_order(facts, pressure, found.units),
            pass_bytes=between + logits_bytes(allocated),
            device_workspace_bytes=DEVICE_WORKSPACE_BYTES,
            expanding_bytes=_expanding_bytes(found),
            heap_bytes=heap_bytes(facts, pressure),
            loading=_loading(found),
            # What keeps nothing between passes has one kind of pass only.
            tokens=(asked.run.batch if facts.caches else pressure.tokens, pressure.tokens),
            num_passes=asked.run.context - asked.run.prompt_tokens if facts.caches else 0,
            speeds=speeds_of(self.machine, dtype.value),
            offload=asked.offload,
            fronts=self.process.shows_pages,
            compresses=self.process.compresses and dtype.value == "bfloat16" and _knows_both(self.machine.rates),
            host_computes=asked.device in (None, HOST),
        )
        return _Case(problem=problem, facts=facts, dtype=dtype, terms=allocated)


def _knows_both(rates: Rates) -> bool:
    """Whether both are measured between which compressing decides: with guesses it could make a run slower."""
    return rates.disk_bytes_per_s is not None and rates.expand_bytes_per_s is not None


def _loading(found: Inventory) -> Loading:
    """What loading needs beside the weights; of what cannot be read to its place, the largest counts (`load_peak`)."""
    most = 0
    for name, info in found.tensors.items():
        if name in found.rearranged:
            most = max(most, 8 * info.numel)
        # No element is wider than 16 bytes.
        elif info.strides is not None or (info.offset % 16 and not info.is_aligned):
            most = max(most, 4 * info.numel + info.nbytes)
    is_decoded = any(info.encoding is not None for info in found.tensors.values())
    is_cast = any(unit.mappable_bytes < unit.memory_bytes for unit in found.units)
    staging = DECODE_BYTES if is_decoded else CAST_BYTES if is_cast or most else 0
    return Loading(num_tensors=len(found.tensors), staging_bytes=staging, largest_bytes=most)


def _expanding_bytes(found: Inventory) -> int:
    """What an accelerator needs beside its slots to make parameters of blocks that travel to it."""
    strip = beside = 0
    for name, info in found.tensors.items():
        if info.encoding is None:
            continue
        strip = max(strip, strip_bytes(info.numel))
        beside = max(beside, found.rearranged.get(name, 0))
    return strip + beside


def _reasons(case: _Case, asked: Asked, layout: Layout, cpu: Cpu) -> Iterator[str]:
    """The choices in plain sentences."""
    yield f"dtype {case.dtype.value}: {case.dtype.reason}"
    if asked.device_map is not None and not isinstance(asked.device_map, str):
        yield "placed as the device map says"
    devices = dict.fromkeys(one.compute for one in layout.assignments)
    if HOST in devices and (cpu.num_threads or 0) > cpu.num_cores:
        cores = "1 core" if cpu.num_cores == 1 else f"{cpu.num_cores} cores"
        yield (
            f"torch computes with {cpu.num_threads} threads, but the control group gives this process the time of "
            f"{cores} only: OMP_NUM_THREADS={cpu.num_cores} is faster"
        )
    total = sum(one.unit.memory_bytes for one in layout.assignments)
    if all(one.home == one.compute for one in layout.assignments):
        yield f"all {format_bytes(total)} of weights are resident on {', '.join(devices)}"
    else:
        yield from _streaming_reasons(layout, total)
    if len(devices) > 1 and HOST in devices:
        yield "the host computes what no accelerator keeps: faster for so few tokens than moving it"


def _streaming_reasons(layout: Layout, total_bytes: int) -> Iterator[str]:
    """Those of what is brought in anew in each pass."""
    streamed = [one for one in layout.assignments if one.home != one.compute]
    kept = total_bytes - sum(one.unit.memory_bytes - one.unit.front_bytes for one in streamed)
    resident = f"{format_bytes(kept)} of {format_bytes(total_bytes)} of weights are resident"
    kinds = {one.unit.kind for one in streamed}
    in_turn = kinds - {UnitKind.EMBEDDING, UnitKind.EXPERT}
    if kinds == {UnitKind.EMBEDDING}:
        names = ", ".join(one.unit.name for one in streamed)
        yield f"{resident}; of {names} only the rows that are looked up are read"
    elif not in_turn:
        yield resident
    else:
        yield f"{resident}; what is streamed is spread evenly between them, so that it travels while they compute"
    if kinds != {UnitKind.EMBEDDING}:
        if layout.slot_bytes:
            yield (
                f"of units of more than {format_bytes(layout.slot_bytes)} the front stays, so that slots are small and "
                "no room is left over"
            )
        for one in streamed:
            if one.unit.slice_bytes:
                size = format_bytes(one.unit.slice_bytes)
                yield f"{one.unit.name} comes in slices of {size}, two of which are in memory at a time"
        compressed = sum(one.unit.compressed_bytes for one in streamed)
        if compressed:
            yield (
                f"{format_bytes(compressed)} of the rest stay compressed, without loss, and are expanded in each pass, "
                "which the processor does while the disk reads"
            )
        if any(one.unit.expert_tensors for one in streamed):
            yield "a layer comes with all of its experts, which accelerators compute with as one parameter"
        if UnitKind.EXPERT in kinds:
            yield "of experts only those come that routers choose, and those that are chosen most stay"
        served = {one.compute for one in streamed}
        if served != {HOST} and len({one.compute for one in layout.assignments}) > 1:
            yield f"what does not stay is brought to {', '.join(served)}; the others keep what they compute"
    if layout.num_slots == 1 and in_turn:
        yield "only one slot fits, so computing waits while a unit is brought in"


def _sentence(asked: Asked, machine: Machine, missing: Missing, fitting: tuple[Plan, ...]) -> str:
    """One sentence: what is missing, on what, and what to do."""
    places = [device.id for device in machine.devices if asked.device in (None, device.id)]
    ways = ", or ".join(plan.label for plan in fitting)
    forbidden = "" if asked.offload else " without streaming"
    advice = f"what fits: {ways}" if ways else "use a smaller model or more memory"
    return (
        f"the model does not fit{forbidden} on {', '.join(places)} for a context of {asked.run.context:,} and a batch "
        f"of {asked.run.batch}: {format_bytes(missing.nbytes)} are missing; {advice}."
    )
