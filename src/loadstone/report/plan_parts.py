"""A plan cut into what a picture shows: the parts of a device's memory, the cells of the strip of layers, sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby

from loadstone.plan.values import DISK, DevicePlan, Pass, Placement, Plan, UnitKind
from loadstone.units import format_bytes, format_seconds

_KINDS = {UnitKind.EMBEDDING: "emb", UnitKind.HEAD: "head"}
_BOUND_BY = {"disk": "the disk", "link": "the link", "memory": "memory bandwidth"}


class Part(Enum):
    """What a piece of a device's memory is for, in the order of the bar."""

    LEVEL = "process and imports"
    WEIGHTS = "weights"
    MAPPED = "weights mapped from files"
    KV_CACHE = "KV cache"
    ACTIVATIONS = "activations"
    SLOTS = "slots"
    WORKSPACE = "workspace"
    FREE = "free"


class Residence(Enum):
    """Where a unit is between two passes, seen from the device that computes with it."""

    RESIDENT = "resident"
    MAPPED = "resident, mapped from files"
    FROM_MEMORY = "streamed from RAM"
    FROM_DISK = "streamed from disk"

    # Members exist once, so that their identity serves; Enum's own hash is Python and slow.
    __hash__ = object.__hash__


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One place of the strip: a layer, or all experts of a layer.

    Attributes:
        column: its place in execution, from 0; a layer and its experts have the same.
        label: a few letters: the number of a block, else what it is.
        name: of the unit, or the common start of the units' names.
        kind: `UnitKind.EXPERT` for the experts of a layer, else what its first unit is.
        placements: of its units.
        residences: how many of the units are where, and what they take there; see `by_residence`.
    """

    column: int
    label: str
    name: str
    kind: UnitKind
    placements: tuple[Placement, ...]
    residences: Mapping[Residence, tuple[int, int]]

    @property
    def compute(self) -> str:
        """The devices that compute with it."""
        return ", ".join(dict.fromkeys(placement.compute for placement in self.placements))

    @property
    def bytes_by_residence(self) -> dict[Residence, int]:
        """What its units take at home, by where that is."""
        return {residence: nbytes for residence, (_, nbytes) in self.residences.items()}

    @property
    def moved_bytes(self) -> int:
        """What travels in each pass."""
        return sum(placement.moved_bytes for placement in self.placements)


def parts_of(device: DevicePlan) -> dict[Part, int]:
    """The bytes of each part of a device's budget; the parts that are empty are left out."""
    reservation = device.reservation
    nbytes = {
        Part.LEVEL: device.level_bytes,
        Part.WEIGHTS: device.weight_bytes,
        Part.MAPPED: device.mapped_bytes,
        Part.KV_CACHE: reservation.kv_cache_bytes,
        Part.ACTIVATIONS: reservation.activation_bytes + reservation.logits_bytes,
        Part.SLOTS: reservation.slot_bytes,
        Part.WORKSPACE: reservation.workspace_bytes,
        Part.FREE: device.free_bytes,
    }
    return {part: size for part, size in nbytes.items() if size > 0}


def residence(placement: Placement) -> Residence:
    """Where a unit is between two passes."""
    if placement.is_streamed:
        return Residence.FROM_DISK if placement.home == DISK else Residence.FROM_MEMORY
    return Residence.MAPPED if placement.mapped else Residence.RESIDENT


def by_residence(placements: Iterable[Placement]) -> dict[Residence, tuple[int, int]]:
    """How many units are in each residence and what they take there, in the order of `Residence`.

    A unit of which some stays is in two, with the memory that this takes.
    """
    found: dict[Residence, tuple[int, int]] = {}
    for placement in placements:
        kind = residence(placement)
        number, nbytes = found.get(kind, (0, 0))
        found[kind] = (number + 1, nbytes + placement.home_bytes - placement.front_bytes - placement.compressed_bytes)
        if placement.is_streamed and placement.kept_bytes:
            number, nbytes = found.get(Residence.RESIDENT, (0, 0))
            found[Residence.RESIDENT] = (number + 1, nbytes + placement.kept_bytes)
    return {kind: found[kind] for kind in Residence if kind in found}


def cells_of(plan: Plan) -> tuple[Cell, ...]:
    """The strip in execution order; the experts of a layer are one cell that follows it in the same column."""
    cells = []
    ordered = sorted(plan.placements, key=lambda placement: placement.order)
    for column, (_, members) in enumerate(groupby(ordered, key=lambda placement: placement.order)):
        experts: list[Placement] = []
        layer: list[Placement] = []
        for placement in members:
            (experts if placement.kind is UnitKind.EXPERT else layer).append(placement)
        cells += [_cell(column, together) for together in (layer, experts) if together]
    return tuple(cells)


