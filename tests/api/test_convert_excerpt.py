"""A part of a source as a folder of its own: one model of several, some tensors, a variant, a subfolder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loadstone
from loadstone.errors import NotACheckpoint
from loadstone.events import BytesMoved, Event


@pytest.fixture
def several(tmp_path: Path, llama_folder: Path) -> Path:
    """A folder whose file holds a language model, a linear layer, and what belongs to neither."""
    folder = tmp_path / "several"
    folder.mkdir()
    state = {
        f"policy.language.{name}": tensor for name, tensor in load_file(llama_folder / "model.safetensors").items()
    }
    state |= {f"policy.head.{name}": tensor for name, tensor in nn.Linear(3, 2).state_dict().items()}
    save_file({**state, "step": torch.tensor([7])}, folder / "model.safetensors")
    (folder / "config.json").write_bytes((llama_folder / "config.json").read_bytes())
    return folder


def test_one_of_several_models_becomes_a_folder(several: Path, tmp_path: Path, llama_folder: Path) -> None:
    report = loadstone.convert(several, tmp_path / "made", prefix="policy.language")
    assert any("3 tensors were not asked for and left out" in note for note in report.notes)
    expected = load_file(llama_folder / "model.safetensors")
    made = load_file(tmp_path / "made" / "model.safetensors")
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in expected.items())
    tokens = torch.arange(5)[None]
    with torch.inference_mode():
        found, wanted = (loadstone.load(folder)(tokens).logits for folder in (tmp_path / "made", llama_folder))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("select", ["policy.head.*", ["*.head.weight", "*.head.bias"], lambda name: ".head." in name])
def test_selected_tensors_keep_their_names(several: Path, tmp_path: Path, select: Any) -> None:
    loadstone.convert(several / "model.safetensors", tmp_path / "made", select=select, dtype="float64")
    source, made = (load_file(folder / "model.safetensors") for folder in (several, tmp_path / "made"))
    assert sorted(made) == ["policy.head.bias", "policy.head.weight"]
    assert all(torch.equal(tensor, source[name].double()) for name, tensor in made.items())


def test_select_goes_by_the_names_without_the_prefix(several: Path, tmp_path: Path) -> None:
    loadstone.convert(several, tmp_path / "made", prefix="policy.head.", select="w*")
    assert list(load_file(tmp_path / "made" / "model.safetensors")) == ["weight"]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_variant_becomes_plain_weights(llama_copy: Path, tmp_path: Path, variant: str | None) -> None:
    plain = load_file(llama_copy / "model.safetensors")
    halves = {name: (tensor + 1).half() for name, tensor in plain.items()}
    save_file(halves, llama_copy / "model.fp16.safetensors")
    report = loadstone.convert(llama_copy, tmp_path / "made", variant=variant)
    assert report.files == ("model.safetensors",)
    made = load_file(tmp_path / "made" / "model.safetensors")
    assert all(torch.equal(made[name], tensor) for name, tensor in (halves if variant else plain).items())


def test_a_subfolder_brings_its_own_side_files(llama_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "LICENSE").write_text("of the whole")
    llama_copy.rename(tmp_path / "pipeline" / "text_encoder")
    report = loadstone.convert(tmp_path / "pipeline", tmp_path / "made", subfolder="text_encoder")
    assert report.side_files == ("config.json", "generation_config.json")
    made, source = tmp_path / "made", tmp_path / "pipeline" / "text_encoder"
    assert (made / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_what_matches_nothing_is_an_error_and_leaves_nothing(several: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"prefix": "vision."}, "found none among"),
        ({"select": "*.nothing"}, r"select='\*\.nothing' matches"),
        ({"variant": "bf16"}, 'the variant "bf16"'),
    ):
        with pytest.raises(NotACheckpoint, match=message):
            loadstone.convert(several, tmp_path / "made", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="variant= chooses among the files of a folder"):
        loadstone.convert(several / "model.safetensors", tmp_path / "made", variant="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["several"]


def test_another_model_of_the_same_shape_is_not_gone_on_with(tmp_path: Path) -> None:
    """What a killed process left belongs to the tensors that were asked for, not only to their names and shapes."""
    save_file(
        {f"{model}.weight": torch.full((4,), float(n)) for n, model in enumerate("ab")}, tmp_path / "m.safetensors"
    )
    left: list[str] = []

    def hidden(event: Event) -> None:
        if isinstance(event, BytesMoved):
            left.extend(path.name for path in tmp_path.iterdir() if path.name.startswith(".made"))

    for prefix in ("a.", "b."):
        loadstone.convert(tmp_path / "m.safetensors", tmp_path / "made", prefix=prefix, progress=hidden)
        (tmp_path / "made").rename(tmp_path / prefix[0])
    assert len(set(left)) == 2
    assert load_file(tmp_path / "b" / "model.safetensors")["weight"].tolist() == [1.0] * 4
