from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loadstone.checkpoint.open import open_checkpoint
from loadstone.checkpoint.sharded import MAX_INDEX_BYTES, read_index
from loadstone.checkpoint.values import Format
from loadstone.errors import InvalidIndex, MissingShard

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_index(folder: Path, weight_map: object, name: str = "model.safetensors.index.json", **more: object) -> Path:
    path = folder / name
    path.write_text(json.dumps({"weight_map": weight_map, **more}))
    return path


def write_shards(folder: Path) -> None:
    save_file({"a": torch.zeros(2), "b": torch.ones(3)}, folder / ONE, metadata={"format": "pt"})
    save_file({"c": torch.zeros(2, dtype=torch.bfloat16)}, folder / TWO)


def test_sharded_checkpoint(tmp_path: Path) -> None:
    write_shards(tmp_path)
    write_index(tmp_path, {"c": TWO, "a": ONE, "b": ONE}, metadata={"total_size": 24})
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["a", "b", "c"]
    assert [file.path.name for file in checkpoint.files] == [ONE, TWO]
    assert checkpoint.metadata == {"format": "pt", "total_size": 24}
    assert checkpoint.nbytes == 24
    assert checkpoint.notes == ()


def test_sharded_torch_pickles(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.ones(2)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    write_index(tmp_path, weight_map, name="pytorch_model.bin.index.json")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format is Format.TORCH_PICKLE
    assert list(checkpoint.tensors) == ["a", "b"]


def test_index_itself_is_a_source(tmp_path: Path) -> None:
    write_shards(tmp_path)
    assert list(open_checkpoint(write_index(tmp_path, {"a": ONE, "b": ONE, "c": TWO})).tensors) == ["a", "b", "c"]


def test_tensors_outside_the_index_are_left_out(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file({"a": torch.ones(9), "c": torch.zeros(2)}, tmp_path / TWO)
    write_index(tmp_path, {"a": ONE, "c": TWO})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors["a"].file.name == ONE
    assert list(checkpoint.tensors) == ["a", "c"]
    assert checkpoint.notes == ("2 tensors that the index does not name were left out",)


def test_tensor_that_the_shard_lacks(tmp_path: Path) -> None:
    write_shards(tmp_path)
    write_index(tmp_path, {"a": ONE, "b": ONE, "c": TWO, "x": TWO, "y": TWO})
    with pytest.raises(InvalidIndex, match=f"expected tensor 'x' and 1 more in {TWO}, found 1 other tensors there"):
        open_checkpoint(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    write_shards(tmp_path)
    write_index(tmp_path, {"a": ONE, "c": "model-3.safetensors"})
    with pytest.raises(MissingShard, match=r"expected the 2 files that .*, did not find model-3.safetensors; download"):
        open_checkpoint(tmp_path)


def test_many_missing_shards(tmp_path: Path) -> None:
    write_index(tmp_path, {f"t{number}": f"model-{number}.safetensors" for number in range(9)})
    with pytest.raises(MissingShard, match=r"did not find model-0.safetensors and 8 more"):
        open_checkpoint(tmp_path)


def test_folder_in_place_of_a_shard_is_missing(tmp_path: Path) -> None:
    (tmp_path / ONE).mkdir()
    write_index(tmp_path, {"a": ONE})
    with pytest.raises(MissingShard, match=ONE):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "shard",
    ["../secret.bin", "/etc/passwd", "a/../../b", "..\\b", "C:\\b", "C:/b", "", "a//b", "./a", "a\0b", "..", "\\b"],
)
def test_shard_outside_the_folder(tmp_path: Path, shard: str) -> None:
    with pytest.raises(InvalidIndex, match=r"expected names of files in its own folder, found .*do not trust"):
        read_index(write_index(tmp_path, {"a": ONE, "b": shard}))


def test_shard_in_a_subfolder(tmp_path: Path) -> None:
    assert read_index(write_index(tmp_path, {"a": "weights/a.safetensors"})).files == (
        tmp_path / "weights" / "a.safetensors",
    )


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "expected a weight_map from tensors to files, found none"),
        ({}, "expected a weight_map from tensors to files, found none"),
        ([ONE], "expected a weight_map from tensors to files, found none"),
        ({"a": 7}, "expected names of files in weight_map, found a int"),
        ({"a": None}, "expected names of files in weight_map, found a NoneType"),
        ({"a": [ONE]}, "tensor 'a': expected the name of a file, found none"),
    ],
)
def test_weight_map_that_is_none(tmp_path: Path, weight_map: object, message: str) -> None:
    with pytest.raises(InvalidIndex, match=message):
        read_index(write_index(tmp_path, weight_map))


def test_index_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text("{")
    with pytest.raises(InvalidIndex, match="expected JSON, found what does not parse"):
        read_index(path)


def test_index_too_large(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    with path.open("wb") as file:
        file.truncate(MAX_INDEX_BYTES + 1)
    with pytest.raises(InvalidIndex, match=r"expected at most 64\.0 MB of JSON, found 64\.0 MB"):
        read_index(path)


def test_index_that_is_an_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InvalidIndex, match="found a git-LFS pointer to it; run `git lfs pull`"):
        read_index(path)


def test_metadata_that_is_none(tmp_path: Path) -> None:
    assert read_index(write_index(tmp_path, {"a": ONE}, metadata=[1])).metadata == {}