def _cell(column: int, placements: Sequence[Placement]) -> Cell:
    first = placements[0]
    name = first.unit
    if first.kind is UnitKind.EXPERT:
        name = name.rpartition(".")[0] or name
    elif len(placements) > 1:
        name = f"{name} and {len(placements) - 1} more"
    return Cell(
        column=column,
        label=_label(first),
        name=name,
        kind=first.kind,
        placements=tuple(placements),
        residences=by_residence(placements),
    )


def _label(placement: Placement) -> str:
    components = placement.unit.split(".")
    numbers = [component for component in components if component.isdecimal()]
    if numbers and placement.kind in {UnitKind.BLOCK, UnitKind.EXPERT}:
        # The last number of an expert's name is its own, the one before it is its layer's.
        return numbers[-2] if placement.kind is UnitKind.EXPERT and len(numbers) > 1 else numbers[-1]
    return _KINDS.get(placement.kind, components[-1][:4])


def title(plan: Plan) -> str:
    """What the plan is for."""
    return f"{plan.identity.architecture or 'Weights'} from {plan.identity.source}"


def subject(plan: Plan) -> str:
    """Sizes and use."""
    stored = format_bytes(plan.identity.stored_bytes)
    files = f"{plan.dtype}, {plan.identity.num_tensors:,} tensors, {stored} in the files"
    run = plan.run
    if not plan.prediction.generates:
        return f"{files}; batch {run.batch:,}, {run.prompt_tokens:,} tokens each"
    return f"{files}; context {run.context:,} tokens, batch {run.batch:,}, prompt {run.prompt_tokens:,} tokens"


def occupancy(device: DevicePlan) -> str:
    """Peak and budget, and what is wrong if the one is above the other."""
    figures = f"peak {format_bytes(device.peak_bytes)} of {format_bytes(device.budget_bytes)}"
    return f"{figures}: {format_bytes(-device.free_bytes)} too much" if device.free_bytes < 0 else figures


def resident_units(placements: Iterable[Placement]) -> list[tuple[Residence, str]]:
    """The legend of the strip: for each residence the numbers of units and experts, and their bytes."""
    listed = list(placements)
    of_experts = by_residence(placement for placement in listed if placement.kind is UnitKind.EXPERT)
    found = []
    for kind, (number, nbytes) in by_residence(listed).items():
        experts, _ = of_experts.get(kind, (0, 0))
        counts = [_counted(number - experts, "unit"), _counted(experts, "expert")]
        found.append((kind, f"{' and '.join(filter(None, counts))}, {format_bytes(nbytes)}"))
    return found


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}" if number else ""


def moved_by(plan: Plan) -> str:
    """How what is streamed travels."""
    if plan.num_slots:
        return f"through {_counted(plan.num_slots, 'slot')}"
    if any(placement.slice_bytes for placement in plan.placements):
        return "slices of the head"
    return "rows that are looked up" if plan.streams else "everything is resident"


def bound_by(word: str) -> str:
    """What a pass or a load waits for, as it stands in a sentence."""
    return f"bound by {_BOUND_BY.get(word, word)}"


def passes_of(plan: Plan) -> tuple[tuple[str, Pass], ...]:
    """The kinds of pass with their names; of a model that does not generate there is only one."""
    if not plan.prediction.generates:
        return (("pass", plan.prediction.decode),)
    return ("prompt", plan.prediction.prefill), ("token", plan.prediction.decode)


def format_speed(plan: Plan) -> str:
    """How much is done in a second, with three significant figures: tokens, or sequences where none are generated."""
    rate, noun = plan.prediction.tokens_per_s, "tokens/s"
    if not plan.prediction.generates:
        seconds = plan.prediction.decode.seconds
        rate, noun = plan.run.batch / seconds if seconds else 0.0, "sequences/s"
    return f"{rate:,.0f} {noun}" if rate >= 99.95 else f"{rate:.3g} {noun}"


def prediction_line(plan: Plan) -> str:
    """How long things take, and how far that can be trusted."""
    prediction = plan.prediction
    basis = "from rates measured here" if prediction.measured else "estimated from typical rates, not measured here"
    load = f"load {format_seconds(prediction.load_s)} ({bound_by(prediction.load_bound_by)})"
    first, later = (format_seconds(one.seconds) for one in (prediction.prefill, prediction.decode))
    run = f"the first token after {first}" if prediction.generates else f"{later} a pass"
    return f"{load}, then {run} and {format_speed(plan)}: {basis}"
