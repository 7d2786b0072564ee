import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loadstone.checkpoint.open import open_checkpoint
from loadstone.checkpoint.values import Format
from loadstone.errors import (
    CorruptCheckpoint,
    InvalidConfig,
    InvalidHeader,
    MissingShard,
    NotACheckpoint,
    SourceNotFound,
    TruncatedFile,
    UnsupportedFormat,
)


def weights(path: Path, *names: str) -> Path:
    save_file({name: torch.arange(6, dtype=torch.float32).reshape(2, 3) for name in names}, path)
    return path


def test_a_folder_with_a_config(tmp_path: Path) -> None:
    weights(tmp_path / "model.safetensors", "a", "b")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "generation_config.json").write_text('{"do_sample": true}')
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format is Format.SAFETENSORS
    assert (list(checkpoint.tensors), checkpoint.num_parameters, checkpoint.nbytes) == (["a", "b"], 12, 48)
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.generation_config == {"do_sample": True}


def test_a_list_of_files_is_one_checkpoint(tmp_path: Path) -> None:
    files = [weights(tmp_path / f"{name}.safetensors", name) for name in "xy"]
    assert list(open_checkpoint(files).tensors) == ["x", "y"]


def test_the_same_name_in_two_files_is_refused(tmp_path: Path) -> None:
    files = [weights(tmp_path / f"{name}.safetensors", "same") for name in "xy"]
    with pytest.raises(InvalidHeader, match=r"y\.safetensors: expected each tensor in one file, found 'same' in .*x\."):
        open_checkpoint(files)


def test_files_of_two_formats_are_refused(tmp_path: Path) -> None:
    torch.save({"b": torch.ones(1)}, tmp_path / "b.bin")
    with pytest.raises(UnsupportedFormat, match="pass files of one format"):
        open_checkpoint([weights(tmp_path / "a.safetensors", "a"), tmp_path / "b.bin"])


def test_safetensors_are_preferred_to_pickles(tmp_path: Path) -> None:
    weights(tmp_path / "model.safetensors", "a")
    torch.save({"b": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_the_index_decides_which_tensors_count(tmp_path: Path) -> None:
    weights(tmp_path / "one.safetensors", "a", "stale")
    weights(tmp_path / "two.safetensors", "b")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(tmp_path)
    assert sorted(checkpoint.tensors) == ["a", "b"]
    assert checkpoint.notes == ("1 tensors that the index does not name were left out",)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    weights(tmp_path / "one.safetensors", "a")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(MissingShard, match=r"two\.safetensors"):
        open_checkpoint(tmp_path)


def test_a_sharded_pickle_is_one_checkpoint(tmp_path: Path) -> None:
    for name in "ab":
        torch.save({name: torch.ones(2)}, tmp_path / f"pytorch_model-{name}.bin")
    weight_map = {name: f"pytorch_model-{name}.bin" for name in "ab"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert sorted(open_checkpoint(tmp_path).tensors) == ["a", "b"]


def test_the_format_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    weights(tmp_path / "model.bin", "a")
    assert open_checkpoint(tmp_path / "model.bin").format is Format.SAFETENSORS


def test_several_candidates_are_listed(tmp_path: Path) -> None:
    for name in "xy":
        weights(tmp_path / f"{name}.safetensors", name)
    with pytest.raises(NotACheckpoint, match=r"x\.safetensors.*y\.safetensors"):
        open_checkpoint(tmp_path)


def test_an_adapter_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(NotACheckpoint, match="adapter"):
        open_checkpoint(tmp_path)


def test_a_git_lfs_pointer_says_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(NotACheckpoint, match="run `git lfs pull`"):
        open_checkpoint(tmp_path)


def test_an_empty_file_is_truncated(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(TruncatedFile, match="found an empty one"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["[1, 2]", "{", '"text"', "\xff"])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    weights(tmp_path / "model.safetensors", "a")
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InvalidConfig, match=r"config\.json"):
        open_checkpoint(tmp_path)


def test_a_huge_config_is_not_read(tmp_path: Path) -> None:
    weights(tmp_path / "model.safetensors", "a")
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(InvalidConfig, match=r"config\.json"):
        open_checkpoint(tmp_path)


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises((NotACheckpoint, CorruptCheckpoint), match=r"model\.safetensors"):
        open_checkpoint(tmp_path)


def test_a_link_to_itself_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "model.safetensors")
    with pytest.raises((NotACheckpoint, CorruptCheckpoint, SourceNotFound), match=r"model\.safetensors"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_a_header_that_claims_more_than_the_file_is_truncated(tmp_path: Path) -> None:
    text = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(15))
    with pytest.raises(TruncatedFile, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)
