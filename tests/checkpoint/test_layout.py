"""Which files of a folder are its weights: variants, pipelines, ranks, numbered parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loadstone.checkpoint.excerpt import Excerpt
from loadstone.checkpoint.layout import pick, variant_of
from loadstone.checkpoint.open import open_checkpoint
from loadstone.errors import MissingShard, NotACheckpoint, SourceNotFound

PLAIN = ("model.safetensors", "config.json", "tokenizer.json")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.fp16.safetensors"], "model.fp16.safetensors"),
        (["pytorch_model.fp16.bin"], "pytorch_model.fp16.bin"),
        (["diffusion_pytorch_model.fp16.safetensors"], "diffusion_pytorch_model.fp16.safetensors"),
        (["model.safetensors.index.fp16.json"], "model.safetensors.index.fp16.json"),
        (["model.fp16.safetensors.index.json"], "model.fp16.safetensors.index.json"),
        (["pytorch_model.bin.index.fp16.json"], "pytorch_model.bin.index.fp16.json"),
        (["unet.fp16.safetensors", "unet.safetensors"], "unet.fp16.safetensors"),
        (["pytorch_model.fp16.bin", "model.fp16.safetensors"], "model.fp16.safetensors"),
        (["model.bf16.safetensors", "model.fp16.safetensors"], "model.fp16.safetensors"),
    ],
)
def test_a_variant_is_picked_by_its_name(names: list[str], expected: str) -> None:
    assert pick([*names, *PLAIN], where="here", variant="fp16") == (expected,)


def test_parts_of_a_variant_without_an_index_are_all_picked() -> None:
    names = ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"]
    assert pick([*names, *PLAIN], where="here", variant="fp16") == tuple(names)
    with pytest.raises(MissingShard, match=r"expected 2 files like model-00001-of-00002.*number 2 is missing"):
        pick([*names[:1], "config.json"], where="here", variant="fp16")


def test_without_a_variant_the_plain_files_are_picked() -> None:
    assert pick(["model.fp16.safetensors", *PLAIN], where="here") == ("model.safetensors",)


def test_only_variants_are_named() -> None:
    names = ["model.fp16.safetensors", "model.safetensors.index.bf16.json", "config.json"]
    with pytest.raises(NotACheckpoint, match='found only those of bf16, fp16; pass variant="bf16"'):
        pick(names, where="here")


def test_a_variant_that_is_missing_lists_those_that_are_there() -> None:
    with pytest.raises(NotACheckpoint, match='expected weights of the variant "fp16", found bf16 and weights without'):
        pick(["model.bf16.safetensors", *PLAIN], where="here", variant="fp16")
    with pytest.raises(NotACheckpoint, match='the variant "fp16", found no variant and weights without'):
        pick(PLAIN, where="here", variant="fp16")


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("model.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model.non_ema.bin", "non_ema"),
        ("model.fp16-00001-of-00002.safetensors", "fp16"),
        ("model-00001-of-00002.safetensors", None),
        ("llama-3.1-8b.safetensors", None),
        ("model.safetensors.index.json", None),
        ("model.Q4_K_M.gguf", None),
    ],
)
def test_a_variant_is_told_from_a_name(name: str, variant: str | None) -> None:
    assert variant_of(name) == variant


def test_ranks_without_params_are_several_candidates() -> None:
    names = ["consolidated.00.pth", "consolidated.01.pth"]
    assert pick([*names, "params.json"], where="here") == tuple(names)
    with pytest.raises(NotACheckpoint, match="found 2 files that could be one"):
        pick(names, where="here")


def test_the_layout_of_hugging_face_goes_before_that_of_meta() -> None:
    assert pick(["consolidated.safetensors", "params.json", *PLAIN], where="here") == ("model.safetensors",)


def test_a_ckpt_file_is_weights(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "last.ckpt")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def weights(folder: Path, name: str = "model.safetensors", tensor: str = "a") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({tensor: torch.ones(2)}, folder / name)
    return folder


def test_a_sharded_variant_is_read_through_its_index(tmp_path: Path) -> None:
    weights(tmp_path)
    for number, tensor in enumerate("xy", 1):
        weights(tmp_path, f"model.fp16-0000{number}-of-00002.safetensors", tensor)
    weight_map = {tensor: f"model.fp16-0000{number}-of-00002.safetensors" for number, tensor in enumerate("xy", 1)}
    (tmp_path / "model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": weight_map}))
    assert list(open_checkpoint(tmp_path, excerpt=Excerpt(variant="fp16")).tensors) == ["x", "y"]
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]
    assert list(open_checkpoint(tmp_path / "model.safetensors.index.fp16.json").tensors) == ["x", "y"]


def test_a_subfolder_is_opened_with_its_own_config(tmp_path: Path) -> None:
    weights(tmp_path, tensor="root")
    weights(tmp_path / "inner", tensor="inner")
    (tmp_path / "inner" / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(tmp_path, excerpt=Excerpt(subfolder="inner"))
    assert (list(checkpoint.tensors), checkpoint.config) == (["inner"], {"model_type": "llama"})
    assert checkpoint.root == tmp_path / "inner"


def test_a_subfolder_that_is_missing_names_those_with_weights(tmp_path: Path) -> None:
    weights(tmp_path / "unet")
    weights(tmp_path / "vae")
    with pytest.raises(SourceNotFound, match="expected a subfolder 'text', found unet, vae; pass one that is there"):
        open_checkpoint(tmp_path, excerpt=Excerpt(subfolder="text"))
    with pytest.raises(NotACheckpoint, match="pass subfolder= with one of unet, vae"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("subfolder", ["..", "a/../../b", "/etc", "C:/x", "..\\x"])
def test_a_subfolder_outside_the_source_is_refused(subfolder: str) -> None:
    with pytest.raises(ValueError, match="expected a folder inside the source"):
        Excerpt(subfolder=subfolder)


@pytest.mark.parametrize("excerpt", [{"subfolder": "unet"}, {"variant": "fp16"}])
def test_a_file_has_no_subfolder_and_no_variant(tmp_path: Path, excerpt: dict[str, str]) -> None:
    path = weights(tmp_path) / "model.safetensors"
    for source in (path, [path, path]):
        with pytest.raises(ValueError, match=f"{next(iter(excerpt))}= chooses among the files of a folder"):
            open_checkpoint(source, excerpt=Excerpt(**excerpt))


def test_a_pipeline_on_the_hub_names_its_components() -> None:
    names = ["model_index.json", "unet/a.safetensors", "vae/b.bin", "scheduler/config.json", "unet/deep/c.safetensors"]
    with pytest.raises(NotACheckpoint, match=r"diffusers pipeline .* with subfolder=, which are unet, vae\."):
        pick(names, where="org/name")
