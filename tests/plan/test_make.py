from dataclasses import replace
from itertools import pairwise

import pytest
from plan_models import checkpoint, llama, machine

from loadstone.checkpoint.values import Checkpoint
from loadstone.errors import DeviceUnavailable, DoesNotFit
from loadstone.hardware.spec import Rates
from loadstone.plan.budget import Process
from loadstone.plan.cost import simulate
from loadstone.plan.facts import facts_of
from loadstone.plan.make import make_plan
from loadstone.plan.reserve import KERNEL_BYTES, PACKING_BYTES
from loadstone.plan.units import inventory
from loadstone.plan.values import DISK, HOST, Asked, Plan, Run, UnitKind

SHORT = Run(context=64, prompt_tokens=16)
# 40 blocks of 2.1 MB, tables of 1 MB.
MODEL = llama(layers=40, width=256, inner=1024, vocab=2000)
BLOCK_BYTES = 2 * (4 * 256 * 256 + 3 * 256 * 1024 + 256)


def host_plan(budget: int, model: Checkpoint = MODEL, **asked: object) -> Plan:
    wanted = replace(Asked(run=SHORT, max_memory={HOST: budget}), **asked)  # type: ignore[arg-type]
    return make_plan(model, machine(10**12), wanted)


def test_what_fits_is_mapped_where_it_lies() -> None:
    plan = host_plan(10**9)
    assert not plan.streams
    assert all(one.mapped for one in plan.placements)
    host = plan.devices[-1]
    assert (host.mapped_bytes, host.weight_bytes) == (MODEL.nbytes, 0)
    assert plan.prediction.decode.bound_by == "memory"
    assert "all 86.0 MB of weights are resident on cpu" in plan.reasons[-1]


def test_another_dtype_takes_memory_of_its_own() -> None:
    host = host_plan(10**9, dtype="float32").devices[-1]
    assert (host.mapped_bytes, host.weight_bytes) == (0, 2 * MODEL.nbytes)


def test_streamed_blocks_are_spread_evenly() -> None:
    fits = host_plan(10**9).devices[-1].peak_bytes
    plan = host_plan(fits - 10 * BLOCK_BYTES)
    blocks = [one for one in plan.placements if one.kind.value == "block"]
    streamed = [one.order for one in blocks if one.is_streamed]
    assert {one.home for one in blocks if one.is_streamed} == {DISK}
    assert plan.num_slots == 2
    gaps = {after - before for before, after in pairwise(streamed)}
    assert max(gaps) - min(gaps) <= 2
    assert plan.prediction.decode.bound_by == "disk"
    decode = plan.prediction.decode
    # A quarter of the faster is not hidden by two slots.
    assert decode.seconds == pytest.approx(decode.transfer_s + decode.compute_s / 4)


def test_with_room_for_one_slot_nothing_overlaps() -> None:
    with pytest.raises(DoesNotFit) as caught:
        host_plan(1)
    plan = host_plan(1 + caught.value.shortfall_bytes)
    assert plan.num_slots == 1
    decode = plan.prediction.decode
    assert decode.seconds == pytest.approx(decode.compute_s + decode.transfer_s)
    assert any("only one slot fits" in reason for reason in plan.reasons)


def test_modules_are_streamed_rather_than_blocks_where_smaller_slots_leave_room_for_more() -> None:
    fits = host_plan(10**9).devices[-1].peak_bytes
    plan = host_plan(fits - 10 * BLOCK_BYTES)
    streamed = [one for one in plan.placements if one.is_streamed and one.kind.value == "block"]
    assert all(".mlp." in one.unit for one in streamed)
    largest = 2 * 256 * 1024
    host = plan.devices[-1]
    assert 2 * largest <= host.reservation.slot_bytes < 2.1 * largest
    # As good as all of the budget is used: less is left than one more of them takes.
    assert host.free_bytes < largest


def test_what_moves_less_is_taken_where_computing_takes_longer_anyway() -> None:
    model = llama(layers=14, width=3584, inner=18_944, vocab=20_000)
    asked = Asked(run=SHORT, max_memory={HOST: 5_000_000_000})
    plans = [
        # Computing reads 20 GB/s.
        make_plan(model, machine(10**12, rates=Rates(disk_bytes_per_s=rate)), asked, Process(shows_pages=False))
        for rate in (1e9, 18e9)
    ]
    assert [plan.prediction.decode.bound_by for plan in plans] == ["disk", "memory"]
    assert [plan.num_slots for plan in plans] == [2, 3]
    largest = 2 * 3584 * 18_944
    # The same but for what a third slot takes, which hides more of the disk's time beneath that of computing.
    assert plans[1].streamed_bytes - plans[0].streamed_bytes == largest


