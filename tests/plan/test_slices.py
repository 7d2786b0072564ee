"""A head that does not fit comes in slices; one that fits does not."""

from dataclasses import replace
from typing import Any

import pytest
from plan_models import llama, machine

from loadstone.api.planned import carried
from loadstone.checkpoint.values import Checkpoint
from loadstone.errors import DoesNotFit
from loadstone.plan import slices
from loadstone.plan.budget import Process
from loadstone.plan.facts import facts_of
from loadstone.plan.make import make_plan
from loadstone.plan.place import run_s
from loadstone.plan.plan_file import from_json, to_json
from loadstone.plan.slices import SLICE_BYTES, held_bytes, with_slices
from loadstone.plan.units import inventory
from loadstone.plan.values import HOST, NUM_WINDOWS, Asked, Placement, Plan, Run, Unit, UnitKind

# Blocks of 8 MB, a head of 410.
SIZES: dict[str, Any] = {"layers": 8, "width": 512, "inner": 2048, "vocab": 400_000}
MODEL, TIED = llama(**SIZES), llama(**SIZES, tied=True)
HEAD_BYTES = 400_000 * 512 * 2
RUN = Run(context=100, prompt_tokens=50)
ROUNDS = 30


def made(model: Checkpoint, budget: int, process: Process | None = None, **asked: Any) -> Plan:
    return make_plan(model, machine(10**12), Asked(run=RUN, max_memory={HOST: budget}, **asked), process)


def least_budget(model: Checkpoint, process: Process | None = None) -> int:
    """The smallest that there is a plan for."""
    with pytest.raises(DoesNotFit) as caught:
        made(model, 1_000_000, process)
    budget = 1_000_000 + caught.value.shortfall_bytes
    made(model, budget, process)
    return budget


def head_of(plan: Plan) -> Placement:
    return next(one for one in plan.placements if one.kind is UnitKind.HEAD)


@pytest.mark.parametrize("model", [MODEL, TIED], ids=["apart", "tied"])
def test_less_than_the_head_is_enough(model: Checkpoint) -> None:
    whole, least = least_budget(model, Process(shows_pages=False)), least_budget(model)
    slot_bytes = 2048 * 512 * 2 + 100_000  # of one tensor; where the head is whole, all go through its slot
    assert least <= whole - HEAD_BYTES + NUM_WINDOWS * min(SLICE_BYTES) + slot_bytes
    plan = made(model, least)
    head = head_of(plan)
    assert head.is_streamed
    assert (head.slice_bytes, head.moved_bytes) == (min(SLICE_BYTES), HEAD_BYTES)
    assert plan.devices[-1].peak_bytes <= least
    assert any(f"{head.unit} comes in slices of 16.8 MB" in reason for reason in plan.reasons)
    streaming, _ = carried(plan, model)
    assert streaming is not None
    assert streaming.slices == {head.unit: min(SLICE_BYTES)}
    assert from_json(to_json(plan)) == plan


def test_more_memory_makes_larger_slices_and_is_never_slower() -> None:
    least, last = least_budget(MODEL), float("inf")
    seen: list[int] = []
    for step in range(ROUNDS):
        plan = made(MODEL, least + step * 20_000_000)
        assert plan.devices[-1].peak_bytes <= plan.devices[-1].budget_bytes
        passes = plan.prediction.decode.seconds, plan.prediction.prefill.seconds
        seconds = run_s(passes, RUN.context - RUN.prompt_tokens)
        assert seconds <= last * (1 + 1e-9)
        last = seconds
        seen.append(head_of(plan).slice_bytes)
    assert not seen[-1]  # it stays, once there is room for it
    assert min(SLICE_BYTES) in seen


def test_a_head_that_fits_has_no_slices() -> None:
    plan = made(MODEL, 1_000_000_000)
    assert all(not one.slice_bytes and not one.is_streamed for one in plan.placements)


def test_one_that_is_cast_is_read_as_it_is_stored() -> None:
    head = head_of(made(MODEL, least_budget(MODEL) + 50_000_000, dtype="float32"))
    assert head.slice_bytes
    assert head.moved_bytes == HEAD_BYTES


@pytest.mark.parametrize("offload", [True, False])
def test_none_has_slices_where_nothing_is_streamed_or_nothing_can_be_shown(offload: bool) -> None:
    with pytest.raises(DoesNotFit) as caught:
        made(MODEL, 100_000_000, Process(shows_pages=not offload), offload=offload)
    assert caught.value.shortfall_bytes > HEAD_BYTES / 2


def test_a_tinyllama_in_float32_fits_into_900_mb_with_python_and_torch() -> None:
    """As `benchmarks/bench_cage.py` runs it; its head alone takes 262 MB."""
    model = llama(layers=22, width=2048, inner=5632, vocab=32_000)
    process = Process(level_bytes=350_000_000, pages_bytes=120_000_000)
    plan = made(model, 900_000_000, process, dtype="float32")
    assert plan.num_slots > 1
    assert plan.devices[-1].peak_bytes <= 900_000_000


def units() -> tuple[Unit, ...]:
    return inventory(MODEL, facts_of(MODEL.config), "bfloat16").units


def test_only_heads_that_are_larger_than_their_slices_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE_BYTES", (HEAD_BYTES // 2, HEAD_BYTES // 2 - 1, 1 << 20))
    found = list(with_slices(units()))
    assert [{unit.slice_bytes for unit in one} for one in found] == [{0, HEAD_BYTES // 2 - 1}, {0, 1 << 20}]
    for one in found:
        assert [unit.name for unit in one if unit.slice_bytes] == ["lm_head"]
        assert [replace(unit, slice_bytes=0) for unit in one] == list(units())


def test_a_table_that_is_the_head_is_held_by_rows_too() -> None:
    for model, rows in ((MODEL, 0), (TIED, 30 * 1024 + 1)):
        found = inventory(model, facts_of(model.config), "bfloat16").units
        head = next(unit for unit in next(iter(with_slices(found))) if unit.slice_bytes)
        assert held_bytes(head, 30) == NUM_WINDOWS * head.slice_bytes + rows
