"""Models of whose units some stays compute what the resident model computes, whatever happens to them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_pressure import press
from test_residency import LAYERS, equal, folder, logits, stats, streamed, units_of
from test_states import away, kept_bytes, parked_and_woken
from torch import nn

import builders
import loadstone
from loadstone.api.begun import Request
from loadstone.api.load import carry_out
from loadstone.errors import FileChanged
from loadstone.execute.values import Streaming
from loadstone.hardware.memory import PeakWatch, resident

__all__ = ["folder"]  # a fixture
SLOT = 8192

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(params=[None, 2048], ids=["fronts", "compressed"])
def stays(request: pytest.FixtureRequest, small_grains: None) -> dict[str, Any]:
    """Fronts, and beside them what is compressed."""
    return {"slot_bytes": SLOT, "read_bytes": request.param}


def taken(model: Any) -> int:
    """What is in memory: what is kept, slots, and what stays of what is streamed."""
    return kept_bytes(model) + stats(model).front_bytes + stats(model).compressed_bytes


def shared_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssShmem"))


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [("causal", "qwen2"), ("causal", "mamba"), ("seq2seq", "t5"), ("encoder", "albert"), ("speech", "whisper")],
)
def test_parked_and_woken_it_is_the_same(tmp_path: Path, kind: str, model_type: str, stays: dict[str, Any]) -> None:
    path = builders.write_checkpoint(builders.tiny_model(model_type, kind).to(torch.bfloat16), tmp_path)
    whole: Any = loadstone.load(path)
    model = streamed(path, units_of(whole), **stays)
    assert stats(model).front_bytes > 0
    assert bool(stats(model).compressed_bytes) is bool(stays["read_bytes"])
    inputs = builders.sample_inputs(whole, kind)
    assert equal(builders.outputs(model, inputs), builders.outputs(whole, inputs))
    parked_and_woken(model, inputs)
    assert equal(builders.outputs(model, inputs), builders.outputs(whole, inputs))


def test_only_what_is_behind_the_fronts_is_read_again(folder: Path, stays: dict[str, Any]) -> None:
    model = streamed(folder, LAYERS, **stays)
    logits(model)
    before = stats(model)
    for _ in range(3):
        logits(model)
    after = stats(model)
    total = sum(one.nbytes for one in loadstone.load(folder).model.layers.parameters())
    assert after.unforeseen == before.unforeseen
    assert after.streamed_bytes - before.streamed_bytes == 3 * after.pass_bytes
    assert after.pass_bytes <= len(LAYERS) * SLOT < total / 2
    assert after.compressed_bytes == 0 or after.pass_bytes < len(LAYERS) * SLOT / 2
    assert after.slot_bytes <= 2 * SLOT


def test_no_slot_is_seen_behind_a_front_after_a_pass(folder: Path, stays: dict[str, Any]) -> None:
    model = streamed(folder, LAYERS, **stays)
    logits(model)
    before = shared_bytes()
    for _ in range(100):
        logits(model)
    assert shared_bytes() <= before + 2 * SLOT


def test_blocks_may_be_used_in_any_order(folder: Path, stays: dict[str, Any]) -> None:
    whole, model = loadstone.load(folder), streamed(folder, LAYERS, **stays)
    x, positions = torch.randn(1, 4, whole.config.hidden_size, dtype=whole.dtype), torch.arange(4)[None]
    with torch.inference_mode():
        embeddings = whole.model.rotary_emb(x, positions)
        for number in (3, 0, 3, 3, 5, 1, 4, 1, 0, 2, 5, 5):
            found, expected = (one.model.layers[number](x, position_embeddings=embeddings) for one in (model, whole))
            assert torch.equal(found, expected)
    assert torch.equal(logits(model), logits(whole))


def test_a_limit_holds_and_gives_the_fronts_up(folder: Path, stays: dict[str, Any]) -> None:
    whole = loadstone.load(folder)
    expected, total = logits(whole), sum(parameter.nbytes for parameter in whole.parameters())
    for park in (False, True):
        model = streamed(folder, LAYERS, **stays)
        loaded = loadstone.of(model)
        assert torch.equal(logits(model), expected)
        if park:
            loaded.park()
        for share in (0.6, 0.9, 0.5):
            loaded.limit(int(share * total))
            for _ in range(2):
                assert torch.equal(logits(model), expected)
            assert stats(model).front_bytes == stats(model).compressed_bytes == 0
            assert taken(model) <= share * total
        loaded.limit(None)
        assert torch.equal(logits(model), expected)
        assert away(model) == set()


def test_where_memory_is_short_fronts_go_and_no_more_comes_back(folder: Path, stays: dict[str, Any]) -> None:
    whole, model = loadstone.load(folder), streamed(folder, LAYERS, **stays)
    expected, block = logits(whole), sum(one.nbytes for one in whole.model.layers[0].parameters())
    assert torch.equal(logits(model), expected)
    before = taken(model)
    press(model, 2 * block)
    assert stats(model).given_back_bytes >= 2 * block
    assert taken(model) <= before - 2 * block
    assert torch.equal(logits(model), expected)
    short = taken(model)
    press(model, -100 * block)
    assert short < taken(model) <= before
    for _ in range(2):
        assert torch.equal(logits(model), expected)


def test_a_file_that_changes_is_named(tmp_path: Path, folder: Path, stays: dict[str, Any]) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    model = streamed(copied, LAYERS, **stays)
    logits(model)
    file = next(copied.glob("*.safetensors"))
    os.utime(file, (1, 1))
    with pytest.raises(FileChanged, match=file.name):
        logits(model)


class Giver(nn.Module):
    """Gives what it multiplies with, and its own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Giving() for _ in range(3))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.layers]