def test_a_table_is_streamed_by_rows() -> None:
    plan = host_plan(24_000_000)
    table = plan.placements[0]
    assert (table.unit, table.is_streamed, table.moved_bytes) == ("model.embed_tokens", True, 2 * 256)


def test_experts_that_few_tokens_choose_are_streamed_before_what_all_need() -> None:
    model = llama(layers=8, width=128, inner=512, experts=8)
    # Experts may get 12 different numbers of tokens; each is a kernel of its own for both products.
    plan = host_plan(24_000_000 + 2 * 12 * KERNEL_BYTES, model)
    streamed = {one.kind.value for one in plan.placements if one.is_streamed}
    assert streamed == {"expert", "embedding"}
    assert any(not one.is_streamed for one in plan.placements if one.kind.value == "expert")
    one = next(one for one in plan.placements if one.kind.value == "expert" and one.is_streamed)
    assert one.moved_bytes == one.home_bytes // 4  # two of eight are chosen


def test_several_gpus_get_consecutive_shares() -> None:
    gpu = 600_000_000 + 96_000_000 + 45_000_000
    plan = make_plan(MODEL, machine(10**9, gpu, gpu, gpu, gpu), Asked(run=SHORT))
    devices = [one.home for one in plan.placements]
    assert devices == sorted(devices)
    assert set(devices) == {"cuda:0", "cuda:1", "cuda:2"}  # not more than are needed
    weights = [device.weight_bytes for device in plan.devices[:-1]]
    assert max(weights) - min(weights) <= 2 * BLOCK_BYTES
    assert plan.devices[-1].device == HOST
    assert sum(device.reservation.kv_cache_bytes for device in plan.devices) == 40 * 2 * 2 * 64 * 64 * 2


def test_few_tokens_are_computed_where_the_weights_lie_and_many_on_the_gpu() -> None:
    gpu = 600_000_000 + 96_000_000 + 50_000_000
    on = machine(10**9, gpu, compute=True, rates=Rates(disk_bytes_per_s=1e9, touch_bytes_per_s=2e9))
    one = make_plan(MODEL, on, Asked(run=Run(context=1000, prompt_tokens=1)))
    assert {placement.compute for placement in one.placements if placement.home == HOST} == {HOST}
    many = make_plan(MODEL, on, Asked(run=Run(context=1000, prompt_tokens=1000)))
    assert {placement.compute for placement in many.placements} == {"cuda:0"}
    assert HOST in {placement.home for placement in many.placements}
    assert one.prediction.measured


def test_a_gpu_is_served_from_the_disk_where_the_host_has_no_room() -> None:
    gpu = 600_000_000 + 96_000_000 + 50_000_000
    plan = make_plan(MODEL, machine(102_000_000, gpu), Asked(run=Run(context=1000, prompt_tokens=1000)))
    assert {one.home for one in plan.placements if one.is_streamed} >= {DISK}
    assert all(one.compute == "cuda:0" for one in plan.placements)
    # On their way two blocks are in host memory, each of their eight tensors as far into a page as in its file.
    host = plan.devices[-1]
    assert host.reservation.slot_bytes == 2 * (BLOCK_BYTES + 8 * 2 * 4096)
    assert host.peak_bytes <= host.budget_bytes


def test_a_device_that_shares_the_hosts_memory_is_served_from_the_disk() -> None:
    on = machine(100_000_000 + 60_000_000)
    shared = replace(on.devices[0], id="mps", kind="mps", total_bytes=200_000_000, free_bytes=200_000_000)
    plan = make_plan(MODEL, replace(on, devices=(shared, *on.devices)), Asked(run=Run(context=1000, prompt_tokens=999)))
    assert {one.compute for one in plan.placements} == {"mps"}
    assert {one.home for one in plan.placements} <= {"mps", DISK}


def test_a_gpu_too_small_for_a_ring_is_left_out() -> None:
    small, large = 600_000_000 + 107_750_000, 600_000_000 + 96_000_000 + 60_000_000
    on = machine(10**9, small, large, compute=True)
    plan = make_plan(MODEL, on, Asked(run=Run(context=1000, prompt_tokens=1000)))
    assert {one.compute for one in plan.placements} == {"cuda:1"}


