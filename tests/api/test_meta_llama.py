"""Meta's own layout: consolidated.NN.pth and params.json, one file or one for each rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, MistralForCausalLM

import loadstone
from loadstone.errors import CheckpointMismatch, InvalidConfig, InvalidHeader, MissingShard, UnsupportedFormat
from meta_builders import meta_state, reference, write, write_mistral


def same_logits(loaded: nn.Module, expected: nn.Module) -> None:
    tokens = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("ranks", "embedding_dim"), [(1, 0), (2, 0), (2, 1)])
def test_logits_are_those_of_the_model_that_was_written(
    tmp_path: Path, ranks: int, embedding_dim: int, dtype: torch.dtype
) -> None:
    expected = reference(dtype)
    model = loadstone.load(write(tmp_path, meta_state(expected), ranks, embedding_dim))
    assert type(model) is LlamaForCausalLM
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    same_logits(model, expected)
    report = loadstone.of(model).report
    assert report.chosen_by == "params.json's architectures"
    assert "rope.freqs is computed from the config instead" in report.notes


def test_another_dtype_is_cast_from_the_same_numbers(tmp_path: Path) -> None:
    expected = reference()
    model = loadstone.load(write(tmp_path, meta_state(expected), 2), dtype="float32")
    for parameter in expected.parameters():
        parameter.data = parameter.data.float()
    same_logits(model, expected)


def test_a_list_of_the_files_is_the_whole_model(tmp_path: Path) -> None:
    expected = reference()
    write(tmp_path, meta_state(expected), 2)
    same_logits(loadstone.load([tmp_path / "consolidated.00.pth", tmp_path / "consolidated.01.pth"]), expected)


def test_widths_that_params_do_not_say_are_those_of_the_tensors(tmp_path: Path) -> None:
    """Llama 1 and 2 write vocab_size -1 and leave the defaults out."""
    expected = reference(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    model = loadstone.load(write(tmp_path, meta_state(expected), 2, vocab_size=-1, rope_theta=None))
    assert (model.config.vocab_size, model.config.intermediate_size) == (96, 96)
    same_logits(model, expected)


@pytest.mark.parametrize(("said", "factor"), [({}, 32.0), ({"rope_scaling_factor": 8.0}, 8.0)])
def test_scaled_rotary_positions_are_those_of_llama_3(tmp_path: Path, said: dict[str, float], factor: float) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = reference(rope_parameters=scaling, max_position_embeddings=131072)
    model = loadstone.load(write(tmp_path, meta_state(expected), use_scaled_rope=True, **said))
    assert model.config.max_position_embeddings == 131072
    assert torch.equal(model.model.rotary_emb.inv_freq, expected.model.rotary_emb.inv_freq)
    same_logits(model, expected)


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    expected = reference(tie_word_embeddings=True)
    state = meta_state(expected)
    del state["output.weight"]
    model = loadstone.load(write(tmp_path, state, vocab_size=-1))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    same_logits(model, expected)


def test_mistrals_consolidated_safetensors(tmp_path: Path) -> None:
    expected = write_mistral(tmp_path)
    model = loadstone.load(tmp_path)
    assert type(model) is MistralForCausalLM
    assert model.config.sliding_window is None
    same_logits(model, expected)


def test_what_needs_no_work_is_mapped(tmp_path: Path) -> None:
    expected = reference()
    model = loadstone.load(write(tmp_path, meta_state(expected)), device="cpu")
    permuted = 2 * 2 * (64 * 64 + 32 * 64)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    assert loadstone.of(model).report.mapped_bytes == whole - permuted


def test_inspect_shows_the_slices_and_the_config(tmp_path: Path) -> None:
    found = loadstone.inspect(write(tmp_path, meta_state(reference()), 2))
    assert "layers.0.attention.wq.weight#1" in found.checkpoint.tensors
    assert "norm.weight" in found.checkpoint.tensors
    assert found.checkpoint.config is not None
    assert found.checkpoint.config["num_key_value_heads"] == 2
    assert found.checkpoint.num_parameters == sum(tensor.numel() for tensor in meta_state(reference()).values())


def test_a_rank_that_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path, meta_state(reference()), 2)
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(
        MissingShard, match=r"expected 2 files, consolidated\.00\.pth to consolidated\.01\.pth, .*found 1"
    ):
        loadstone.load(tmp_path)
    (tmp_path / "consolidated.00.pth").rename(tmp_path / "consolidated.01.pth")
    with pytest.raises(MissingShard, match=r"expected consolidated\.00\.pth before consolidated\.01\.pth"):
        loadstone.load(tmp_path)


@pytest.mark.parametrize(
    ("params", "fault", "message"),
    [
        ({"dim": 96}, CheckpointMismatch, r"the parameter model\.embed_tokens\.weight \(expected \[96, 96\]"),
        ({"n_kv_heads": 1}, CheckpointMismatch, r"others for the parameter model\..*_proj\.weight \(expected"),
        ({"n_heads": 64, "n_kv_heads": 32, "head_dim": 1}, CheckpointMismatch, r"q_proj\.weight \(expected"),
        ({"n_kv_heads": "2"}, InvalidConfig, "expected a positive number as n_kv_heads, found '2'"),
        ({"vocab_size": -2}, InvalidConfig, "expected a positive number as vocab_size, found -2"),
        ({"rope_theta": "1e5"}, InvalidConfig, "expected a positive number as rope_theta, found '1e5'"),
        ({"hidden_dim": 2**70}, InvalidConfig, "expected a positive number as hidden_dim, found 118"),
        ({"n_layers": 10**7}, InvalidConfig, "num_hidden_layers is 10,000,000"),
        ({"dim": None}, InvalidConfig, "expected a positive number as dim, found None"),
        ({"n_heads": "4"}, InvalidConfig, "expected a positive number as n_heads, found '4'"),
        ({"moe": {"num_experts": 8}}, UnsupportedFormat, "found moe too"),
        ({"sliding_window": [8, None]}, UnsupportedFormat, "found sliding_window for each layer too"),
    ],
)
def test_params_of_another_model_are_refused(
    tmp_path: Path, params: dict[str, Any], fault: type[Exception], message: str
) -> None:
    with pytest.raises(fault, match=message):
        loadstone.load(write(tmp_path, meta_state(reference()), **params))


def test_a_tensor_of_no_place_is_left_over(tmp_path: Path) -> None:
    state = {**meta_state(reference()), "layers.0.attention.wz.weight": torch.ones(2, 2)}
    with pytest.raises(CheckpointMismatch, match=r"belong to nothing in the module: layers\.0\.attention\.wz\.weight"):
        loadstone.load(write(tmp_path, state))


def test_ranks_of_two_models_are_refused(tmp_path: Path) -> None:
    write(tmp_path, meta_state(reference()), 2)
    torch.save({"norm.weight": torch.ones(2)}, tmp_path / "consolidated.01.pth")
    with pytest.raises(InvalidHeader, match=r"expected the same tensors in each of its 2 files, found '.*' in consol"):
        loadstone.load(tmp_path)
