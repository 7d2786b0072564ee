"""What must hold for every model and every machine: thousands of random ones, the same every time."""

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest
from plan_models import machine, random_model

from loadstone import compression
from loadstone.checkpoint.values import Checkpoint
from loadstone.errors import DoesNotFit
from loadstone.hardware.spec import Machine, Rates
from loadstone.plan import cost, fronts, make, slices
from loadstone.plan.budget import CONTEXT_BYTES, Process
from loadstone.plan.cost import simulate, speeds_of, transfer_s, work
from loadstone.plan.facts import facts_of
from loadstone.plan.place import run_s
from loadstone.plan.units import Inventory, inventory
from loadstone.plan.values import DISK, HOST, Asked, Plan, Run, Unit, UnitKind

# What the planner keeps free on the host and on a GPU for these small models, roughly; budgets are drawn around it.
HOST_FLOOR = 10_000_000
TOO_LITTLE = 5_000_000
GPU_FLOOR = CONTEXT_BYTES["cuda"] + 100_000_000


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """These models are a thousand times smaller than what stays of units is made for."""
    monkeypatch.setattr(fronts, "_LEAST_SLOT_BYTES", 4096)
    monkeypatch.setattr(slices, "SLICE_BYTES", (16384, 4096))
    monkeypatch.setattr(compression, "GRAIN_BYTES", 1024)
    monkeypatch.setitem(cost.PIECE_S, "disk", 1e-7)


def cases(seed: int, count: int, gpus: int = 2) -> Iterator[tuple[Random, Checkpoint, Machine, Asked]]:
    random = Random(seed)
    for _ in range(count):
        checkpoint = random_model(random)
        size = checkpoint.nbytes
        gpu_bytes = [GPU_FLOOR + int(size * random.uniform(0, 1.2)) for _ in range(random.randrange(gpus + 1))]
        host_bytes = HOST_FLOOR + int(size * random.uniform(0.1, 3))
        run = Run(context=random.randrange(1, 600), batch=random.randrange(1, 4), prompt_tokens=1)
        run = replace(run, prompt_tokens=random.randrange(1, run.context + 1))
        asked = Asked(run=run, dtype=random.choice((None, None, "float32")), offload=random.random() < 0.85)
        yield random, checkpoint, machine(host_bytes, *gpu_bytes), asked


def measured(on: Machine) -> Machine:
    """With the rates between which compressing decides."""
    return replace(on, rates=Rates(disk_bytes_per_s=1e9, expand_bytes_per_s=3e9))


def planned(checkpoint: Checkpoint, on: Machine, asked: Asked, *, compresses: bool = False) -> Plan | None:
    try:
        return make.make_plan(checkpoint, measured(on) if compresses else on, asked, Process(compresses=compresses))
    except DoesNotFit:
        return None


def units_of(checkpoint: Checkpoint, plan: Plan) -> Inventory:
    return inventory(checkpoint, facts_of(checkpoint.config), plan.dtype)


def placed_units(checkpoint: Checkpoint, plan: Plan) -> dict[str, Unit]:
    """The units that the placements name, found in the checkpoint again."""
    found = units_of(checkpoint, plan)
    return found.placed([placement.unit for placement in plan.placements])


