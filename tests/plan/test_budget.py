import pytest
from plan_models import machine

from loadstone.errors import DeviceUnavailable
from loadstone.plan.budget import CONTEXT_BYTES, Process, budgets, checked_max_memory

MACHINE = machine(10**9, 10**9)


@pytest.mark.parametrize("text", ["", "eight", "8 gigs", "-1GB", "0", 0, -5, "0.0001B", True, "1e9"])
def test_what_is_no_size_above_zero_is_misuse(text: str | int) -> None:
    with pytest.raises(ValueError, match="max_memory of cpu: expected a size such as 5GB, 500MB or 2GiB, found "):
        checked_max_memory({"cpu": text}, MACHINE)


def test_devices_are_named_as_torch_or_by_number() -> None:
    assert checked_max_memory({0: "1GB", "cpu": 5}, MACHINE) == {"cuda:0": 10**9, "cpu": 5}
    assert checked_max_memory("cuda:0=1GB, cpu=2GB", MACHINE) == {"cuda:0": 10**9, "cpu": 2 * 10**9}
    assert checked_max_memory("3GB", MACHINE) == {"cpu": 3 * 10**9}
    assert checked_max_memory(None, MACHINE) == {}


def test_what_is_not_there_or_named_twice_is_refused() -> None:
    with pytest.raises(DeviceUnavailable, match='device "3" is not on this machine, which has: cuda:0, cpu'):
        checked_max_memory({3: "1GB"}, MACHINE)
    with pytest.raises(ValueError, match="names cuda:0 twice"):
        checked_max_memory({0: "1GB", "cuda:0": "1GB"}, MACHINE)
    with pytest.raises(ValueError, match="cpu is named twice"):
        checked_max_memory("cpu=1GB,cpu=2GB", MACHINE)
    with pytest.raises(ValueError, match="expected device=size pairs"):
        checked_max_memory("cpu=1GB,", MACHINE)


def test_what_is_not_named_is_used_up_to_a_margin_and_nothing_beyond_what_is_free() -> None:
    found = budgets(MACHINE, {}, Process(level_bytes=100))
    assert found == {"cuda:0": int((10**9 - CONTEXT_BYTES["cuda"]) * 0.97), "cpu": 950_000_000}
    assert budgets(MACHINE, {"cpu": 10**12}, Process())["cpu"] == 10**9


def test_a_level_that_is_taken_already_is_part_of_the_budget() -> None:
    assert budgets(MACHINE, {"cpu": 10**12}, Process(level_bytes=100, is_taken=True))["cpu"] == 10**9 + 100
