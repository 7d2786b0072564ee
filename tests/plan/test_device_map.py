from dataclasses import replace

import pytest
from plan_models import llama, machine

from loadstone.errors import DeviceUnavailable, DoesNotFit
from loadstone.plan.device_map import checked_map, to_device_map
from loadstone.plan.make import make_plan
from loadstone.plan.values import DISK, HOST, Asked, Plan

MACHINE = machine(10**9, 10**9, 10**9)


def placed(device_map: object, **asked: object) -> Plan:
    wanted = replace(Asked(), device_map=device_map, **asked)  # type: ignore[arg-type]
    return make_plan(llama(layers=3), MACHINE, wanted)


def where(plan: Plan) -> dict[str, tuple[str, str]]:
    return {one.unit: (one.home, one.compute) for one in plan.placements}


def test_auto_leaves_it_to_the_planner() -> None:
    for word in ("auto", "balanced", "sequential"):
        assert where(placed(word)) == where(placed(None))


def test_one_device_is_for_everything() -> None:
    assert set(where(placed("cpu")).values()) == {(HOST, HOST)}
    assert set(where(placed("cuda:1")).values()) == {("cuda:1", "cuda:1")}
    assert set(where(placed({"": 1})).values()) == {("cuda:1", "cuda:1")}


def test_the_longest_start_of_a_name_counts_and_what_lies_elsewhere_comes_to_the_first_gpu() -> None:
    plan = placed({"": 0, "model.layers.1": "cpu", "model.layers.2": "disk", "lm_head": "cuda:1"})
    assert where(plan) == {
        "model.embed_tokens": ("cuda:0", "cuda:0"),
        "model.layers.0": ("cuda:0", "cuda:0"),
        "model.layers.1": (HOST, "cuda:0"),
        "model.layers.2": (DISK, "cuda:0"),
        "model.norm": ("cuda:0", "cuda:0"),
        "lm_head": ("cuda:1", "cuda:1"),
    }
    assert plan.num_slots == 2


def test_without_a_gpu_the_host_computes_what_lies_on_the_disk() -> None:
    plan = placed({"model": "cpu", "model.embed_tokens": "disk", "lm_head": "disk"})
    assert where(plan)["lm_head"] == (DISK, HOST)
    embedding = next(one for one in plan.placements if one.unit == "model.embed_tokens")
    assert embedding.moved_bytes == 2 * 64  # a row


def test_a_block_is_divided_where_the_map_divides_it() -> None:
    plan = placed({"": 0, "model.layers.0.mlp": "cpu", "model.layers.0.mlp.up_proj": 1})
    homes = where(plan)
    assert homes["model.layers.0.mlp.gate_proj"] == (HOST, "cuda:0")
    assert homes["model.layers.0.mlp.up_proj"] == ("cuda:1", "cuda:1")
    assert homes["model.layers.0.self_attn.q_proj"] == ("cuda:0", "cuda:0")
    assert "model.layers.0" not in homes


def test_a_map_that_covers_too_little_or_nothing_is_misuse() -> None:
    with pytest.raises(ValueError, match=r"no entry for model\.embed_tokens"):
        placed({"model.layers": 0})
    with pytest.raises(ValueError, match=r'"model\.layer\.0" is the start of no module'):
        placed({"": 0, "model.layer.0": 1})
    with pytest.raises(ValueError, match="device_map is empty"):
        checked_map({}, MACHINE)
    with pytest.raises(DeviceUnavailable, match='for "lm_head": device "7" is not on this machine'):
        checked_map({"": 0, "lm_head": 7}, MACHINE)


def test_a_map_that_does_not_fit_says_so_and_what_does() -> None:
    with pytest.raises(DoesNotFit) as caught:
        placed({"": 0}, max_memory={"cuda:0": 1000})
    assert "the planner's own placement instead of the device map" in [one.label for one in caught.value.alternatives]


def test_disk_contradicts_no_offload() -> None:
    with pytest.raises(ValueError, match='device_map puts modules on "disk", which offload=False forbids'):
        placed({"": "disk"}, offload=False)


def test_a_plan_is_exported_with_as_few_entries_as_say_it() -> None:
    assert to_device_map(placed("cuda:1")) == {"": "cuda:1"}
    given = {"model.embed_tokens": "cuda:0", "model.layers.0": "cpu", "model.layers.1": "cuda:0"}
    given |= {"model.layers.2": "disk", "model.norm": "cuda:0", "lm_head": "cuda:1"}
    plan = placed(given)
    assert to_device_map(plan) == given
    again = placed(to_device_map(plan))
    assert {unit: home for unit, (home, _) in where(again).items()} == {one.unit: one.home for one in plan.placements}


def test_experts_of_a_layer_are_exported_together() -> None:
    plan = make_plan(
        llama(layers=1, experts=4), MACHINE, Asked(device_map={"": 0, "model.layers.0.mlp.experts": "cpu"})
    )
    assert to_device_map(plan)["model.layers.0.mlp.experts"] == HOST