@pytest.mark.parametrize("seed", range(4))
def test_no_budget_is_exceeded_and_every_tensor_has_one_place(seed: int) -> None:
    num_streaming = num_split = num_fronted = num_compressed = num_sliced = 0
    for _, checkpoint, on, asked in cases(seed, 300):
        plan = planned(checkpoint, on, asked, compresses=seed % 2 > 0)
        if plan is None:
            continue
        units = placed_units(checkpoint, plan)
        tensors = [name for unit in units.values() for name in unit.tensors]
        assert sorted(tensors) == sorted(checkpoint.tensors)
        assert len(units) == len(plan.placements)
        for device in plan.devices:
            free = next(one.free_bytes for one in on.devices if one.id == device.device)
            assert device.peak_bytes <= device.budget_bytes <= free
            kept = sum(one.home_bytes for one in plan.placements if one.home == device.device)
            kept += sum(one.kept_bytes for one in plan.placements if one.compute == device.device)
            kept += sum(one.spare_bytes for one in plan.placements) * (device.device == HOST)
            assert kept == device.weight_bytes + device.mapped_bytes
            slots = sorted(
                units[one.unit].slot_bytes - one.front_bytes
                for one in plan.placements
                if one.is_streamed
                and one.compute == device.device
                and one.kind.value != "embedding"
                and not one.slice_bytes
            )
            windows = sum(2 * one.slice_bytes for one in plan.placements if one.compute == device.device)
            # Slot i of the ring is as large as the i-th largest of what goes through it.
            assert device.reservation.slot_bytes >= sum(slots[-plan.num_slots :]) * (plan.num_slots > 0) + windows
        fronted = [one for one in plan.placements if one.front_bytes]
        assert all(one.is_streamed and one.compute == HOST and one.front_bytes <= one.home_bytes for one in fronted)
        assert all(units[one.unit].slot_bytes - one.front_bytes == plan.slot_bytes for one in fronted)
        num_fronted += bool(fronted)
        compressed = [one for one in plan.placements if one.compressed_bytes]
        assert all(one.is_streamed and one.compute == HOST for one in compressed)
        assert all(one.moved_bytes <= one.home_bytes - one.front_bytes for one in compressed)
        assert all(
            units[one.unit].slot_bytes - one.front_bytes - one.compressed_bytes - (plan.read_bytes or 0) in range(1024)
            for one in compressed
        )
        num_compressed += bool(compressed)
        sliced = [one for one in plan.placements if one.slice_bytes]
        assert all(one.is_streamed and one.kind is UnitKind.HEAD and one.compute == HOST for one in sliced)
        assert all(2 * one.slice_bytes < one.home_bytes == one.moved_bytes for one in sliced)
        num_sliced += bool(sliced)
        homes = {device.device for device in plan.devices} | {DISK}
        assert {one.home for one in plan.placements} <= homes
        assert asked.offload or not plan.streams
        num_streaming += plan.streams
        num_split += len(plan.placements) > len(units_of(checkpoint, plan).units)
    assert num_streaming > 50
    assert num_split > 20
    assert num_fronted > 3, num_fronted
    assert num_sliced > 3, num_sliced
    assert seed % 2 == 0 or num_compressed > 3, num_compressed


def test_tied_tables_are_one_unit_that_is_wanted_whole() -> None:
    for _, checkpoint, on, asked in cases(10, 100):
        plan = planned(checkpoint, on, asked)
        if plan is not None and (checkpoint.config or {})["tie_word_embeddings"]:
            heads = [one for one in plan.placements if one.kind.value == "head"]
            assert [one.unit for one in heads] == ["model.embed_tokens"]
            assert (
                not heads[0].is_streamed
                or heads[0].moved_bytes + heads[0].front_bytes >= checkpoint.tensors[f"{heads[0].unit}.weight"].nbytes
            )


def walk(
    checkpoint: Checkpoint, plan: Plan, on: Machine, streamed: set[str] | None = None
) -> list[tuple[float, float]]:
    """The steps of a decoding pass on the host; with other units streamed where they are given.

    Less a head that comes in slices, which goes through no slot, in this plan and in the others.
    """
    speeds, units = speeds_of(measured(on), plan.dtype), placed_units(checkpoint, plan)
    if streamed is None:
        units |= {
            one.unit: replace(units[one.unit], front_bytes=one.front_bytes, compressed_bytes=one.compressed_bytes)
            for one in plan.placements
        }
    away = {one.unit for one in plan.placements if one.is_streamed} if streamed is None else streamed
    tokens = plan.prediction.decode.tokens
    return [
        (
            work(units[one.unit], speeds.compute[HOST], units[one.unit].num_tokens((tokens, tokens), 0)).seconds
            + units[one.unit].compressed_bytes / speeds.expand,
            transfer_s(units[one.unit], tokens, speeds.way(DISK, HOST)) if one.unit in away else 0.0,
        )
        for one in plan.placements
        if not one.slice_bytes
    ]


