"""The second half of a load, with torch: class, skeleton, key map, tensors, finish. One stage after the other."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from math import prod

import torch
from torch import nn

from loadstone.api.begun import Begun
from loadstone.api.computed import Known, with_computed
from loadstone.api.planned import main_device
from loadstone.api.reported import FinishReport, Told, reporter
from loadstone.architecture.blueprint import Blueprint, Surroundings
from loadstone.architecture.keymap import Assignment, KeyMap, Target
from loadstone.architecture.keymap_text import keymap_line, keymap_samples
from loadstone.architecture.match import Rules, check_assignments, check_missing, check_unexpected, unwrapped
from loadstone.architecture.plain import PlainModule
from loadstone.architecture.skeleton import Slot, slots_of
from loadstone.checkpoint.values import Checkpoint, Format
from loadstone.dtypes import DTYPES
from loadstone.execute.adopt import Origin, adopting, homes_of
from loadstone.execute.attach import attach
from loadstone.execute.residency import Residency
from loadstone.execute.streamed import Streamed, by_modules, choose_streamed
from loadstone.hardware.probe import devices_here
from loadstone.plan.choose import Choice, choose_device
from loadstone.plan.load_peak import load_peak
from loadstone.plan.values import HOST
from loadstone.report.streaming import beside_slots
from loadstone.stream.materialize import Materialized, Materializer, torch_dtype
from loadstone.stream.refill import Wanted as Filled
from loadstone.stream.transfer import torch_device
from loadstone.units import format_bytes

# How many names a stage shows to those who want to see how loading works.
_SAMPLES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mapped:
    """A module on meta and what will fill it."""

    module: nn.Module
    slots: Mapping[str, Slot]
    keymap: KeyMap
    targets: Mapping[str, Target]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """A model that is ready.

    Attributes:
        model: the module.
        finish_report: makes the report once peak memory and time are known.
        residency: what keeps the model running, where parts of it are streamed.
        origin: where its parameters come from.
    """

    model: nn.Module
    finish_report: FinishReport
    residency: Residency | None
    origin: Origin


def assemble(begun: Begun) -> Assembled:
    """Build the module and fill it.

    Args:
        begun: headers, choices, and the bytes that are under way.

    Returns:
        The module, with what belongs to it.
    """
    recorder = begun.recorder
    blueprint = _blueprint(begun)
    with recorder.stage("skeleton") as told:
        module = blueprint.build(torch_dtype(begun.dtype.value))
        slots = slots_of(module)
        told.text = f"{blueprint.name} on meta, {len(slots):,} tensors, no memory"
        told.lines = tuple(f"{slot.fqn} {list(slot.shape)} {slot.dtype}" for slot in islice(slots.values(), _SAMPLES))
    device = _device(begun, slots)
    begun, checkpoint = _unwrapped(begun, slots, module)
    materializer = Materializer(checkpoint, begun.ahead, torch_device(device.value))
    with recorder.stage("key map") as told:
        mapped = _map(begun, blueprint, module, slots, (checkpoint, materializer))
        told.text = keymap_line(mapped.keymap, len(checkpoint.tensors))
        told.lines = keymap_samples(mapped.keymap, _SAMPLES)
        begun, mapped, checkpoint = _computed(begun, mapped, checkpoint, materializer)
        notes = (*checkpoint.notes, *mapped.notes)
        streamed = _streamed(begun, mapped, checkpoint)
        resident = _without(mapped.keymap, streamed)
        notes += tuple(streamed.notes)
        elsewhere = _elsewhere(begun, resident)
        resident_there = _on_host(resident, checkpoint, device.value, elsewhere)
        foretold = load_peak(resident_there, checkpoint.tensors, mapped.targets, begun.ahead.is_mappable)
        if not mapped.keymap.conversions:  # what conversions make is known only when they have run
            notes += _check_missing(begun, blueprint, mapped, set(mapped.targets))
    with recorder.stage("tensors") as told:
        made = materializer.run(resident, mapped.targets, elsewhere)
        told.text = _placed(blueprint, module, made, streamed)
        told.lines = tuple(_tensor_line(made, fqn) for fqn in islice(made.tensors, _SAMPLES))
    with recorder.stage("ties, buffers, eval") as told:
        if mapped.keymap.conversions:
            notes += _check_missing(begun, blueprint, mapped, {*made.tensors, *streamed.stand_ins})
        missing = set(slots) - {*made.tensors, *streamed.stand_ins}
        told.text = blueprint.finish(module, missing, torch_device(device.value)) + "; eval mode"
    with recorder.stage("generation config") as told:
        told.text = _generation_config(begun, module)
    origin = _origin(mapped, checkpoint, module, made.tensors)
    residency = _made_to_run(begun, module, streamed, origin)
    foretold = replace(foretold, streaming_bytes=_streaming_bytes(begun, residency))
    finish_report = reporter(begun, blueprint, module, made, Told(device=device, foretold=foretold, notes=notes))
    return Assembled(model=module, finish_report=finish_report, residency=residency, origin=origin)


def _placed(blueprint: Blueprint, module: nn.Module, made: Materialized, streamed: Streamed) -> str:
    """Put tensors, and what stands for those that are streamed, into the module; gives a line about them."""
    blueprint.place(module, {**made.tensors, **streamed.stand_ins})
    streamed.note_placed(module)
    return f"{format_bytes(made.mapped_bytes)} mapped where they lie, {format_bytes(made.read_bytes)} read and decoded"


def _unwrapped(begun: Begun, slots: Mapping[str, Slot], module: nn.Module) -> tuple[Begun, Checkpoint]:
    """The checkpoint without what a wrapper put in front of its names, and the same with what is said of them."""
    checkpoint = unwrapped(begun.checkpoint, slots, getattr(module, "base_model_prefix", ""))
    if checkpoint is begun.checkpoint:
        return begun, checkpoint
    names = dict(zip(begun.checkpoint.tensors, checkpoint.tensors, strict=True))
    streaming = None if begun.streaming is None else begun.streaming.renamed(names)
    devices = {names[name]: device for name, device in begun.devices.items()}
    return replace(begun, streaming=streaming, devices=devices), checkpoint


def _origin(mapped: _Mapped, checkpoint: Checkpoint, module: nn.Module, loaded: Mapping[str, torch.Tensor]) -> Origin:
    targets = mapped.targets
    wanted = {one.target: Filled(assignment=one, target=targets[one.target]) for one in mapped.keymap.assignments}
    homes = homes_of(module, {fqn: tensor for fqn, tensor in loaded.items() if fqn in wanted})
    return Origin(checkpoint=checkpoint, wanted=wanted, homes=homes)


def _computed(
    begun: Begun, mapped: _Mapped, checkpoint: Checkpoint, materializer: Materializer
) -> tuple[Begun, _Mapped, Checkpoint]:
    """The same, with what torch has to compute of streamed parts in a file of its own."""
    if begun.streaming is None or not mapped.keymap.conversions:
        return begun, mapped, checkpoint
    known = Known(checkpoint=checkpoint, keymap=mapped.keymap, targets=mapped.targets, streaming=begun.streaming)
    belongs_to = (type(mapped.module).__qualname__, checkpoint.config)
    known = with_computed(known, mapped.slots, belongs_to, materializer.source)
    materializer.know(known.checkpoint)
    if known.in_use is not None:
        weakref.finalize(mapped.module, known.in_use.close)
    mapped = replace(mapped, keymap=known.keymap, targets=known.targets, notes=(*mapped.notes, *known.notes))
    return replace(begun, streaming=known.streaming), mapped, known.checkpoint


def _streamed(begun: Begun, mapped: _Mapped, checkpoint: Checkpoint) -> Streamed:
    streaming = begun.streaming
    if streaming is None:
        return Streamed()
    if streaming.unit_of:
        streaming = by_modules(mapped.keymap, streaming)
    return choose_streamed(mapped.module, mapped.keymap, mapped.targets, checkpoint, streaming)


def _without(keymap: KeyMap, streamed: Streamed) -> KeyMap:
    kept = [assignment for assignment in keymap.assignments if assignment.target not in streamed.wanted]
    return replace(keymap, assignments=tuple(kept))


def _made_to_run(begun: Begun, module: nn.Module, streamed: Streamed, origin: Origin) -> Residency | None:
    """Have a module run that is not wholly in the memory of one device; gives its residency, if it is streamed."""
    residency = _attached(begun, module, streamed, origin)
    if begun.devices:
        with begun.recorder.stage("dispatch") as told:
            from loadstone.execute.dispatch import dispatch

            told.text = f"inputs go to {dispatch(module)}, and from there to where each module is"
    return residency


def _attached(begun: Begun, module: nn.Module, streamed: Streamed, origin: Origin) -> Residency | None:
    """The residency of a model that is streamed, told as a stage."""
    streaming = begun.streaming
    if streaming is None or not streamed.wanted:
        return None
    with begun.recorder.stage("streaming") as told:
        adopt = partial(adopting, module, origin)
        residency = attach(module, streamed, origin.checkpoint, streaming, begun.recorder.observer, adopt)
        residency.start(begun.plan.devices[-1].reservation.total_bytes if begun.plan is not None else 0)
        stats = residency.stats()
        told.text = (
            f"{stats.num_units} units, {format_bytes(stats.pass_bytes)} in each pass, through {stats.num_slots} slots "
            f"of {format_bytes(stats.slot_bytes)} together"
        )
        told.text += beside_slots(stats)
        if stats.room_bytes:
            told.text += f"; of experts those that are chosen, of which {format_bytes(stats.room_bytes)} stay"
    return residency


def _elsewhere(begun: Begun, keymap: KeyMap) -> dict[str, torch.device]:
    """Where tensors go, by fqn, and what conversions make, by their names; empty where one device computes."""
    filled = {one.target: one.parts[0].source for one in keymap.assignments}
    filled |= {one.name: one.sources[0] for one in keymap.conversions if one.sources}
    return {fqn: torch_device(begun.devices[name]) for fqn, name in filled.items() if name in begun.devices}


def _on_host(keymap: KeyMap, checkpoint: Checkpoint, device: str, elsewhere: Mapping[str, torch.device]) -> KeyMap:
    """What fills host memory: what stays there, and what is decoded, rearranged or converted there on its way."""
    usual = torch_device(device)

    def passes(one: Assignment) -> bool:
        infos = (checkpoint.tensors[part.source] for part in one.parts)
        return one.is_plain and all(info.encoding is None and info.strides is None for info in infos)

    kept = [one for one in keymap.assignments if elsewhere.get(one.target, usual).type == HOST or not passes(one)]
    return replace(keymap, assignments=tuple(kept))


def _streaming_bytes(begun: Begun, residency: Residency | None) -> int:
    """What streaming takes of the host's memory."""
    if residency is None or begun.streaming is None or begun.streaming.device != HOST:
        return 0
    return residency.stats().memory_bytes


