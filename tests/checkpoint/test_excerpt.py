"""A part of a checkpoint in one call: a prefix, a pattern, a function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loadstone.checkpoint.excerpt import Excerpt
from loadstone.checkpoint.open import open_checkpoint
from loadstone.errors import MissingShard, NotACheckpoint

NAMES = [
    "model.diffusion_model.in.weight",
    "model.diffusion_model.out.weight",
    "model.diffusion_model.out.bias",
    "first_stage_model.decoder.weight",
    "cond_stage_model.transformer.text_model.weight",
    "cond_stage_model.transformer.text_model.bias",
    "step",
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file({name: torch.ones(2) for name in NAMES}, tmp_path / "sd.safetensors")
    return tmp_path / "sd.safetensors"


@pytest.mark.parametrize(
    ("excerpt", "expected"),
    [
        ({"prefix": "model.diffusion_model."}, ["in.weight", "out.bias", "out.weight"]),
        ({"prefix": "model.diffusion_model"}, ["in.weight", "out.bias", "out.weight"]),
        ({"prefix": "first_"}, ["stage_model.decoder.weight"]),
        ({"select": "*.text_model.*"}, [NAMES[5], NAMES[4]]),
        ({"select": ["step", "first_*"]}, [NAMES[3], "step"]),
        ({"select": lambda name: name == "step"}, ["step"]),
        ({"prefix": "model.diffusion_model.", "select": "out.*"}, ["out.bias", "out.weight"]),
        ({}, sorted(NAMES)),
    ],
)
def test_only_what_is_asked_for_is_there(path: Path, excerpt: dict[str, Any], expected: list[str]) -> None:
    checkpoint = open_checkpoint(path, excerpt=Excerpt(**excerpt))
    assert sorted(checkpoint.tensors) == expected
    assert all(info.name == name for name, info in checkpoint.tensors.items())
    left_out = len(NAMES) - len(expected)
    assert checkpoint.notes == ((f"{left_out} tensors were not asked for and left out",) if left_out else ())


def test_files_without_any_of_it_are_no_part_of_it(path: Path) -> None:
    save_file({"other.x": torch.ones(2)}, path.parent / "other.safetensors")
    both = [path, path.parent / "other.safetensors"]
    assert [file.path for file in open_checkpoint(both, excerpt=Excerpt(prefix="other.")).files] == both[1:]


def test_only_the_shards_with_something_of_it_are_needed(tmp_path: Path) -> None:
    save_file({"a.x": torch.ones(2), "b.x": torch.ones(2)}, tmp_path / "two.safetensors")
    weight_map = {"a.x": "two.safetensors", "b.x": "two.safetensors", "a.y": "one.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(tmp_path, excerpt=Excerpt(prefix="b."))
    assert list(checkpoint.tensors) == ["x"]
    assert checkpoint.notes == ("2 tensors were not asked for and left out",)
    with pytest.raises(MissingShard, match=r"did not find one\.safetensors; download what is missing"):
        open_checkpoint(tmp_path, excerpt=Excerpt(select="a.*"))


def test_a_prefix_that_matches_nothing_names_those_that_are_there(path: Path) -> None:
    with pytest.raises(NotACheckpoint) as caught:
        open_checkpoint(path, excerpt=Excerpt(prefix="unet."))
    assert "expected tensors whose names begin with 'unet.', found none among 7" in str(caught.value)
    for prefix in ("model.diffusion_model. (3)", "cond_stage_model.transformer.text_model. (2)", "step (1)"):
        assert prefix in str(caught.value)


def test_a_name_is_no_prefix_of_itself(path: Path) -> None:
    with pytest.raises(NotACheckpoint, match="names begin with 'step', found none"):
        open_checkpoint(path, excerpt=Excerpt(prefix="step"))


@pytest.mark.parametrize(
    ("select", "asked"), [("weight", "'weight'"), (["a", "b"], "'a', 'b'"), (str.isdigit, "isdigit")]
)
def test_a_selection_that_matches_nothing_says_what_a_pattern_is(path: Path, select: Any, asked: str) -> None:
    with pytest.raises(NotACheckpoint, match=f"that select={asked} matches, found none among 7 such as .*whole names"):
        open_checkpoint(path, excerpt=Excerpt(select=select))