def test_no_offload_fails_rather_than_streams() -> None:
    fits = host_plan(10**9).devices[-1].peak_bytes
    assert not host_plan(fits, offload=False).streams
    with pytest.raises(DoesNotFit, match=r"without streaming on cpu .* 1 B are missing") as caught:
        host_plan(fits - 1, offload=False)
    assert caught.value.shortfall_bytes == 1
    assert caught.value.alternatives[0].label == "streaming from disk"


def test_what_the_process_takes_is_within_the_budget() -> None:
    asked = Asked(run=SHORT, max_memory={HOST: 10**9})
    host = make_plan(MODEL, machine(10**12), asked, Process(level_bytes=300_000_000)).devices[-1]
    assert host.level_bytes == 300_000_000
    assert host.peak_bytes - host.anonymous_bytes - host.mapped_bytes == 300_000_000


def test_a_checkpoint_without_a_config_can_be_planned() -> None:
    plan = make_plan(checkpoint({"blocks.0.weight": (8, 8), "blocks.1.weight": (8, 8)}), machine(10**9), Asked())
    assert [one.unit for one in plan.placements] == ["blocks.0", "blocks.1"]
    assert plan.devices[0].reservation.kv_cache_bytes == 0


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Asked(run=Run(context=0)), "context is 0; expected a whole number above zero"),
        (Asked(run=Run(batch=-1)), "batch is -1"),
        (Asked(run=Run(prompt_tokens=True)), "prompt_tokens is True"),
        (Asked(run=Run(context=10, prompt_tokens=11)), "prompt_tokens is 11 but the context .* is only 10"),
        (Asked(device=HOST, device_map="auto"), "device and device_map both say"),
        (Asked(dtype="int8"), "expected .* floating-point dtype"),
    ],
)
def test_what_means_nothing_is_misuse(asked: Asked, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_plan(MODEL, machine(10**9), asked)


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(DeviceUnavailable, match="cuda:5"):
        make_plan(MODEL, machine(10**9), Asked(device_map={"": "cuda:5"}))


def test_the_simulated_walk_shows_what_spreading_is_worth() -> None:
    resident, streamed = (1.0, 0.0), (1.0, 2.0)
    spread = simulate([resident, streamed] * 8, 2, num_passes=8)
    contiguous = simulate([resident] * 8 + [streamed] * 8, 2, num_passes=8)
    assert spread == pytest.approx(16)
    assert contiguous > 1.3 * spread
    assert simulate([streamed] * 4, 1, num_passes=4) == pytest.approx(12)


def test_what_generates_has_tokens_and_what_does_not_has_passes() -> None:
    run = Run(context=1, prompt_tokens=1)
    assert host_plan(10**9, run=run).prediction.generates
    encoder = replace(MODEL, config={**(MODEL.config or {}), "model_type": "bert", "architectures": ["BertModel"]})
    found = host_plan(10**9, encoder).prediction
    assert not found.generates
    assert found.decode.tokens == found.prefill.tokens == 16


def test_a_streamed_table_is_not_said_to_travel_beside_computing() -> None:
    wanted = Asked(run=SHORT, device_map={"": HOST, "model.embed_tokens": DISK})
    plan = make_plan(MODEL, machine(10**9), wanted)
    assert any("of model.embed_tokens only the rows that are looked up are read" in why for why in plan.reasons)


def test_more_threads_than_a_group_gives_time_for_are_planned_and_told() -> None:
    given = machine(10**12)
    many = replace(given, cpu=replace(given.cpu, num_threads=64))
    asked = Asked(run=SHORT, max_memory={HOST: 10**9}, dtype="float32")
    plan, threaded = make_plan(MODEL, given, asked), make_plan(MODEL, many, asked)
    apart = threaded.devices[-1].anonymous_bytes - plan.devices[-1].anonymous_bytes
    assert apart == (64 - 4) * PACKING_BYTES
    assert [reason for reason in threaded.reasons if reason not in plan.reasons] == [
        "torch computes with 64 threads, but the control group gives this process the time of 4 cores only: "
        "OMP_NUM_THREADS=4 is faster"
    ]


def test_for_one_token_at_a_time_experts_come_to_a_gpu_as_they_are_chosen() -> None:
    """Any of them may have to, so that those which stay for now have a home in host memory as well."""
    model = llama(layers=6, experts=8, width=128, inner=700)
    gpu = 600_000_000 + 96_000_000 + 4 * model.nbytes // 5
    plan = make_plan(model, machine(400_000_000, gpu), Asked(run=SHORT, device="cuda:0"))
    streamed = [one for one in plan.placements if one.is_streamed and one.kind is not UnitKind.EMBEDDING]
    assert {one.kind for one in streamed} == {UnitKind.EXPERT}
    assert {one.home for one in streamed} == {HOST}
    staying = [one for one in plan.placements if one.kind is UnitKind.EXPERT and not one.is_streamed]
    assert staying
    assert all(one.spare_bytes == one.home_bytes for one in staying)
    assert not any(one.spare_bytes for one in plan.placements if one not in staying)
    room = sum(one.home_bytes for one in plan.placements if one.is_streamed or one in staying)
    assert plan.devices[-1].weight_bytes == room
    assert any("of experts only those come that routers choose" in reason for reason in plan.reasons)
    budget = plan.devices[-1].peak_bytes - 1
    small = make_plan(model, machine(400_000_000, gpu), Asked(run=SHORT, device="cuda:0", max_memory={HOST: budget}))
    assert {one.kind for one in small.placements if one.is_streamed} >= {UnitKind.EXPERT}
    assert not any(one.spare_bytes for one in small.placements)
    # Those that stay come from the disk once they had to go, through two buffers of the host.
    assert plan.devices[-1].reservation.slot_bytes < 2 * staying[0].home_bytes
    assert small.devices[-1].reservation.slot_bytes >= 2 * staying[0].home_bytes
    assert small.prediction.decode.seconds > plan.prediction.decode.seconds


def test_for_a_long_prompt_layers_come_to_a_gpu_with_all_of_their_experts() -> None:
    """Each of them is chosen by some token, and a layer can be on its way before its router has chosen."""
    model = llama(layers=48, experts=8, width=256, inner=700)
    gpu = 900_000_000 + 96_000_000 + model.nbytes // 2
    asked = Asked(run=Run(context=2000, prompt_tokens=2000), device="cuda:0")
    plan = make_plan(model, machine(4_000_000_000, gpu, compute=True), asked)
    streamed = [one for one in plan.placements if one.is_streamed and one.kind is not UnitKind.EMBEDDING]
    assert streamed
    assert {one.kind for one in streamed} == {UnitKind.BLOCK}
    units = inventory(model, facts_of(model.config), plan.dtype).placed([one.unit for one in plan.placements])
    assert all(units[one.unit].expert_tensors == 3 * 8 for one in streamed)
    assert sorted(name for unit in units.values() for name in unit.tensors) == sorted(model.tensors)
    assert any("a layer comes with all of its experts" in reason for reason in plan.reasons)
    ring = plan.devices[0].reservation.slot_bytes
    assert ring >= plan.num_slots * max(one.home_bytes for one in streamed)


def test_the_experts_of_a_layer_are_on_one_device() -> None:
    """The host computes what a GPU cannot keep, layer by layer of experts."""
    model = llama(layers=6, experts=8, width=128, inner=700)
    gpu = 600_000_000 + 96_000_000 + model.nbytes // 2
    plan = make_plan(model, machine(2_000_000_000, gpu, compute=True), Asked(run=Run(context=2000, prompt_tokens=1)))
    homes: dict[int, set[str]] = {}
    for one in plan.placements:
        if one.kind is UnitKind.EXPERT:
            homes.setdefault(one.order, set()).add(one.compute)
    assert set(plan.computing) == {"cuda:0", HOST}
    assert {len(devices) for devices in homes.values()} == {1}
    assert plan.reasons[-1].startswith("the host computes what no accelerator keeps")


def test_of_several_gpus_one_is_streamed_to() -> None:
    """Both links are no faster than one where passes go through the devices one after another."""
    gpu = 600_000_000 + 96_000_000 + MODEL.nbytes // 3
    plan = make_plan(
        MODEL, machine(400_000_000, gpu, gpu, compute=True), Asked(run=Run(context=512, prompt_tokens=500))
    )
    streamed = {one.compute for one in plan.placements if one.is_streamed}
    assert set(plan.computing) == {"cuda:0", "cuda:1"}
    assert len(streamed) == 1
    words = f"what does not stay is brought to {streamed.pop()}; the others keep what they compute"
    assert words in plan.reasons
    orders = [one.compute for one in plan.placements if one.kind is UnitKind.BLOCK]
    assert len([pair for pair in pairwise(orders) if pair[0] != pair[1]]) == 1