def _blueprint(begun: Begun) -> Blueprint:
    request = begun.request
    if request.into is not None:
        return PlainModule(factory=request.into, config=request.config, rename=request.rename, convert=request.convert)
    with begun.recorder.stage("class") as told:
        from loadstone.architecture.transformers import Wanted, describe
        from loadstone.architecture.transformers_model import TransformersModel

        config = begun.checkpoint.config or {}
        described = describe(
            config,
            Wanted(
                root=begun.checkpoint.root,
                name=request.name,
                architecture=request.architecture,
                attn_implementation=request.attn_implementation,
                trust_remote_code=request.trust_remote_code,
                described_in=_described_in(begun),
            ),
        )
        blueprint = TransformersModel(
            described=described,
            tolerates_unexpected=request.architecture is not None
            and described.model_class.__name__ not in (config.get("architectures") or ()),
        )
        told.text = (
            f'model_type "{config.get("model_type")}" -> {type(described.config).__name__}; {blueprint.chosen_by} -> '
            f"{described.model_class.__module__}.{blueprint.name}"
        )
        told.lines = (
            f'model_type "{config.get("model_type")}" -> {type(described.config).__module__}.'
            f"{type(described.config).__name__}",
            f"{blueprint.chosen_by} -> {described.model_class.__module__}.{blueprint.name}",
        )
    return blueprint


