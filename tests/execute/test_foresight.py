"""Experts that the next layer's router will likely choose are read while this layer computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_experts import OPTIONS, PROMPT, stats, tables
from test_states_on_devices import gpu
from torch import nn

import loadstone
from loadstone.api.begun import Request
from loadstone.api.load import carry_out
from loadstone.execute import foresight
from loadstone.execute.expert_room import ExpertRoom
from loadstone.execute.foresight import Foresight
from loadstone.execute.values import Streaming
from loadstone.hardware.fake import FakeLink

__all__ = ["gpu"]  # a fixture

NUM_LAYERS, NUM_EXPERTS = 6, 16
LAYERS = tuple(f"model.layers.{number}" for number in range(NUM_LAYERS))

pytestmark = pytest.mark.usefixtures("quiet")


def written(folder: Path, *, is_calm: bool) -> Path:
    """A mixture whose layers change little of what flows through them, or much."""
    config = transformers.MixtralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            scale = 1e-3 if is_calm else 30.0
            layer.self_attn.o_proj.weight *= scale
            layer.mlp.experts.down_proj *= scale
            layer.mlp.gate.weight.normal_()
    model.save_pretrained(folder)
    return folder


def loaded(path: Path, device: str = "cpu") -> Any:
    streaming = Streaming(units=tuple(f"{one}.mlp.experts" for one in LAYERS), device=device, expert_bytes=700_000)
    return carry_out(Request(source=path, streaming=streaming))


def foresights(model: nn.Module) -> list[Foresight]:
    return [one.entries.layer.foresight for name, one in tables(model).items() if name.endswith("down_proj")]


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_most_experts_are_there_when_they_are_chosen(
    tmp_path: Path, gpu: list[FakeLink], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    path = written(tmp_path, is_calm=True)
    expected = loadstone.load(path, device="cpu").generate(PROMPT, **{**OPTIONS, "max_new_tokens": 64})
    hits = []
    for share in (2.0, foresight._RIGHT_SHARE):  # never, and as usual
        monkeypatch.setattr(foresight, "_RIGHT_SHARE", share)
        model = loaded(path, device)
        assert torch.equal(model.generate(PROMPT, **{**OPTIONS, "max_new_tokens": 64}), expected)
        found = stats(model)
        room = next(iter(tables(model).values())).entries.layer.room
        assert found.room_bytes == sum(slot.size for rack in room._racks for slot in rack.slots) <= 700_000
        hits.append(found.expert_hits)
        loadstone.of(model).close()
    assert hits[1] > hits[0]


def test_what_is_foreseen_is_on_its_way_before_it_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, is_calm=True)
    begun: list[tuple[int, int, int]] = []
    announced: list[int] = []
    fill, announce = ExpertRoom._begun, ExpertRoom.announce

    def note_begun(self: ExpertRoom, item: tuple[int, int], *, needed: bool, priority: int = -1) -> Any:
        made = fill(self, item, needed=needed, priority=priority)
        if made is not None:
            begun.append((int(self._layer_of[item[0]]), announced[-1], priority))
        return made

    def note_announced(self: ExpertRoom, layer: int, *args: Any, **kwargs: Any) -> None:
        announced.append(layer)
        announce(self, layer, *args, **kwargs)

    monkeypatch.setattr(ExpertRoom, "_begun", note_begun)
    monkeypatch.setattr(ExpertRoom, "announce", note_announced)
    model = loaded(path)
    model.generate(PROMPT, **{**OPTIONS, "max_new_tokens": 64})
    early = [layer - now for layer, now, priority in begun if priority > 0]
    assert len(early) > 50
    assert set(early) == {1}
    assert all(layer == now for layer, now, priority in begun if priority < 0)
    loadstone.of(model).close()


def test_bad_guesses_are_not_used(tmp_path: Path) -> None:
    path = written(tmp_path, is_calm=False)
    expected = loadstone.load(path, device="cpu").generate(PROMPT, **{**OPTIONS, "max_new_tokens": 64})
    model = loaded(path)
    assert torch.equal(model.generate(PROMPT, **{**OPTIONS, "max_new_tokens": 64}), expected)
    assert not any(one.is_useful for one in foresights(model))
    assert any(one.num_guesses for one in foresights(model))
    loadstone.of(model).close()


def test_a_guess_that_was_wrong_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foresight, "_RIGHT_SHARE", 0.0)  # use all
    path = written(tmp_path, is_calm=False)
    expected = loadstone.load(path, device="cpu").generate(PROMPT, **OPTIONS)
    model = loaded(path)
    assert torch.equal(model.generate(PROMPT, **OPTIONS), expected)
    room = next(iter(tables(model).values())).entries.layer.room
    assert not room._foreseen
    loadstone.of(model).close()


def test_a_module_that_answers_in_another_way_is_not_asked_again() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return values

    block = nn.Module()
    block.gate = Other()
    one = Foresight(block)
    values, chosen = torch.ones(3, 4), torch.zeros(3, 2, dtype=torch.int64)
    for _ in range(3):
        one.observe(values, chosen)
        assert one.guess(values, lambda experts: experts.tolist()) == frozenset()
    assert block.gate.calls == 1
    Foresight(None).observe(values, chosen)


def test_a_long_prompt_is_not_foretold_and_spoils_nothing(tmp_path: Path) -> None:
    model = loaded(written(tmp_path, is_calm=True))
    with torch.inference_mode():
        model(torch.arange(40)[None])
        assert not any(one.num_guesses for one in foresights(model))
        for number in range(4):
            model(torch.tensor([[number]]))
    assert all(one.num_guesses for one in foresights(model)[1:])
    loadstone.of(model).close()
