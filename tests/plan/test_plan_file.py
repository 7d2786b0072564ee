import json
from dataclasses import replace

import pytest
from plan_models import llama, machine

from loadstone.errors import InvalidPlan
from loadstone.plan.make import make_plan
from loadstone.plan.plan_file import VERSION, changes, diff, from_json, to_json
from loadstone.plan.values import HOST, Asked, Plan, Run

MACHINE = machine(10**9, 10**9)


def plan(layers: int = 3, **asked: object) -> Plan:
    return make_plan(llama(layers=layers), MACHINE, replace(Asked(), **asked))  # type: ignore[arg-type]


def test_a_plan_survives_its_file() -> None:
    made = plan()
    data = json.loads(json.dumps(to_json(made)))
    assert data["loadstone_plan"] == VERSION
    assert from_json(data) == made


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.pop("loadstone_plan"), "is not a plan"),
        (lambda data: data.update(loadstone_plan=1), f"of version 1; this Loadstone reads version {VERSION}"),
        (lambda data: data.pop("dtype"), "it lacks dtype"),
        (lambda data: data.update(color="red"), "unknown field color"),
        (lambda data: data["run"].update(context="long"), r"run\.context is 'long'; expected int"),
        (lambda data: data["run"].update(context=-1), r"run\.context is '-1'"),
        (lambda data: data["placements"][1].update(kind="wheel"), r"placements\[1\]\.kind is 'wheel'"),
        (lambda data: data["placements"][0].pop("home"), r"placements\[0\] lacks home"),
        (lambda data: data["prediction"].update(load_s=float("nan")), r"prediction\.load_s"),
        (lambda data: data.update(placements=3), "placements is '3'; expected tuple"),
        (lambda data: data["placements"].append(data["placements"][0]), "placed twice"),
        (lambda data: data.update(run=[1]), "run is"),
    ],
)
def test_what_is_no_plan_is_refused_with_its_place(change: object, words: str) -> None:
    data = json.loads(json.dumps(to_json(plan())))
    change(data)  # type: ignore[operator]
    with pytest.raises(InvalidPlan, match=words):
        from_json(data, "plan.json")


def test_json_that_is_no_object_is_refused() -> None:
    with pytest.raises(InvalidPlan, match=r"my\.json is not a plan"):
        from_json([1, 2], "my.json")


def test_nothing_is_said_of_what_did_not_change() -> None:
    assert changes(plan(), llama(layers=3), MACHINE) == ()


def test_another_checkpoint_and_another_machine_are_named() -> None:
    made = plan()
    said = " | ".join(changes(made, llama(layers=4), machine(10**9)))
    assert "had 27 tensors, has 35" in said
    assert "cuda:0 is gone" in said
    assert "names, dtypes, shapes" in " ".join(changes(made, llama(layers=3, width=32, inner=320), MACHINE))
    assert "cuda:0 had 1.00 GB of memory, has 2.00 GB" in changes(made, llama(layers=3), machine(10**9, 2 * 10**9))


def test_memory_that_is_taken_meanwhile_is_named() -> None:
    devices = tuple(replace(device, free_bytes=1000) for device in MACHINE.devices)
    said = changes(plan(), llama(layers=3), replace(MACHINE, devices=devices))
    assert any("cuda:0 has 1.00 kB free, the plan needs" in line for line in said)


def test_the_difference_of_plans_is_told_by_unit_device_and_time() -> None:
    assert diff(plan(), plan()) == ()
    lines = diff(plan(), plan(device=HOST, run=Run(context=100, prompt_tokens=50)))
    assert "run: context 4096, batch 1, prompt_tokens 512 -> context 100, batch 1, prompt_tokens 50" in lines
    assert "model.layers.0: on cuda:0 in bfloat16 -> on cpu in bfloat16" in lines
    assert any(line.startswith("peak of cuda:0: ") and line.endswith("-> 0 B") for line in lines)
    assert any(line.startswith("decode: ") for line in lines)
    assert "model.layers.3: not a unit -> on cuda:0 in bfloat16" in diff(plan(), plan(layers=4))