def _described_in(begun: Begun) -> str:
    if begun.checkpoint.format is Format.GGUF:
        return "the GGUF header"
    if begun.checkpoint.params is not None and not (begun.checkpoint.root / "config.json").exists():
        return "params.json"
    return "config.json"


def _device(begun: Begun, slots: Mapping[str, Slot]) -> Choice:
    with begun.recorder.stage("placement") as told:
        nbytes = sum(prod(slot.shape) * DTYPES[slot.dtype].bits // 8 for slot in slots.values() if slot.dtype in DTYPES)
        wanted = begun.request.device if begun.plan is None else main_device(begun.plan)
        wanted = wanted if begun.plan is not None or begun.streaming is None else begun.streaming.device
        device = choose_device(devices_here(), wanted, nbytes)
        others = [one for one in dict.fromkeys(begun.devices.values()) if one != device.value]
        if others:
            device = replace(device, reason=f"the first block computes there; others on {', '.join(others)}")
        told.text = f"{device.value}: {device.reason}"
    return device


def _map(
    begun: Begun,
    blueprint: Blueprint,
    module: nn.Module,
    slots: Mapping[str, Slot],
    sources: tuple[Checkpoint, Materializer],
) -> _Mapped:
    checkpoint, materializer = sources
    rules = _rules(begun)
    # A plain module keeps what is stored unless a dtype is asked for.
    stays = begun.request.into is not None and begun.request.dtype in (None, "auto")
    dtypes = blueprint.dtypes(module, slots, None if stays else begun.dtype.value)
    around = Surroundings(checkpoint=checkpoint, slots=slots, dtypes=dtypes, source=materializer.source)
    keymap = check_assignments(blueprint.map_keys(module, around), slots, checkpoint, rules)
    left_over = set(keymap.unexpected)
    known = blueprint.expected_unexpected(module, left_over)
    tolerant = blueprint.tolerates_unexpected
    unexpected = [name for name in keymap.unexpected if name not in known]
    notes = [*keymap.notes, *check_unexpected(unexpected, slots, replace(rules, strict=rules.strict and not tolerant))]
    if known:
        notes.append(
            f"{len(known)} tensors that the class no longer uses were left out: {', '.join(sorted(known)[:3])}"
        )
    notes.extend(_kept_dtypes(dtypes, begun.dtype.value, slots))
    targets = {
        assignment.target: Target(
            shape=slots[assignment.target].shape,
            dtype=dtypes[assignment.target] or _stored_dtype(assignment, checkpoint, slots),
        )
        for assignment in keymap.assignments
    }
    return _Mapped(module=module, slots=slots, keymap=keymap, targets=targets, notes=tuple(notes))


def _stored_dtype(assignment: Assignment, checkpoint: Checkpoint, slots: Mapping[str, Slot]) -> str:
    stored = checkpoint.tensors[assignment.parts[0].source].dtype
    return stored if DTYPES[stored].floating else slots[assignment.target].dtype


def _rules(begun: Begun) -> Rules:
    request = begun.request
    return Rules(where=request.name, strict=request.strict, allow_missing=request.allow_missing)


def _kept_dtypes(dtypes: Mapping[str, str | None], main: str, slots: Mapping[str, Slot]) -> list[str]:
    kept = [
        (dtype, fqn)
        for fqn, dtype in dtypes.items()
        if dtype is not None and dtype != main and DTYPES[dtype].floating and not slots[fqn].is_buffer
    ]
    return [
        f"{count} tensors kept in {dtype}, as their class wants: {next(fqn for kind, fqn in kept if kind == dtype)}"
        + (", ..." if count > 1 else "")
        for dtype, count in Counter(dtype for dtype, _ in kept).items()
    ]


def _tensor_line(made: Materialized, fqn: str) -> str:
    tensor = made.tensors[fqn]
    return f"{fqn} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _check_missing(begun: Begun, blueprint: Blueprint, mapped: _Mapped, filled: set[str]) -> tuple[str, ...]:
    missing = set(mapped.slots) - filled
    faults = missing - blueprint.expected_missing(mapped.module, missing)
    return check_missing(faults, mapped.keymap.unexpected, _rules(begun))


def _generation_config(begun: Begun, module: nn.Module) -> str:
    if begun.request.into is not None:
        return "none: not a transformers class"
    from loadstone.architecture.transformers import adopt_generation_config

    return adopt_generation_config(module, begun.checkpoint.root)
