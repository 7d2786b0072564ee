"""Device maps in transformers' sense: what `load` makes of them, and what transformers makes of those of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import loadstone
from loadstone.errors import DeviceUnavailable
from loadstone.plan.device_map import to_device_map

TOKENS = torch.arange(3, 9)[None]
PARTED = {"": "cpu", "model.layers.0": "disk", "model.layers.1.mlp": "disk", "lm_head": "disk"}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize(
    ("device_map", "streamed"),
    [
        ("auto", set()),
        ("balanced", set()),
        ("balanced_low_0", set()),
        ("sequential", set()),
        ("cpu", set()),
        ({"": "cpu"}, set()),
        ({"model": "cpu", "lm_head": "cpu"}, set()),
        ({"model.embed_tokens": "cpu", "model.layers": "disk", "": "cpu"}, {"model.layers.0", "model.layers.1"}),
        ({"": "disk", "model.layers": "cpu"}, {"model.embed_tokens", "model.norm", "lm_head"}),
    ],
)
def test_a_map_is_honoured_with_the_same_numbers(llama_folder: Path, device_map: Any, streamed: set[str]) -> None:
    model = loadstone.load(llama_folder, device_map=device_map)
    plan = loadstone.of(model).plan
    assert plan is not None
    assert {one.unit for one in plan.placements if one.is_streamed} == streamed
    assert torch.equal(logits(model), logits(loadstone.load(llama_folder)))


@pytest.mark.parametrize(
    ("device_map", "fault", "words"),
    [
        ("cuda:7", DeviceUnavailable, r'device_map: device "cuda:7" is not on this machine'),
        ({"": 7}, DeviceUnavailable, r'device_map: device "7" is not on this machine'),
        ({"": "cpu", "lm_head": "meta"}, DeviceUnavailable, r'device_map for "lm_head": device "meta" is not on'),
        ({"model.layers": "cpu"}, ValueError, r"device_map has no entry for model\.embed_tokens"),
        ({"": "cpu", "model.layers.7": "disk"}, ValueError, r'"model\.layers\.7" is the start of no module here'),
        ({}, ValueError, "device_map is empty"),
        (torch.device("cuda:7"), DeviceUnavailable, r'device_map: device "cuda:7" is not on this machine'),
        (["cpu"], ValueError, r"device_map is \['cpu'\]; expected"),
    ],
)
def test_a_map_that_cannot_be_honoured_is_one_sentence(
    llama_folder: Path, device_map: Any, fault: type[Exception], words: str
) -> None:
    with pytest.raises(fault, match=words):
        loadstone.load(llama_folder, device_map=device_map)


def test_torch_devices_are_devices(llama_folder: Path) -> None:
    for device_map in (torch.device("cpu"), {"": torch.device("cpu")}):
        plan = loadstone.of(loadstone.load(llama_folder, device_map=device_map)).plan
        assert plan is not None
        assert {one.home for one in plan.placements} == {"cpu"}


@pytest.mark.parametrize("device_map", ["cpu", PARTED, {"": "disk", "model.layers.1": "cpu"}])
def test_the_map_of_a_plan_loads_in_transformers(llama_folder: Path, tmp_path: Path, device_map: Any) -> None:
    pytest.importorskip("accelerate")
    exported = to_device_map(loadstone.plan(llama_folder, device_map=device_map))
    model = AutoModelForCausalLM.from_pretrained(
        llama_folder, device_map=exported, offload_folder=str(tmp_path), dtype=torch.bfloat16
    )
    away = {name for name, home in exported.items() if home == "disk"}
    assert away == {name for name, home in getattr(model, "hf_device_map", {}).items() if str(home) == "disk"}
    assert torch.equal(logits(model), logits(loadstone.load(llama_folder)))
