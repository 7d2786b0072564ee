"""Folders of diffusers pipelines: a component in each subfolder."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

import loadstone
from loadstone.errors import InvalidConfig, NotACheckpoint, UnknownArchitecture
from loadstone.report import inspection

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.30.0",
    "text_encoder": ["transformers", "LlamaForCausalLM"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "safety_checker": [None, None],
    "requires_safety_checker": True,
}


@pytest.fixture
def folder(tmp_path: Path, llama_folder: Path, chatty_folder: Path) -> Path:
    shutil.copytree(llama_folder, tmp_path / "text_encoder")
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX))
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "sample_size": 8}')
    for variant, dtype in (("", torch.float32), (".fp16", torch.float16)):
        state = {"weight": torch.arange(6, dtype=dtype).view(2, 3), "bias": torch.ones(2, dtype=dtype)}
        save_file(state, tmp_path / "unet" / f"diffusion_pytorch_model{variant}.safetensors")
    (tmp_path / "tokenizer").mkdir()
    for path in chatty_folder.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "tokenizer")
    return tmp_path


LINEAR = {"in_features": 3, "out_features": 2}


@pytest.mark.parametrize(("variant", "dtype"), [(None, torch.float32), ("fp16", torch.float16)])
def test_a_component_loads_into_its_class(folder: Path, variant: str | None, dtype: torch.dtype) -> None:
    model = loadstone.load(folder, subfolder="unet", variant=variant, into=nn.Linear, config=LINEAR)
    assert torch.equal(model.weight, torch.arange(6, dtype=dtype).view(2, 3))


def test_a_component_of_transformers_loads_by_itself(folder: Path, llama_folder: Path) -> None:
    model, expected = loadstone.load(folder, subfolder="text_encoder"), loadstone.load(llama_folder)
    tokens = torch.arange(5)[None]
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)


def test_a_tokenizer_in_a_subfolder_needs_no_weights(folder: Path) -> None:
    assert loadstone.load_tokenizer(folder, subfolder="tokenizer")("a").input_ids


def test_a_component_of_diffusers_says_what_to_pass(folder: Path) -> None:
    with pytest.raises(
        UnknownArchitecture,
        match=r"unet/config\.json: UNet2DConditionModel is a class of diffusers, .*pass into=UNet2D",
    ):
        loadstone.load(folder, subfolder="unet")


def test_the_pipeline_itself_names_its_components(folder: Path) -> None:
    with pytest.raises(
        NotACheckpoint, match=r"found a diffusers pipeline .*with subfolder=, which are text_encoder, unet"
    ):
        loadstone.load(folder)


def test_inspecting_a_pipeline_lists_its_components(folder: Path) -> None:
    found = loadstone.inspect(folder)
    assert found.pipeline is not None
    unet = {component.name: component for component in found.pipeline.components}["unet"]
    assert (unet.library, unet.class_name, unet.num_tensors, unet.nbytes) == (
        "diffusers",
        "UNet2DConditionModel",
        2,
        32,
    )
    assert "unet.weight" in found.checkpoint.tensors
    assert found.remarks[0] == (
        'A pipeline is loaded component by component: load(..., subfolder="text_encoder"); text_encoder, unet hold '
        "weights."
    )
    console = Console(file=io.StringIO(), width=100)
    inspection.render(found, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.startswith("StableDiffusionPipeline in ")
    assert "DDIMScheduler" in text
    assert "no weights" in text
    assert [component["name"] for component in inspection.to_json(found)["components"]] == [
        "text_encoder",
        "scheduler",
        "unet",
    ]


def test_a_variant_of_a_pipeline_is_that_of_the_components_that_have_it(folder: Path) -> None:
    tensors = loadstone.inspect(folder, variant="fp16").checkpoint.tensors
    assert tensors["unet.weight"].dtype == "float16"
    assert tensors["text_encoder.lm_head.weight"].dtype == "bfloat16"
    with pytest.raises(NotACheckpoint, match='expected components of the variant "bf16", found fp16; pass one'):
        loadstone.inspect(folder, variant="bf16")


def test_a_part_of_a_pipeline_is_shown_by_its_prefix(folder: Path) -> None:
    assert list(loadstone.inspect(folder, prefix="unet").checkpoint.tensors) == ["bias", "weight"]


def test_a_pipeline_without_weights_says_so(folder: Path) -> None:
    for name in ("unet", "text_encoder"):
        shutil.rmtree(folder / name)
    with pytest.raises(NotACheckpoint, match="expected components with weights, as model_index"):
        loadstone.inspect(folder)


def test_an_index_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")
    with pytest.raises(InvalidConfig, match=r"model_index\.json"):
        loadstone.inspect(folder)
