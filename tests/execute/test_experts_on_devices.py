"""Experts that are sent to an accelerator one by one, from host memory or their files: the same numbers, no others."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from test_experts import (
    ALL,
    CASES,
    LAYERS,
    OPTIONS,
    PROMPT,
    TYPES,
    WAYS,
    Gguf,
    Odd,
    blocks,
    build,
    check_what_is_read,
    folders,
    gguf_tensors,
    metadata,
    stats,
    tables,
)
from test_states_on_devices import gpu
from torch import nn

import builders
import loadstone
from loadstone.api.begun import Request
from loadstone.api.load import carry_out
from loadstone.checkpoint.open import open_checkpoint
from loadstone.errors import FileChanged
from loadstone.execute.values import Streaming
from loadstone.hardware.fake import FakeLink
from loadstone.hardware.spec import Machine
from loadstone.plan.values import UnitKind
from loadstone.stream import transfer

__all__ = ["folders", "gpu"]  # fixtures

INPUTS = {"input_ids": PROMPT}

pytestmark = pytest.mark.usefixtures("quiet")


def sent(path: Path, nbytes: int, home: str, dtype: str | None = None) -> Any:
    """A model on the device, the layers of which are streamed there."""
    names = frozenset(open_checkpoint(path).tensors) if home == "cpu" else frozenset()
    streaming = Streaming(units=LAYERS, num_slots=2, device="cuda:0", expert_bytes=nbytes, in_memory=names)
    return carry_out(Request(source=path, dtype=dtype, streaming=streaming))


def same(model: nn.Module, expected: list[torch.Tensor], inputs: dict[str, torch.Tensor] = INPUTS) -> bool:
    return all(map(torch.equal, builders.outputs(model, inputs), expected))


def held(room: Any) -> int:
    """The device memory that slots have by now."""
    return sum(slot.data.numel() for rack in room._racks for slot in rack.slots if slot.data is not None)


@pytest.mark.parametrize("home", ["disk", "cpu"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", TYPES)
def test_the_numbers_are_those_of_the_resident_model(
    folders: dict[str, Path], gpu: list[FakeLink], model_type: str, way: str, home: str
) -> None:
    dtype = "float32" if way == "eager" else None
    whole = loadstone.load(folders[model_type], dtype=dtype, device="cpu")
    whole.set_experts_implementation(way)
    expected, answer = builders.outputs(whole, INPUTS), whole.generate(PROMPT, **OPTIONS)
    least = 0  # room for one expert
    for nbytes in (1, 120_000, ALL):
        model = sent(folders[model_type], nbytes, home, dtype)
        model.set_experts_implementation(way)
        assert tables(model)
        assert same(model, expected)
        assert torch.equal(model.generate(PROMPT, **OPTIONS), answer)
        found = stats(model)
        assert found.expert_hits < found.expert_uses
        least = least or found.room_bytes
        assert found.room_bytes <= max(nbytes, least)
        loadstone.of(model).close()


@pytest.mark.parametrize("home", ["disk", "cpu"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_blocks_of_experts_are_decoded_over_there(
    tmp_path: Path, gpu: list[FakeLink], name: str, dtype: str | None, home: str
) -> None:
    case = CASES[name]
    path = Gguf(metadata(case), blocks(gguf_tensors(build(case), case))).write(tmp_path / "m.gguf")
    inputs = {"input_ids": torch.arange(3, 40)[None]}
    expected = builders.outputs(loadstone.load(path, dtype=dtype, device="cpu"), inputs)
    for nbytes in (1, ALL):
        model = sent(path, nbytes, home, dtype)
        for _ in range(2):
            assert same(model, expected, inputs)
        experts = [one for one in open_checkpoint(path).tensors.values() if "_exps.weight" in one.name]
        # A prompt of so many tokens chooses all of them; as blocks, which is what they are in the file.
        if nbytes == ALL:
            assert stats(model).expert_bytes <= sum(one.nbytes for one in experts)
        loadstone.of(model).close()


@pytest.mark.parametrize("home", ["disk", "cpu"])
@pytest.mark.parametrize("way", WAYS)
def test_exactly_what_was_chosen_and_is_not_there_is_sent(
    folders: dict[str, Path], gpu: list[FakeLink], way: str, home: str
) -> None:
    model = sent(folders["mixtral"], 250_000, home)
    model.set_experts_implementation(way)
    check_what_is_read(model, 12)
    loadstone.of(model).close()


@pytest.mark.parametrize("home", ["disk", "cpu"])
@pytest.mark.parametrize("to", ["disk", "ram"])
def test_the_room_leaves_the_device_and_fills_again(
    folders: dict[str, Path], gpu: list[FakeLink], to: str, home: str
) -> None:
    model = sent(folders["qwen3_moe"], 60_000, home)
    loaded, expected = loadstone.of(model), builders.outputs(model, INPUTS)
    room = next(iter(tables(model).values())).entries.layer.room
    assert 0 < held(room) <= stats(model).room_bytes
    for asks in (True, False):
        assert loaded.park(to) > 0
        assert held(room) == 0
        if to == "disk":
            assert sum(link.num_locked_bytes for link in gpu) == 0
        if asks:
            loaded.wake()
        assert same(model, expected)
    loaded.close()


def test_an_entry_that_somebody_holds_stays_as_it_is(folders: dict[str, Path], gpu: list[FakeLink]) -> None:
    model = sent(folders["mixtral"], 1, "disk")
    expected = builders.outputs(model, INPUTS)
    room = next(iter(tables(model).values())).entries.layer.room
    table, expert = next(item for rack in room._racks if (item := rack.shelf.item_at(0)) is not None)
    entry = room.take(table, expert).T  # a view: torch has no object of what was taken
    before = entry.clone()
    for _ in range(2):
        assert same(model, expected)
        assert torch.equal(entry, before)
        loadstone.of(model).park()
    assert torch.equal(entry, before)
    loadstone.of(model).close()


def test_whatever_is_done_with_experts_gives_the_same_numbers(tmp_path: Path, gpu: list[FakeLink]) -> None:
    torch.manual_seed(0)
    path = tmp_path / "odd.safetensors"
    save_file(Odd().state_dict(), path)
    whole = loadstone.load(path, into=Odd, device="cpu")
    streaming = Streaming(units=("layer",), device="cuda:0", expert_bytes=1)
    model = carry_out(Request(source=path, into=Odd, streaming=streaming))
    with torch.inference_mode():
        for _ in range(2):
            x = torch.randn(3, 16)
            assert all(map(torch.equal, model(x), whole(x)))
    loadstone.of(model).close()


def test_a_file_that_is_written_to_meanwhile_is_named(
    folders: dict[str, Path], tmp_path: Path, gpu: list[FakeLink]
) -> None:
    folder = Path(shutil.copytree(folders["mixtral"], tmp_path / "m"))
    model = sent(folder, 1, "disk")
    expected = builders.outputs(model, INPUTS)
    file = folder / "model.safetensors"
    before = file.stat()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    for _ in range(2):
        with pytest.raises(FileChanged, match=r"model\.safetensors"):
            builders.outputs(model, INPUTS)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert same(model, expected)
    loadstone.of(model).close()


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """Experts of 12.6 MB, and little else."""
    config = transformers.MixtralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=16,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("plenty", [True, False], ids=["spares", "no room for spares"])
def test_a_plan_that_sends_experts_is_carried_out(
    mixture: Path, fake_gpus: Machine, monkeypatch: pytest.MonkeyPatch, plenty: bool
) -> None:
    links: list[FakeLink] = []
    monkeypatch.setitem(transfer.STAND_INS, "cuda:0", "cpu")
    monkeypatch.setitem(transfer.LINKS, "cpu", lambda _: links.append(FakeLink(delay_s=0.0001)) or links[-1])
    run: dict[str, Any] = {"context": 48, "prompt_tokens": 16, "machine": fake_gpus, "device": "cuda:0"}
    whole = loadstone.plan(mixture, **run).devices[0]
    budgets = {"cuda:0": whole.peak_bytes - whole.weight_bytes // 2}
    plan = loadstone.plan(mixture, max_memory=budgets, **run)
    if not plenty:
        plan = loadstone.plan(mixture, max_memory={**budgets, "cpu": plan.devices[-1].peak_bytes - 1}, **run)
    model = loadstone.load(mixture, plan=plan)
    experts = [one for one in plan.placements if one.kind is UnitKind.EXPERT]
    staying = [one for one in experts if not one.is_streamed]
    assert 0 < len(staying) < len(experts)
    assert bool(sum(one.spare_bytes for one in staying)) is plenty
    assert tables(model)
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    answer = loadstone.load(mixture, device="cpu").generate(PROMPT, **options)
    assert torch.equal(model.generate(PROMPT, **options), answer)
    found = stats(model)
    assert 0 < found.expert_hits < found.expert_uses
    kept_bytes = sum(one.home_bytes for one in staying)
    assert kept_bytes < found.room_bytes <= kept_bytes + plan.devices[0].reservation.slot_bytes
    # What is locked: homes, and two buffers for what comes from the files.
    locked_bytes = sum(link.num_locked_bytes for link in links)
    host = plan.devices[-1]
    gaps = 2 * 8192 * len(experts)
    assert locked_bytes <= host.weight_bytes + host.reservation.slot_bytes + gaps
    assert (locked_bytes > sum(one.home_bytes for one in experts)) is plenty
    loadstone.of(model).close()


@pytest.mark.gpu
@pytest.mark.parametrize("home", ["disk", "cpu"])
@pytest.mark.parametrize("nbytes", [1, 120_000, ALL])
def test_a_real_device_computes_what_it_computes_resident(folders: dict[str, Path], nbytes: int, home: str) -> None:
    whole: Any = loadstone.load(folders["mixtral"], device="cuda:0")
    model = sent(folders["mixtral"], nbytes, home)
    inputs = {"input_ids": PROMPT.cuda()}
    for one in (whole, model):
        one.set_experts_implementation("eager")
    expected = builders.outputs(whole, inputs)
    for _ in range(5):
        assert same(model, expected, inputs)
    loadstone.of(model).close()