@pytest.mark.parametrize("seed", [20, 21])
def test_a_plan_is_never_slower_than_streaming_everything_or_a_contiguous_part(seed: int) -> None:
    compared = 0
    for _, checkpoint, on, asked in cases(seed, 220, gpus=0):
        plan = planned(checkpoint, on, asked, compresses=seed % 2 > 0)
        if plan is None or not plan.streams or plan.num_slots == 0:
            continue
        seconds = simulate(walk(checkpoint, plan, on), plan.num_slots, num_passes=6)
        everything = {one.unit for one in plan.placements}
        assert seconds <= simulate(walk(checkpoint, plan, on, everything), plan.num_slots, num_passes=6) * (1 + 1e-9)
        # As many bytes of blocks, but the last ones of the walk.
        away = [one for one in plan.placements if one.is_streamed and one.kind.value == "block"]
        blocks = [one for one in plan.placements if one.kind.value == "block" and one.compute == HOST]
        rest = {one.unit for one in plan.placements if one.is_streamed} - {one.unit for one in away}
        contiguous = {one.unit for one in blocks[len(blocks) - len(away) :]} | rest
        moved = sum(step[1] for step in walk(checkpoint, plan, on, contiguous))
        if moved >= sum(step[1] for step in walk(checkpoint, plan, on)) * (1 - 1e-9):
            compared += 1
            assert seconds <= simulate(walk(checkpoint, plan, on, contiguous), plan.num_slots, num_passes=6) * (
                1 + 1e-9
            )
    assert compared > 10


@pytest.mark.parametrize(("seed", "gpus"), [(30, 0), (130, 0), (31, 1), (32, 2), (332, 2), (33, 3)])
def test_more_memory_is_never_slower(seed: int, gpus: int) -> None:
    random = Random(seed)
    for _ in range(60 if gpus == 0 else 20):
        checkpoint = random_model(random)
        run = Run(context=400, batch=random.randrange(1, 3), prompt_tokens=random.randrange(1, 300))
        asked = Asked(run=run)
        host = HOST_FLOOR + int(checkpoint.nbytes * random.uniform(0.2, 1.5))
        best = float("inf")
        for step in range(12):
            grown = int(checkpoint.nbytes * 0.12 * step)
            on = machine(host + 32_000_000 * (gpus > 1) if gpus else HOST_FLOOR + grown, *[GPU_FLOOR + grown] * gpus)
            plan = planned(checkpoint, on, asked, compresses=seed > 100)
            assert plan is not None or best == float("inf")
            if plan is not None:
                predicted = plan.prediction
                passes = run.context - run.prompt_tokens
                seconds = run_s((predicted.decode.seconds, predicted.prefill.seconds), passes)
                assert seconds <= best * (1 + 1e-9)
                best = seconds


def test_the_shortfall_is_exactly_what_is_missing() -> None:
    checked = 0
    for _, checkpoint, _, asked in cases(40, 100, gpus=0):
        on = machine(TOO_LITTLE)
        with pytest.raises(DoesNotFit) as caught:
            make.make_plan(checkpoint, on, asked)
        missing = caught.value.shortfall_bytes
        # 5 % of free memory is left alone where no budget is named, so name one.
        for extra, fits in ((0, True), (-1, False)):
            budget = int(TOO_LITTLE * 0.95) + missing + extra
            given = replace(asked, max_memory={HOST: budget})
            assert (planned(checkpoint, machine(10**12), given) is not None) is fits
        checked += 1
    assert checked == 100


def test_alternatives_fit_and_say_what_is_different() -> None:
    found: set[str] = set()
    for random, checkpoint, on, asked in cases(50, 60):
        tight = replace(asked, run=Run(context=600, prompt_tokens=500, batch=2), max_memory={HOST: 1}, device=HOST)
        with pytest.raises(DoesNotFit) as caught:
            make.make_plan(checkpoint, on, tight)
        nearly = replace(tight, max_memory={HOST: 1 + int(caught.value.shortfall_bytes * random.uniform(0.97, 0.9999))})
        with pytest.raises(DoesNotFit) as caught:
            make.make_plan(checkpoint, on, nearly)
        for plan in caught.value.alternatives:
            found.add(plan.label.partition(":")[0])
            assert plan.label in str(caught.value)
            assert all(device.peak_bytes <= device.budget_bytes for device in plan.devices)
    assert found >= {
        "with all the memory that is free",
        "in bfloat16",
        "a context of 300",
        "a context of 150",
        "streaming from disk",
    }
