"""One model out of a file that holds several: only its bytes are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import loadstone
from loadstone.checkpoint.excerpt import Excerpt
from loadstone.checkpoint.open import open_checkpoint
from loadstone.hardware.pages import Bytes
from loadstone.stream import host, prefault

WIDTH = 256


def three_models(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    state = {
        f"{model}.{name}": torch.randn(tensor.shape)
        for model in ("first_stage_model", "model.diffusion_model", "cond_stage_model")
        for name, tensor in nn.Linear(WIDTH, WIDTH).state_dict().items()
    }
    save_file(state, folder / "sd.safetensors")
    return folder / "sd.safetensors", state


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_one_of_three_models_is_loaded_and_only_its_bytes_are_read(tmp_path: Path, dtype: str | None) -> None:
    path, state = three_models(tmp_path)
    model = loadstone.load(
        path,
        into=nn.Linear,
        config={"in_features": WIDTH, "out_features": WIDTH},
        prefix="model.diffusion_model.",
        dtype=dtype,
        device="cpu",
    )
    expected = state["model.diffusion_model.weight"]
    assert torch.equal(model.weight, expected if dtype is None else expected.bfloat16())
    report = loadstone.of(model).report
    one = 4 * (WIDTH * WIDTH + WIDTH)
    assert (report.mapped_bytes, report.read_bytes) == ((one, 0) if dtype is None else (0, one))
    assert report.files == (str(path),)


def test_stretches_that_nobody_asks_for_are_not_brought_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = three_models(tmp_path)
    begun: list[tuple[Path, Bytes]] = []
    real = prefault.Prefault

    def spy(ranges: list[tuple[Path, Bytes]], **options: object) -> prefault.Prefault:
        begun.extend(ranges)
        return real(ranges, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(host, "Prefault", spy)
    model = loadstone.load(
        path,
        into=nn.Linear,
        config={"in_features": WIDTH, "out_features": WIDTH},
        prefix="model.diffusion_model.",
        device="cpu",
    )
    infos = open_checkpoint(path, excerpt=Excerpt(prefix="model.diffusion_model.")).tensors.values()
    assert sum(mapped.size for _, mapped in begun) == sum(info.nbytes for info in infos)
    whole = np.fromfile(path, np.uint8)
    begin = min(info.offset for info in infos)
    assert bytes(begun[0][1][:64]) == whole[begin : begin + 64].tobytes()
    assert isinstance(model, nn.Linear)


def test_stretches_join_neighbours_and_step_over_gaps(tmp_path: Path) -> None:
    state = {
        "a": torch.zeros(4),
        "gap": torch.zeros(1 << 16, dtype=torch.int64),
        "b": torch.zeros(4),
        "c": torch.zeros(0),
    }
    torch.save(state, tmp_path / "a.pt")
    tensors = open_checkpoint(tmp_path / "a.pt").tensors
    assert len(host.stretches(tensors.values())) == 1
    left = host.stretches(tensors[name] for name in ("b", "a", "c"))
    assert [(begin, end) for _, begin, end in left] == [
        (tensors[name].offset, tensors[name].offset + 16) for name in ("a", "b")
    ]


def test_a_transformers_model_inside_a_larger_file_loads_by_its_prefix(tmp_path: Path, llama_folder: Path) -> None:
    expected = loadstone.load(llama_folder)
    state = {f"policy.language.{name}": tensor.clone() for name, tensor in expected.state_dict().items()}
    save_file({**state, "policy.action.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((llama_folder / "config.json").read_bytes())
    model = loadstone.load(tmp_path, prefix="policy.language", device="cpu")
    tokens = torch.arange(5)[None]
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)
    assert any("1 tensors were not asked for" in note for note in loadstone.of(model).report.notes)


def test_lightnings_prefix_is_dropped_with_what_lies_beside_it(tmp_path: Path) -> None:
    net = nn.Linear(3, 2)
    state = {**{f"model.{name}": tensor for name, tensor in net.state_dict().items()}, "loss.weight": torch.ones(5)}
    torch.save({"state_dict": state, "epoch": 1, "optimizer_states": [{"m": torch.ones(9)}]}, tmp_path / "last.ckpt")
    model = loadstone.load(
        tmp_path / "last.ckpt", into=nn.Linear, config={"in_features": 3, "out_features": 2}, prefix="model."
    )
    assert torch.equal(model.weight, net.weight)


def test_inspect_shows_the_part_that_is_asked_for(tmp_path: Path) -> None:
    path, _ = three_models(tmp_path)
    found = loadstone.inspect(path, prefix="cond_stage_model.", select="w*")
    assert list(found.checkpoint.tensors) == ["weight"]
