"""What is streamed of a model is what does not fit, and no more: fronts of units stay, and slots are small."""

from dataclasses import replace
from random import Random

import pytest
from plan_models import llama, machine

from loadstone.checkpoint.values import Checkpoint
from loadstone.hardware.spec import Rates
from loadstone.plan.budget import Process
from loadstone.plan.facts import facts_of
from loadstone.plan.fronts import Split, divided, is_divisible, splits
from loadstone.plan.make import make_plan
from loadstone.plan.units import inventory
from loadstone.plan.values import HOST, Asked, Plan, Run, Unit, UnitKind

MODEL = llama(layers=14, width=3584, inner=18_944, vocab=20_000)
ASKED = Asked(run=Run(context=100, prompt_tokens=50), max_memory={HOST: 5_000_000_000})
WHOLE = Process(shows_pages=False)


def made(
    model: Checkpoint = MODEL,
    asked: Asked = ASKED,
    process: Process | None = None,
    disk: float = 1e9,
    expand: float | None = 6e9,
) -> Plan:
    rates = Rates(disk_bytes_per_s=disk, expand_bytes_per_s=expand)
    return make_plan(model, machine(10**12, rates=rates), asked, process)


def units() -> list[Unit]:
    found = inventory(MODEL, facts_of(MODEL.config), "bfloat16")
    return [part for unit in found.units for part in found.parts(unit)]


def test_no_room_is_left_over_and_slots_are_small() -> None:
    plan, whole = made(), made(process=WHOLE)
    assert not whole.slot_bytes
    assert plan.devices[-1].free_bytes < 1 << 20 < whole.devices[-1].free_bytes
    assert plan.devices[-1].reservation.slot_bytes < whole.devices[-1].reservation.slot_bytes / 2
    saved = whole.devices[-1].free_bytes + whole.devices[-1].reservation.slot_bytes
    saved -= plan.devices[-1].free_bytes + plan.devices[-1].reservation.slot_bytes
    assert plan.streamed_bytes == pytest.approx(whole.streamed_bytes - saved, abs=1 << 22)
    assert plan.prediction.decode.seconds < whole.prediction.decode.seconds
    assert any("the front stays" in reason for reason in plan.reasons)
    assert not any("the front stays" in reason for reason in whole.reasons)


def test_a_front_is_what_a_unit_has_more_than_a_slot() -> None:
    plan = made()
    sizes = {unit.name: unit.slot_bytes for unit in units()}
    streamed = [one for one in plan.placements if one.is_streamed and one.kind is not UnitKind.EMBEDDING]
    assert streamed
    for one in streamed:
        assert sizes[one.unit] - one.front_bytes == min(sizes[one.unit], plan.slot_bytes)
        assert one.moved_bytes == one.home_bytes - one.front_bytes
    assert all(not one.front_bytes for one in plan.placements if not one.is_streamed)
    assert plan.devices[-1].weight_bytes == sum(one.front_bytes for one in plan.placements)


def test_loading_brings_the_fronts_in() -> None:
    plan, whole = made(), made(process=WHOLE)
    fronts = sum(one.front_bytes for one in plan.placements)
    kept = [sum(one.home_bytes for one in each.placements if not one.is_streamed) for each in (plan, whole)]
    assert fronts + kept[0] > kept[1]
    assert plan.prediction.load_s == pytest.approx((fronts + kept[0]) / 1e9)


@pytest.mark.parametrize(
    ("asked", "model"),
    [
        (replace(ASKED, dtype="float32"), MODEL),  # a part of a cast is none of a file
        (replace(ASKED, max_memory={HOST: 20_000_000_000}), MODEL),  # everything fits
        (replace(ASKED, max_memory={HOST: 700_000_000}), llama(layers=9, width=512, inner=2048, experts=16)),
    ],
)
def test_there_are_none_where_they_cannot_be(asked: Asked, model: Checkpoint) -> None:
    plan = made(model, asked)
    assert (plan.slot_bytes, sum(one.front_bytes for one in plan.placements)) == (0, 0)


