"""New safetensors files as planned: what the library reads, dealt out as the hub does."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from loadstone.checkpoint.safetensors import read_safetensors
from loadstone.checkpoint.write import NewTensor, index_text, plan_shards
from loadstone.dtypes import DTYPES

TENSORS = (
    NewTensor(name="a.bias", dtype="int8", shape=(3,)),
    NewTensor(name="ü.weight", dtype="bfloat16", shape=(5, 2)),
    NewTensor(name="empty", dtype="float32", shape=(0, 4)),
    NewTensor(name="scalar", dtype="float64", shape=()),
    NewTensor(name="c", dtype="float32", shape=(7,)),
)


def test_a_planned_file_is_one_that_the_library_reads(tmp_path: Path) -> None:
    (shard,) = plan_shards(TENSORS, 10**9)
    path = tmp_path / shard.name
    path.write_bytes(shard.header + bytes(shard.nbytes - len(shard.header)))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == {tensor.name for tensor in TENSORS}
        for tensor in TENSORS:
            found = file.get_tensor(tensor.name)
            assert (tuple(found.shape), str(found.dtype)) == (tensor.shape, f"torch.{tensor.dtype}")
    for info in read_safetensors(path)[0].values():
        assert info.offset % (DTYPES[info.dtype].bits // 8) == 0


def test_one_file_has_no_number_and_several_have() -> None:
    assert [shard.name for shard in plan_shards(TENSORS, 10**9)] == ["model.safetensors"]
    names = [shard.name for shard in plan_shards(TENSORS, 30)]
    assert names == [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 100))
def test_shards_are_those_of_the_hub(sizes: list[int], max_shard_bytes: int) -> None:
    tensors = [NewTensor(name=f"t{n:02d}", dtype="uint8", shape=(size,)) for n, size in enumerate(sizes)]
    state = {f"t{n:02d}": torch.empty(size, dtype=torch.uint8, device="meta") for n, size in enumerate(sizes)}
    theirs = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    shards = plan_shards(tensors, max_shard_bytes)
    assert {shard.name: [t.name for t in shard.tensors] for shard in shards} == theirs.filename_to_tensors
    index = json.loads(index_text(shards))
    assert index == {"metadata": theirs.metadata, "weight_map": theirs.tensor_to_filename}


def test_a_tensor_that_is_too_large_has_a_file_of_its_own() -> None:
    assert ["c"] in [[tensor.name for tensor in shard.tensors] for shard in plan_shards(TENSORS, 20)]


def test_sizes_are_those_of_the_file() -> None:
    (shard,) = plan_shards(TENSORS, 10**9)
    assert len(shard.header) % 8 == 0
    assert shard.nbytes == len(shard.header) + sum(tensor.nbytes for tensor in TENSORS)


@pytest.mark.parametrize("limit", [1, 8, 50])
def test_no_tensor_is_lost(limit: int) -> None:
    names = [tensor.name for shard in plan_shards(TENSORS, limit) for tensor in shard.tensors]
    assert sorted(names) == sorted(tensor.name for tensor in TENSORS)
