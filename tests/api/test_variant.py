"""Variants as transformers writes them, loaded with the numbers that transformers loads."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import loadstone
from loadstone.errors import NotACheckpoint


@pytest.fixture(params=["200MB", "5KB"], ids=["one file", "sharded"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, llama_folder: Path) -> Path:
    """A model whose variant has other numbers than its plain weights."""
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    model.save_pretrained(tmp_path, max_shard_size=request.param)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.half().save_pretrained(tmp_path, variant="fp16", max_shard_size=request.param)
    return tmp_path


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_variant_has_the_numbers_of_transformers(folder: Path, variant: str | None) -> None:
    expected = AutoModelForCausalLM.from_pretrained(folder, variant=variant, dtype="auto")
    model = loadstone.load(folder, variant=variant)
    assert all((".fp16" in Path(name).name) is (variant is not None) for name in loadstone.of(model).report.files)
    tokens = torch.arange(5)[None]
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)


def test_a_variant_that_is_missing_lists_what_is_there(folder: Path) -> None:
    with pytest.raises(NotACheckpoint, match='the variant "bf16", found fp16 and weights without a variant; pass one'):
        loadstone.load(folder, variant="bf16")


def test_a_folder_with_a_variant_only_says_how_to_load_it_and_gives_its_tokenizer(
    tmp_path: Path, chatty_folder: Path
) -> None:
    shutil.copytree(chatty_folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "model.fp16.safetensors")
    with pytest.raises(NotACheckpoint, match='found only those of fp16; pass variant="fp16"'):
        loadstone.load(tmp_path / "model")
    assert loadstone.load(tmp_path / "model", variant="fp16").config.vocab_size == 32
    assert loadstone.load_tokenizer(tmp_path / "model")("a").input_ids == [6]