def test_there_are_none_where_computing_takes_longer_anyway() -> None:
    assert not made(disk=18e9).slot_bytes  # computing reads 20 GB/s


def test_an_accelerator_has_none() -> None:
    on = machine(6_000_000_000, 4_000_000_000, rates=Rates(disk_bytes_per_s=1e9))
    plan = make_plan(MODEL, on, replace(ASKED, max_memory={}, device="cuda:0"))
    assert plan.streams
    assert not plan.slot_bytes


def test_slots_are_as_small_as_the_room_allows() -> None:
    random, divisible = Random(0), [unit for unit in units() if is_divisible(unit)]
    total = sum(unit.memory_bytes for unit in divisible)
    tried = 0
    for _ in range(40):
        room, num_slots = int(total * random.uniform(0.05, 1.0)), random.choice((1, 2, 3))
        for split in splits(divisible, room, num_slots):
            tried += 1
            slot = split.slot_bytes
            assert slot % 4096 == 0
            assert split.read_bytes is None

            def least(slot: int, num_slots: int = num_slots) -> int:
                return num_slots * slot + sum(unit.front_bytes for unit in divided(divisible, Split(slot_bytes=slot)))

            assert least(slot) <= room
            stay = sum(unit.memory_bytes for unit in divisible if unit.slot_bytes <= slot)
            if slot > 1 << 20 and stay == 0:
                assert least(slot - 4096) > room - len(divisible) * 3 * 8192
    assert tried > 60


COMPRESSES = Process(compresses=True)


def test_what_is_compressed_is_not_read() -> None:
    plan, fronts = made(process=COMPRESSES), made()
    assert plan.devices[-1].peak_bytes <= plan.devices[-1].budget_bytes
    assert plan.devices[-1].free_bytes < 1 << 24
    assert plan.streamed_bytes < 0.85 * fronts.streamed_bytes
    assert plan.prediction.decode.seconds < 0.9 * fronts.prediction.decode.seconds
    assert plan.read_bytes is not None
    compressed = [one for one in plan.placements if one.compressed_bytes]
    assert compressed
    for one in compressed:
        assert one.moved_bytes == one.home_bytes - one.front_bytes - one.compressed_bytes
        assert one.moved_bytes <= plan.read_bytes + (64 << 10)
        assert one.kept_bytes == pytest.approx(one.front_bytes + 0.722 * one.compressed_bytes, abs=4096)
    assert plan.devices[-1].weight_bytes == sum(one.kept_bytes for one in plan.placements)
    assert any("stay compressed" in reason for reason in plan.reasons)
    assert not any("stay compressed" in reason for reason in fronts.reasons)


def test_no_more_is_compressed_than_the_processor_has_time_for() -> None:
    shares = []
    for disk in (1e9, 3e9, 5e9, 9e9, 18e9):
        plan = made(process=COMPRESSES, disk=disk)
        compressed = sum(one.compressed_bytes for one in plan.placements)
        shares.append(compressed)
        decode = plan.prediction.decode
        if compressed and plan.devices[-1].free_bytes > 1 << 24:  # less than there was room for
            assert decode.compute_s == pytest.approx(decode.transfer_s, rel=0.05)
        assert decode.seconds <= made(disk=disk).prediction.decode.seconds
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 1e9
    assert shares[-1] == 0


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_only_bfloat16_is_compressed(dtype: str) -> None:
    plan = made(asked=replace(ASKED, dtype=dtype), process=COMPRESSES)
    assert plan.streams
    assert plan.read_bytes is None


def test_a_model_a_little_larger_than_the_memory_is_hardly_read_at_all() -> None:
    total = sum(unit.memory_bytes for unit in units())
    asked = replace(ASKED, max_memory={HOST: int(0.88 * total)})
    plan = made(asked=asked, process=COMPRESSES, disk=1e8)
    assert plan.streamed_bytes < 0.02 * total
    assert made(asked=asked).streamed_bytes > 0.1 * total


def test_nothing_is_compressed_where_that_was_not_measured() -> None:
    assert made(process=COMPRESSES).read_bytes is not None
    assert made(process=COMPRESSES, expand=None).read_bytes is None
