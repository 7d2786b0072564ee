"""GGUF blocks travel to accelerators as they are, and are decoded there: the same numbers, and a third of the bytes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "architecture"))

from test_gguf_families import CASES, build, gguf_tensors, metadata
from test_residency import equal, quantised, units_of
from test_states_on_devices import gpu, on_device

import builders
import loadstone
from gguf_builders import Gguf
from loadstone.checkpoint.open import open_checkpoint
from loadstone.hardware.fake import FakeLink
from loadstone.hardware.spec import Machine
from loadstone.stream import transfer

__all__ = ["gpu"]  # a fixture

pytestmark = pytest.mark.usefixtures("quiet")

FAMILIES = ["llama", "llama, tied", "mixtral", "gemma2", "gpt2", "gptneox", "falcon 40b", "gpt-oss", "t5"]


def written(name: str, folder: Path) -> Path:
    case = CASES[name]
    return Gguf(metadata(case), quantised(gguf_tensors(build(case), case))).write(folder / "m.gguf")


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    tokens = torch.arange(3, 40)[None]
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens} if CASES[name].seq2seq else {})


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_numbers_are_those_of_the_resident_model(
    tmp_path: Path, gpu: list[FakeLink], name: str, dtype: str | None, in_memory: bool
) -> None:
    path, inputs = written(name, tmp_path), inputs_of(name)
    whole = loadstone.load(path, dtype=dtype, device="cpu")
    expected = builders.outputs(whole, inputs)
    names = frozenset(open_checkpoint(path).tensors) if in_memory else frozenset()
    model = on_device(path, units_of(whole), dtype=dtype, in_memory=names)
    for _ in range(3):
        assert equal(builders.outputs(model, inputs), expected)
    loaded = loadstone.of(model)
    for to in ("disk", "ram"):
        assert loaded.park(to) > 0
        loaded.wake()
        assert equal(builders.outputs(model, inputs), expected)
    loaded.close()


def test_blocks_are_kept_and_sent_as_they_are(tmp_path: Path, gpu: list[FakeLink]) -> None:
    path = written("llama", tmp_path)
    layers = tuple(f"model.layers.{number}" for number in range(metadata(CASES["llama"])["llama.block_count"]))
    infos = open_checkpoint(path).tensors
    model = on_device(path, layers, dtype="float32", in_memory=frozenset(infos))
    inside = [info for name, info in infos.items() if name.startswith("blk.")]
    stored_bytes = sum(info.nbytes for info in inside)
    expanded_bytes = sum(4 * info.numel for info in inside)
    assert stored_bytes < 0.4 * expanded_bytes
    stats = loadstone.of(model).stats()
    assert stats is not None
    assert stats.pass_bytes == stored_bytes
    # With what lies between tensors: each begins as far into a block of the disk as in its file.
    assert stored_bytes <= sum(link.num_locked_bytes for link in gpu) < stored_bytes + 4096 * len(inside)
    loadstone.of(model).close()


def test_a_plan_counts_what_the_host_keeps_for_an_accelerator(
    tmp_path: Path, fake_gpus: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    links: list[FakeLink] = []
    monkeypatch.setitem(transfer.STAND_INS, "cuda:0", "cpu")
    monkeypatch.setitem(transfer.LINKS, "cpu", lambda _: links.append(FakeLink(delay_s=0.0002)) or links[-1])
    path, device_map = written("llama", tmp_path), {"": "cuda:0", "model.layers": "cpu"}
    options: Any = {"device_map": device_map, "dtype": "bfloat16", "context": 64, "prompt_tokens": 32}
    model = loadstone.load(path, **options)
    plan = loadstone.of(model).report.plan
    assert plan is not None
    layers = [one for one in plan.placements if one.is_streamed]
    infos = open_checkpoint(path).tensors
    stored_bytes = sum(info.nbytes for name, info in infos.items() if name.startswith("blk."))
    assert {one.home for one in layers} == {"cpu"}
    assert sum(one.home_bytes for one in layers) == plan.devices[-1].weight_bytes == stored_bytes
    assert sum(one.moved_bytes for one in layers) == stored_bytes
    locked_bytes = sum(link.num_locked_bytes for link in links)
    assert stored_bytes <= locked_bytes < stored_bytes + 4096 * len(infos)
    inputs = inputs_of("llama")
    expected = builders.outputs(loadstone.load(path, dtype="bfloat16", device="cpu"), inputs)
    assert equal(builders.outputs(model, inputs), expected)
    loadstone.of(model).close()


@pytest.mark.gpu
@pytest.mark.parametrize("home", ["disk", "cpu"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_real_device_computes_what_it_computes_resident(tmp_path: Path, name: str, home: str) -> None:
    path = written(name, tmp_path)
    whole = loadstone.load(path, dtype="bfloat16", device="cuda:0")
    inputs = {key: tokens.cuda() for key, tokens in inputs_of(name).items()}
    expected = builders.outputs(whole, inputs)
    names = frozenset(open_checkpoint(path).tensors) if home == "cpu" else frozenset()
    model = on_device(path, units_of(whole), dtype="bfloat16", in_memory=names)
    for _ in range(5):
        assert equal(builders.outputs(model, inputs), expected)
    loadstone.of(model).close()
