"""Experts that come one by one give the numbers of the resident model, and nothing is read but what routers chose."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "architecture"))

from test_gguf_families import CASES, build, gguf_tensors, metadata

import builders
import loadstone
from gguf_builders import Gguf, Stored
from loadstone.api.begun import Request
from loadstone.api.load import carry_out
from loadstone.errors import FileChanged, StreamedModel
from loadstone.execute.values import Streaming, StreamStats

TYPES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "deepseek_v3", "gpt_oss")
WAYS = ("grouped_mm", "eager", "batched_mm")
LAYERS = ("model.layers.0", "model.layers.1")
PROMPT = torch.arange(3, 15)[None]
ALL = 10**9
OPTIONS = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for model_type in TYPES:
        model = builders.tiny_model(model_type, "causal", torch.bfloat16)
        made[model_type] = builders.write_checkpoint(model, tmp_path_factory.mktemp(model_type))
    return made


def streamed(path: Path, nbytes: int, dtype: str | None = None) -> Any:
    streaming = Streaming(units=LAYERS, expert_bytes=nbytes)
    return carry_out(Request(source=path, dtype=dtype, streaming=streaming))


def stats(model: nn.Module) -> StreamStats:
    found = loadstone.of(model).stats()
    assert found is not None
    return found


def tables(model: nn.Module) -> dict[str, Any]:
    """The parameters whose entries come one by one."""
    return {name: one for name, one in model.named_parameters() if getattr(one, "entries", None) is not None}


def missing_bytes(sink: list[int], module: Any, args: Any, kwargs: Any) -> None:
    """What of a router's choice is not in memory, in bytes; called before it is read."""
    ids = next(value for value in (*args, *kwargs.values()) if not value.is_floating_point())
    for parameter in module._parameters.values():
        entries = getattr(parameter, "entries", None)
        if entries is not None:
            entry_bytes = parameter.numel() // len(parameter) * parameter.element_size()
            chosen = [(entries.number, expert) for expert in ids.unique().tolist()]
            sink.extend(entry_bytes for item in chosen if entries.layer.room._slot(item) is None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", TYPES)
def test_the_numbers_are_those_of_the_resident_model(folders: dict[str, Path], model_type: str, way: str) -> None:
    dtype = "float32" if way == "eager" else None
    whole = loadstone.load(folders[model_type], dtype=dtype)
    whole.set_experts_implementation(way)
    expected = builders.outputs(whole, {"input_ids": PROMPT})
    least = 0  # room for one expert
    for nbytes in (1, 60_000, 120_000, ALL):
        model = streamed(folders[model_type], nbytes, dtype)
        model.set_experts_implementation(way)
        assert all(map(torch.equal, builders.outputs(model, {"input_ids": PROMPT}), expected))
        assert torch.equal(model.generate(PROMPT, **OPTIONS), whole.generate(PROMPT, **OPTIONS))
        found = stats(model)
        assert found.expert_hits < found.expert_uses
        least = least or found.room_bytes
        assert found.room_bytes <= max(nbytes, least)
        assert loadstone.of(model).report.notes == loadstone.of(whole).report.notes
        loadstone.of(model).close()


def check_what_is_read(model: Any, num_tokens: int) -> None:
    """Decode; for each token as many bytes are read as its routers chose of what is not in memory."""
    missing: list[int] = []
    for module in model.modules():
        if any(getattr(one, "entries", None) is not None for one in module._parameters.values()):
            hook = partial(missing_bytes, missing)
            module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
    cache = transformers.DynamicCache()
    for token in range(num_tokens):
        before = stats(model).expert_bytes
        missing.clear()
        with torch.inference_mode():
            model(torch.tensor([[token * 7 % 150]]), past_key_values=cache)
        assert stats(model).expert_bytes - before == sum(missing)
    assert 0 < stats(model).expert_hits < stats(model).expert_uses


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("nbytes", [150_000, 250_000])
def test_exactly_what_was_chosen_and_is_not_there_is_read(folders: dict[str, Path], way: str, nbytes: int) -> None:
    model = streamed(folders["mixtral"], nbytes)
    model.set_experts_implementation(way)
    check_what_is_read(model, 20)


def test_all_experts_are_read_once_where_there_is_room(folders: dict[str, Path]) -> None:
    model = streamed(folders["qwen3_moe"], ALL)
    for number in range(6):
        builders.outputs(model, {"input_ids": PROMPT + 20 * number})
    assert stats(model).expert_bytes <= sum(one.numel() * one.element_size() for one in tables(model).values())


def blocks(stored: dict[str, Stored]) -> dict[str, Stored]:
    """Weights as Q8_0 blocks where their rows are whole blocks."""
    from gguf import GGMLQuantizationType, quants

    made = {}
    for name, tensor in stored.items():
        if name.endswith(".weight") and len(tensor.shape) > 1 and tensor.shape[-1] % 32 == 0 and tensor.data:
            array = np.frombuffer(tensor.data, np.float32).reshape(tensor.shape)
            made[name] = Stored(tensor.shape, 8, quants.quantize(array, GGMLQuantizationType.Q8_0).tobytes())
        else:
            made[name] = tensor
    return made


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_fused_blocks_of_a_gguf_are_decoded_expert_by_expert(tmp_path: Path, name: str, dtype: str | None) -> None:
    case = CASES[name]
    path = Gguf(metadata(case), blocks(gguf_tensors(build(case), case))).write(tmp_path / "m.gguf")
    whole = loadstone.load(path, dtype=dtype)
    inputs = {"input_ids": torch.arange(3, 40)[None]}
    for nbytes in (1, ALL):
        model = streamed(path, nbytes, dtype)
        for _ in range(3):
            assert all(map(torch.equal, builders.outputs(model, inputs), builders.outputs(whole, inputs)))
        assert stats(model).expert_bytes > 0
        loadstone.of(model).close()


class Odd(nn.Module):
    """Uses experts in ways that transformers does not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Module()
        self.layer.experts = OddExperts()

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return list(self.layer.experts(x))


class OddExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 8, 16))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        every = [self.weight[number] for number in range(-5, 5)]  # more than there is room for, all kept hold of
        return [
            *(x @ one.T for one in every),
            torch.einsum("bi,eoi->beo", x, self.weight),
            self.weight[torch.tensor([3, -1, 3])] @ x[0],
            self.weight[1:3] @ x[0],
            torch.bmm(x.expand(5, *x.shape), self.weight.transpose(1, 2)),
            self.weight.transpose(0, 1) @ x[0],
        ]


def test_whatever_is_done_with_experts_gives_the_same_numbers(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path / "odd.safetensors"
    save_file(Odd().state_dict(), path)
    whole = loadstone.load(path, into=Odd)
    model = carry_out(Request(source=path, into=Odd, streaming=Streaming(units=("layer",), expert_bytes=1)))
    with torch.inference_mode():
        for _ in range(2):
            x = torch.randn(3, 16)
            assert all(map(torch.equal, model(x), whole(x)))
    model.layer.experts.register_forward_pre_hook(lambda module, _: module.weight[torch.tensor(5)])
    with torch.inference_mode(), pytest.raises(IndexError):
        model(x)
    with pytest.raises(StreamedModel, match=r"layer\.experts\.weight: expected its elements for sum"):
        model.layer.experts.weight.sum()


def test_gradients_and_closed_models_are_refused(folders: dict[str, Path]) -> None:
    streaming = Streaming(units=("model.layers.0.mlp.experts",), expert_bytes=ALL)
    model = carry_out(Request(source=folders["olmoe"], streaming=streaming))
    with pytest.raises(StreamedModel, match=r"experts: expected a forward without gradients"):
        model(PROMPT)
    builders.outputs(model, {"input_ids": PROMPT})
    loadstone.of(model).close()
    with pytest.raises(StreamedModel, match="its model was closed"):
        builders.outputs(model, {"input_ids": PROMPT})


def test_a_file_that_is_written_to_meanwhile_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(folders["mixtral"], tmp_path / "m"))
    streaming = Streaming(units=("model.layers.0.mlp.experts", "model.layers.1.mlp.experts"), expert_bytes=1)
    model = carry_out(Request(source=folder, streaming=streaming))
    expected = builders.outputs(model, {"input_ids": PROMPT})
    file = folder / "model.safetensors"
    before = file.stat()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    for _ in range(2):
        with pytest.raises(FileChanged, match=r"model\.safetensors"):
            builders.outputs(model, {"input_ids": PROMPT})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert all(map(torch.equal, builders.outputs(model, {"input_ids": PROMPT}), expected))
