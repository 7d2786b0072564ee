"""Models whose experts come one by one are parked, woken and limited like others, and their room is given back."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from test_experts import PROMPT, folders, stats, streamed, tables
from torch import nn

import builders
import loadstone
from loadstone.hardware.pages import PAGE_BYTES

__all__ = ["folders"]  # a fixture

ROOM_BYTES = 120_000
INPUTS = {"input_ids": PROMPT}
_mincore = ctypes.CDLL(None).mincore

pytestmark = pytest.mark.usefixtures("quiet")


def room_of(model: nn.Module) -> Any:
    return next(iter(tables(model).values())).entries.layer.room


def present_bytes(room: Any) -> int:
    """What of the room's slots is in memory."""
    found = 0
    for slot in (slot for rack in room._racks for slot in rack.slots):
        begin = slot.data.ctypes.data // PAGE_BYTES * PAGE_BYTES
        nbytes = slot.data.ctypes.data + slot.data.size - begin
        pages = (ctypes.c_ubyte * -(-nbytes // PAGE_BYTES))()
        assert _mincore(ctypes.c_void_p(begin), ctypes.c_size_t(nbytes), pages) == 0
        found += sum(page & 1 for page in pages) * PAGE_BYTES
    return found


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_the_room_is_given_back_and_fills_again(folders: dict[str, Path], model_type: str) -> None:
    model = streamed(folders[model_type], ROOM_BYTES)
    loaded = loadstone.of(model)
    expected, away = builders.outputs(model, INPUTS), set(tables(model))
    room = room_of(model)
    assert present_bytes(room) > 0
    for asks in (True, False):
        assert loaded.park() > 0
        assert loaded.is_parked
        assert present_bytes(room) == 0
        assert stats(model).num_slots == 0
        if asks:
            loaded.wake()
        before = stats(model)
        assert all(map(torch.equal, builders.outputs(model, INPUTS), expected))
        assert not loaded.is_parked
        assert stats(model).expert_bytes > before.expert_bytes
        assert set(tables(model)) == away
    loaded.close()


def test_an_entry_that_somebody_holds_stays_as_it_is(folders: dict[str, Path]) -> None:
    model = streamed(folders["mixtral"], ROOM_BYTES)
    expected = builders.outputs(model, INPUTS)
    room = room_of(model)
    table, expert = next(item for rack in room._racks if (item := rack.shelf.item_at(0)) is not None)
    held = room.take(table, expert)
    before = held.clone()
    loadstone.of(model).park()
    assert torch.equal(held, before)
    assert before.abs().sum() > 0
    assert all(map(torch.equal, builders.outputs(model, INPUTS), expected))
    assert torch.equal(held, before)


def test_an_experts_module_by_itself_wakes_the_model(folders: dict[str, Path]) -> None:
    model = streamed(folders["mixtral"], ROOM_BYTES)
    experts = next(module for name, module in model.named_modules() if name.endswith(".experts"))
    states = torch.ones(3, model.config.hidden_size, dtype=torch.bfloat16)
    chosen, weights = torch.tensor([[0], [1], [0]]), torch.ones(3, 1, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = experts(states, chosen, weights)
        loadstone.of(model).park()
        assert torch.equal(experts(states, chosen, weights), expected)
    assert not loadstone.of(model).is_parked
    assert 0 < stats(model).pass_s < 60  # of a module that was called by itself, from when it began


def test_a_limit_counts_the_room_and_the_experts_keep_coming_one_by_one(folders: dict[str, Path]) -> None:
    model = streamed(folders["mixtral"], ROOM_BYTES)
    loaded = loadstone.of(model)
    expected, away = builders.outputs(model, INPUTS), set(tables(model))
    with pytest.raises(ValueError, match=r"limit: expected at least .* for the slots and for what"):
        loaded.limit(stats(model).room_bytes)
    loaded.limit(None)
    assert all(map(torch.equal, builders.outputs(model, INPUTS), expected))
    assert stats(model).num_slots == 0
    assert set(tables(model)) == away
    reads = stats(model).expert_bytes
    builders.outputs(model, {"input_ids": PROMPT + 40})
    assert stats(model).expert_bytes > reads