class _Giving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(100, 100))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight[50:] if x.sum() == 0 else x @ self.weight


def test_what_a_block_returns_of_its_own_weights_is_a_copy(tmp_path: Path) -> None:
    whole = Giver()
    save_file(whole.state_dict(), tmp_path / "giver.safetensors")
    streaming = Streaming(units=tuple(f"layers.{number}" for number in range(3)), slot_bytes=SLOT)
    model: Any = carry_out(Request(source=tmp_path / "giver.safetensors", into=Giver, streaming=streaming))
    assert stats(model).front_bytes > 0
    with torch.inference_mode():
        for x in (torch.zeros(1, 100), torch.ones(1, 100)):
            assert equal(model(x), whole(x))


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2048, 4096, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.layers]


@pytest.mark.parametrize("read_bytes", [None, 1 << 20])
def test_a_load_takes_no_more_than_it_says(tmp_path: Path, read_bytes: int | None) -> None:
    names = [f"layers.{number}" for number in range(4)]
    torch.manual_seed(0)
    weights = {f"{name}.weight": 0.02 * torch.randn(4096, 2048).to(torch.bfloat16) for name in names}
    save_file(weights, tmp_path / "wide.safetensors")
    streaming = Streaming(units=tuple(names), slot_bytes=4 << 20, read_bytes=read_bytes)
    request = Request(source=tmp_path / "wide.safetensors", into=Wide, streaming=streaming)
    carry_out(request)  # everything is imported
    before = resident().anonymous_bytes
    with PeakWatch() as watch:
        model: Any = carry_out(request)
    peak, foretold = watch.peak.anonymous_bytes - before, loadstone.of(model).report.foretold
    done = stats(model)
    assert 4 * (12 << 20) <= done.front_bytes <= 4 * ((12 << 20) + 4096)
    assert done.compressed_bytes == pytest.approx(0.722 * 4 * (3 << 20), abs=4 * (64 << 10)) if read_bytes else True
    assert done.pass_bytes == pytest.approx(4 * (read_bytes or 4 << 20), abs=4 * (72 << 10))
    assert 0.9 * (done.front_bytes + done.compressed_bytes) < peak <= foretold.anonymous_bytes
    assert foretold.streaming_bytes == done.memory_bytes
    x = torch.randn(2, 2048, dtype=torch.bfloat16)
    with torch.inference_mode():
        for number in range(3):
            for found, weight in zip(model(x), weights.values(), strict=True):
                assert torch.equal(found, nn.functional.linear(x, weight)), number
            done = done if number else stats(model)
    assert stats(model).streamed_bytes - done.streamed_bytes == 2 * done.pass_bytes
