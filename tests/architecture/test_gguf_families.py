"""GGUF names, keys and layouts: tiny models are written as llama.cpp's converter writes them, and must come back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from gguf_builders import Gguf, Stored, stored_array
from loadstone.architecture.gguf import FAMILIES, apply_layout, config_from_metadata, tensor_targets
from loadstone.architecture.gguf_layouts import GroupHeads, GroupQkv, UnpermuteHeads
from loadstone.checkpoint.gguf import read_gguf
from loadstone.checkpoint.values import Checkpoint
from loadstone.errors import CheckpointMismatch, InvalidConfig, UnknownArchitecture, UnsupportedFormat

Array = np.ndarray[Any, Any]
VOCAB, WIDTH, LAYERS, HEADS, GROUPS = 48, 32, 2, 4, 2
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": 128,
}
GPT2_SIZES = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128}
T5_SIZES = {
    "layer_norm_epsilon": 1e-5,
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": LAYERS,
    "num_heads": HEADS,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LINEAR = {
    "rms_norm_eps": 1e-5,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.375,
        "mrope_section": [1, 1, 1],
        "mrope_interleaved": True,
    },
}
LINEAR_META = {
    "attention.key_length": 16,
    "ssm.time_step_rank": 4,
    "ssm.inner_size": 32,
    "ssm.conv_kernel": 4,
    "ssm.state_size": 8,
    "ssm.group_count": 2,
    "rope.dimension_sections": [1, 1, 1, 0],
    "rope.dimension_count": 6,
    "rope.freq_base": 1e7,
}
META = {
    "context_length": 128,
    "block_count": LAYERS,
    "embedding_length": WIDTH,
    "feed_forward_length": 64,
    "attention.head_count": HEADS,
    "attention.head_count_kv": GROUPS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.layer_norm_epsilon": 1e-5,
}


def permute(array: Array, heads: int) -> Array:
    """llama.cpp's `permute`: halves of each head become pairs."""
    return array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def ungroup(array: Array, heads: int, groups: int) -> Array:
    """llama.cpp's order of a joint projection: all queries, all keys, all values."""
    parts = array.reshape(groups, heads // groups + 2, -1, *array.shape[1:])
    split = (parts[:, :-2], parts[:, -2], parts[:, -1])
    return np.concatenate([part.reshape(-1, *array.shape[1:]) for part in split])


def tile(array: Array, head_dim: int = 1, dim: int = 0, offset: int = 0) -> Array:
    """llama.cpp's `_reorder_v_heads`, for two key heads with two value heads each."""
    moved = np.moveaxis(array, dim, 0)
    tail = moved[offset:]
    tail = tail.reshape(2, 2, head_dim, *tail.shape[1:]).swapaxes(0, 1).reshape(tail.shape)
    return np.moveaxis(np.concatenate((moved[:offset], tail)), 0, dim)


Change = Callable[[Array], Array]
PERMUTE: dict[str, Change] = {
    r"q_proj\.weight": lambda array: permute(array, HEADS),
    r"k_proj\.weight": lambda array: permute(array, GROUPS),
}
PLUS_ONE: dict[str, Change] = {r"norm\.weight": lambda array: array + np.float32(1)}
TILE: dict[str, Change] = {
    r"(layernorm|q_norm|k_norm|model\.norm)\.weight": lambda array: array + np.float32(1),
    r"in_proj_qkv": lambda array: tile(array, 8, offset=32),
    r"in_proj_z": lambda array: tile(array, 8),
    r"in_proj_[ab]\.|dt_bias": tile,
    r"A_log": lambda array: tile(-np.exp(array)),
    r"conv1d": lambda array: tile(array[:, 0], 8, offset=32),
    r"linear_attn\.out_proj": lambda array: tile(array, 8, dim=1),
}


@dataclass(frozen=True)
class Case:
    """A tiny model, and what llama.cpp's converter would write of it."""

    architecture: str
    config: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Change] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=lambda: SIZES)
    seq2seq: bool = False


CASES = {
    "llama": Case("llama", "LlamaConfig", {"rms_norm_eps": 1e-5}, changes=PERMUTE),
    "llama with biases": Case(
        "llama",
        "LlamaConfig",
        {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5},
        changes={r"q_proj\.": PERMUTE[r"q_proj\.weight"], r"k_proj\.": PERMUTE[r"k_proj\.weight"]},
    ),
    "llama, tied": Case("llama", "LlamaConfig", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}, changes=PERMUTE),
    "mixtral": Case(
        "llama",
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"expert_count": 4, "expert_used_count": 2, "rope.freq_base": 1e6},
        PERMUTE,
    ),
    "qwen2": Case("qwen2", "Qwen2Config", {"rms_norm_eps": 1e-5}),
    "qwen3": Case("qwen3", "Qwen3Config", {"head_dim": 16, "rms_norm_eps": 1e-5}, {"attention.key_length": 16}),
    "qwen2moe": Case(
        "qwen2moe",
        "Qwen2MoeConfig",
        {**EXPERTS, "shared_expert_intermediate_size": 40, "rms_norm_eps": 1e-5},
        {"expert_count": 4, "expert_used_count": 2},
    ),
    "qwen3moe": Case(
        "qwen3moe",
        "Qwen3MoeConfig",
        {**EXPERTS, "head_dim": 16, "norm_topk_prob": True, "rms_norm_eps": 1e-5},
        {"expert_count": 4, "expert_used_count": 2, "attention.key_length": 16},
    ),
    "gemma": Case(
        "gemma",
        "GemmaConfig",
        {"head_dim": 16, "rms_norm_eps": 1e-5},
        {"attention.key_length": 16},
        {r"norm\.weight": PLUS_ONE[r"norm\.weight"]},
    ),
    "gemma2": Case(
        "gemma2",
        "Gemma2Config",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "rms_norm_eps": 1e-5},
        {"attention.key_length": 16, "attention.sliding_window": 8},
        PLUS_ONE,
    ),
    "gemma3": Case(
        "gemma3",
        "Gemma3TextConfig",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "rms_norm_eps": 1e-5},
        {"attention.key_length": 16, "attention.sliding_window": 8, "rope.freq_base": 1e6},
        PLUS_ONE,
    ),
    "phi2": Case(
        "phi2", "PhiConfig", {"num_key_value_heads": 4}, {"rope.dimension_count": 4, "attention.head_count_kv": 4}
    ),
    "phi3": Case("phi3", "Phi3Config", {"pad_token_id": 0}, {"attention.sliding_window": 0}),
    "starcoder2": Case("starcoder2", "Starcoder2Config"),
    "stablelm": Case("stablelm", "StableLmConfig", {}, {"rope.dimension_count": 2}),
    "nemotron": Case("nemotron", "NemotronConfig", {}, {"rope.dimension_count": 4}, PLUS_ONE),
    "olmo": Case("olmo", "OlmoConfig", {"clip_qkv": 2.0}, {"attention.clamp_kqv": 2.0}, PERMUTE),
    "olmo2": Case("olmo2", "Olmo2Config"),
    "olmo3": Case(
        "olmo2",
        "Olmo3Config",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        {"attention.sliding_window": 8, "attention.sliding_window_pattern": [True, False]},
    ),
    "olmoe": Case(
        "olmoe",
        "OlmoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2},
        {"expert_count": 4, "expert_used_count": 2},
    ),
    "command-r": Case(
        "command-r", "CohereConfig", {"logit_scale": 0.25}, {"logit_scale": 0.25, "rope.freq_base": 500000.0}
    ),
    "cohere2": Case(
        "cohere2",
        "Cohere2Config",
        {"head_dim": 8, "sliding_window": 8, "logit_scale": 0.25},
        {"logit_scale": 0.25, "attention.sliding_window": 8, "attention.key_length": 8},
    ),
    "granite": Case(
        "granite",
        "GraniteConfig",
        {"residual_multiplier": 0.22, "rms_norm_eps": 1e-5},
        {"residual_scale": 0.22},
        PERMUTE,
    ),
    "granitemoe": Case(
        "granitemoe",
        "GraniteMoeConfig",
        {"num_local_experts": 4, "rms_norm_eps": 1e-5},
        {"expert_count": 4, "expert_used_count": 2},
        PERMUTE,
    ),
    "smollm3": Case(
        "smollm3", "SmolLM3Config", {"pad_token_id": 0, "rms_norm_eps": 1e-5}, {"rope.freq_base": 2e6}, PERMUTE
    ),
    "gpt2": Case(
        "gpt2",
        "GPT2Config",
        meta={"feed_forward_length": 128},
        changes={r"(c_attn|c_proj|c_fc)\.weight": np.transpose},
        base=GPT2_SIZES,
    ),
    "gptneox": Case(
        "gptneox",
        "GPTNeoXConfig",
        meta={"rope.dimension_count": 2, "use_parallel_residual": True},
        changes={r"query_key_value": lambda array: ungroup(array, HEADS, HEADS)},
        base={key: value for key, value in SIZES.items() if key != "num_key_value_heads"},
    ),
    "bloom": Case(
        "bloom",
        "BloomConfig",
        changes={r"query_key_value": lambda array: ungroup(array, HEADS, HEADS)},
        base={"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
    ),
    "falcon 7b": Case(
        "falcon",
        "FalconConfig",
        {"multi_query": True},
        {"attention.head_count_kv": 1, "feed_forward_length": 128},
        {r"query_key_value": lambda array: ungroup(array, HEADS, 1)},
    ),
    "falcon 40b": Case(
        "falcon",
        "FalconConfig",
        {"new_decoder_architecture": True, "num_kv_heads": GROUPS},
        {"feed_forward_length": 128},
        {r"query_key_value": lambda array: ungroup(array, HEADS, GROUPS)},
    ),
    "t5": Case("t5", "T5Config", {"feed_forward_proj": "gated-gelu"}, base=T5_SIZES, seq2seq=True),
    "t5, first": Case("t5", "T5Config", {"feed_forward_proj": "relu"}, base=T5_SIZES, seq2seq=True),
    "umt5": Case("t5", "UMT5Config", base=T5_SIZES, seq2seq=True),
    "mamba": Case(
        "mamba",
        "MambaConfig",
        meta={"ssm.inner_size": 64, "ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.time_step_rank": 2},
        changes={r"A_log": lambda array: -np.exp(array), r"conv1d\.weight": lambda array: array[:, 0]},
        base={"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS},
    ),
    "lfm2": Case(
        "lfm2",
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        {"attention.head_count_kv": [0, GROUPS], "shortconv.l_cache": 3, "rope.freq_base": 1e6},
        {r"conv\.conv\.weight": lambda array: array[:, 0]},
    ),
    "gpt-oss": Case(
        "gpt-oss",
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8},
        {
            "expert_count": 4,
            "expert_used_count": 2,
            "attention.key_length": 16,
            "attention.sliding_window": 8,
            "rope.freq_base": 150000.0,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 32.0,
            "rope.scaling.original_context_length": 4096,
        },
        {r"experts\.(gate_up_proj|down_proj)$": lambda array: array.swapaxes(1, 2)},
    ),
    "qwen35": Case("qwen35", "Qwen3_5TextConfig", LINEAR, LINEAR_META, TILE),
    "qwen35moe": Case(
        "qwen35moe",
        "Qwen3_5MoeTextConfig",
        {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 40, "norm_topk_prob": True},
        {**LINEAR_META, "expert_count": 4, "expert_used_count": 2},
        TILE,
    ),
}


def build(case: Case) -> Any:
    config = getattr(transformers, case.config)(**{**case.base, **case.sizes})
    auto = transformers.AutoModelForSeq2SeqLM if case.seq2seq else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("A_log"):  # its logarithm must exist
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def split_experts(name: str, array: Array, architecture: str) -> Iterator[tuple[str, Array]]:
    """Experts as llama.cpp has them: gate and up apart."""
    head, fused, tail = name.partition("gate_up_proj")
    if not fused or "experts" not in head:
        yield re.sub(r"(experts\.down_proj)(_bias)?$", lambda m: m[1] + (".bias" if m[2] else ".weight"), name), array
        return
    suffix = ".bias" if tail == "_bias" else ".weight"
    half = array.shape[1] // 2
    parts = (array[:, ::2], array[:, 1::2]) if architecture == "gpt-oss" else (array[:, :half], array[:, half:])
    for part, kind in zip(parts, ("gate_proj", "up_proj"), strict=True):
        yield f"{head}{kind}{suffix}", part


# What gguf-py's table does not know under the name that the module has today.
RENAMED = {
    r"block_sparse_moe\.experts\.(gate|up|down)_proj": r"mlp.experts.\1_proj",
    r"block_sparse_moe\.router": "mlp.gate",
    r"^transformer\.(h\.\d+\.post_attention_layernorm|word_embeddings_layernorm)": r"\1",
    r"self_attn\.sinks": "self_attn.sinks.weight",
    r"linear_attn\.dt_bias": "linear_attn.dt_proj.bias",
    r"^encoder\.embed_tokens.*|^decoder\.embed_tokens.*": "",
}


def gguf_tensors(model: Any, case: Case) -> dict[str, Stored]:
    """The state dict under gguf-py's names, changed as llama.cpp's converter changes it."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[case.architecture], LAYERS)
    tied = set(model.all_tied_weights_keys)
    stored: dict[str, Stored] = {}
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        array = tensor.numpy()
        for pattern, change in case.changes.items():
            if re.search(pattern, name):
                array = change(array)
        for part_name, part in split_experts(name, array, case.architecture):
            for pattern, replacement in RENAMED.items():
                part_name = re.sub(pattern, replacement, part_name)  # noqa: PLW2901 - one change after the other
            gguf_name = names.get_name(part_name, try_suffixes=(".weight", ".bias"))
            assert gguf_name is not None, part_name
            stored[gguf_name] = stored_array(part)
    return stored


def metadata(case: Case, **more: Any) -> dict[str, Any]:
    keys = {**META, **case.meta}
    if case.architecture in ("t5", "t5encoder"):
        keys |= {"attention.key_length": 8, "attention.relative_buckets_count": 32, "decoder_start_token_id": 0}
    prefixed = {f"{case.architecture}.{key}": value for key, value in keys.items()}
    return {"general.architecture": case.architecture, **prefixed, "tokenizer.ggml.eos_token_id": 2, **more}


def read_back(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Any:
    """A model from a header alone, filled as a loader would."""
    config_class = transformers.CONFIG_MAPPING[config["model_type"]]
    model_class = getattr(transformers, config["architectures"][0])
    model = model_class._from_config(config_class.from_dict(dict(config))).eval()
    state, filled = model.state_dict(), set()
    for name, target in tensor_targets(checkpoint, config).items():
        info = checkpoint.tensors[name]
        raw = np.fromfile(info.file, np.float32, count=info.numel, offset=info.offset).reshape(info.shape)
        array = apply_layout(target.layout, raw)
        destination = state[target.name] if target.part is None else state[target.name][target.part.index]
        assert destination.shape == array.shape, (name, target)
        destination.copy_(torch.from_numpy(np.ascontiguousarray(array)))
        filled.add(target.name)
    model.tie_weights()
    assert state.keys() - filled <= set(model.all_tied_weights_keys)
    return model


@pytest.mark.parametrize("name", CASES)
def test_family_comes_back(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = build(case)
    path = Gguf(metadata(case), gguf_tensors(model, case)).write(tmp_path / "m.gguf")
    checkpoint = read_gguf(path)
    config = config_from_metadata(checkpoint)
    again = read_back(checkpoint, config)
    assert type(again) is type(model)
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], tensor, rtol=0, atol=2e-7, msg=lambda m, k=key: f"{k}: {m}")
    tokens = torch.arange(3, 40)[None]
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if case.seq2seq else {})
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)


def test_every_family_has_a_case() -> None:
    covered = {case.architecture for case in CASES.values()} | {"llama moe", "t5encoder"}
    assert covered == set(FAMILIES)


def small(tmp_path: Path, tensors: Mapping[str, Stored] | None = None, **meta: Any) -> Checkpoint:
    """A header of a llama without weights to speak of."""
    named = {"token_embd.weight": Stored((VOCAB, WIDTH)), "blk.0.attn_q.weight": Stored((WIDTH, WIDTH))}
    keys = {f"llama.{key}": value for key, value in {**META, "block_count": 1}.items()}
    keys |= {key.replace("__", "."): value for key, value in meta.items()}
    found = {key: value for key, value in {"general.architecture": "llama", **keys}.items() if value is not None}
    return read_gguf(Gguf(found, {**named, **(tensors or {})}).write(tmp_path / "m.gguf"))


def test_config_states_what_the_file_states(tmp_path: Path) -> None:
    ids = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 0}
    config = config_from_metadata(small(tmp_path, **ids))
    assert config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 128,
        "num_hidden_layers": 1,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "unk_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "mlp_bias": False,
    }


def test_output_weight_unties(tmp_path: Path) -> None:
    checkpoint = small(tmp_path, {"output.weight": Stored((VOCAB, WIDTH))})
    assert config_from_metadata(checkpoint)["tie_word_embeddings"] is False


def test_absent_kv_heads_are_as_many_as_heads(tmp_path: Path) -> None:
    config = config_from_metadata(small(tmp_path, llama__attention__head_count_kv=None))
    assert config["num_key_value_heads"] == HEADS


def test_linear_scaling_is_kept(tmp_path: Path) -> None:
    meta = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    params = config_from_metadata(small(tmp_path, **meta))["rope_parameters"]
    assert params == {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}


def llama3_factors(**changes: float) -> list[float]:
    """What llama.cpp's converter computes from Llama 3's rope parameters."""
    params = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    params |= changes
    low, high, old = params["low_freq_factor"], params["high_freq_factor"], params["original_max_position_embeddings"]
    factors = []
    for index in range(64):
        wavelength = 2 * np.pi * 500000.0 ** (index / 64)
        smooth = (old / wavelength - low) / (high - low)
        factors.append(float(1 / ((1 - np.clip(smooth, 0, 1)) / params["factor"] + np.clip(smooth, 0, 1))))
    return factors


def rope_freqs(factors: list[float]) -> dict[str, Stored]:
    return {"rope_freqs.weight": stored_array(np.array(factors, np.float32))}


@pytest.mark.parametrize("changes", [{}, {"factor": 32.0}, {"original_max_position_embeddings": 4096}])
def test_llama_3_scaling_is_recovered_from_its_factors(tmp_path: Path, changes: dict[str, float]) -> None:
    checkpoint = small(tmp_path, rope_freqs(llama3_factors(**changes)), **{"llama.rope.freq_base": 500000.0})
    assert config_from_metadata(checkpoint)["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        **changes,
    }
    assert "rope_freqs.weight" not in tensor_targets(checkpoint, config_from_metadata(checkpoint))


def test_rotary_factors_of_no_known_scaling_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFormat, match=r"rope_freqs\.weight are not those of Llama 3's scaling"):
        config_from_metadata(small(tmp_path, rope_freqs([1.0, 7.0, 2.0])))


def test_gemma_27b_scales_its_queries_by_the_mean_width(tmp_path: Path) -> None:
    layers = {f"blk.{index}.attn_q.weight": Stored((HEADS * 16, WIDTH)) for index in range(46)}
    meta = {f"gemma2.{key}": value for key, value in {**META, "block_count": 46}.items()}
    tensors = {"token_embd.weight": Stored((VOCAB, WIDTH)), **layers}
    path = Gguf({"general.architecture": "gemma2", **meta}, tensors).write(tmp_path / "m.gguf")
    assert config_from_metadata(read_gguf(path))["query_pre_attn_scalar"] == WIDTH // HEADS


def test_long_rope_of_phi_is_read_from_its_tensors(tmp_path: Path) -> None:
    case = CASES["phi3"]
    factors = {f"rope_factors_{kind}.weight": stored_array(np.array([1.1, 2.0])) for kind in ("long", "short")}
    meta = metadata(case, **{"phi3.rope.scaling.original_context_length": 64})
    path = Gguf(meta, {**gguf_tensors(build(case), case), **factors}).write(tmp_path / "m.gguf")
    config = config_from_metadata(read_gguf(path))
    assert config["rope_parameters"]["rope_type"] == "longrope"
    assert config["rope_parameters"]["long_factor"] == [1.1, 2.0]
    assert config["original_max_position_embeddings"] == 64


def test_prediction_blocks_are_left_out(tmp_path: Path) -> None:
    case = CASES["qwen35"]
    extra = {"blk.2.nextn.eh_proj.weight": Stored((WIDTH, 2 * WIDTH))}
    meta = metadata(case, **{"qwen35.block_count": LAYERS + 1, "qwen35.nextn_predict_layers": 1})
    path = Gguf(meta, {**gguf_tensors(build(case), case), **extra}).write(tmp_path / "m.gguf")
    checkpoint = read_gguf(path)
    config = config_from_metadata(checkpoint)
    assert config["num_hidden_layers"] == LAYERS
    assert not extra.keys() & tensor_targets(checkpoint, config).keys()


def test_encoder_of_t5_alone_is_an_encoder(tmp_path: Path) -> None:
    case = CASES["t5"]
    tensors = {name: tensor for name, tensor in gguf_tensors(build(case), case).items() if not name.startswith("dec.")}
    meta = {key.replace("t5.", "t5encoder."): value for key, value in metadata(case).items()}
    path = Gguf({**meta, "general.architecture": "t5encoder"}, tensors).write(tmp_path / "m.gguf")
    config = config_from_metadata(read_gguf(path))
    assert config["architectures"] == ["T5EncoderModel"]
    targets = tensor_targets(read_gguf(path), config)
    assert targets["enc.blk.1.attn_q.weight"].name == "encoder.block.1.layer.0.SelfAttention.q.weight"


def test_million_blocks_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"block_count promises 1000000 blocks, the file has tensors of 1 blocks"):
        config_from_metadata(small(tmp_path, llama__block_count=1_000_000))


def test_missing_block_is_refused(tmp_path: Path) -> None:
    tensors = {"blk.2.attn_q.weight": Stored((WIDTH, WIDTH))}
    with pytest.raises(
        InvalidConfig, match=r"block_count promises 2 blocks, the file has tensors of 2 blocks named blk\.N"
    ):
        config_from_metadata(small(tmp_path, tensors, llama__block_count=2))


def test_unknown_architecture_names_the_known(tmp_path: Path) -> None:
    with pytest.raises(UnknownArchitecture, match=r"general\.architecture is 'lama'; known are .*Did you mean llama\?"):
        config_from_metadata(small(tmp_path, general__architecture="lama"))


def test_architecture_that_is_not_said_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownArchitecture, match=r"the metadata lacks general\.architecture"):
        config_from_metadata(small(tmp_path, general__architecture=None))


def test_missing_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"the metadata lacks llama\.attention\.head_count, without which"):
        config_from_metadata(small(tmp_path, llama__attention__head_count=None))


def test_missing_embedding_is_refused(tmp_path: Path) -> None:
    keys = {f"llama.{key}": value for key, value in {**META, "block_count": 1}.items()}
    path = Gguf({"general.architecture": "llama", **keys}, {"blk.0.attn_q.weight": Stored((WIDTH, WIDTH))})
    with pytest.raises(InvalidConfig, match=r"there is no tensor token_embd\.weight, without which"):
        config_from_metadata(read_gguf(path.write(tmp_path / "m.gguf")))


def test_sizes_that_differ_between_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFormat, match=r"llama\.feed_forward_length differs between layers \(\[32, 64\]\)"):
        config_from_metadata(small(tmp_path, llama__feed_forward_length=[64, 32]))


def test_size_given_for_each_layer_alike_is_read(tmp_path: Path) -> None:
    assert config_from_metadata(small(tmp_path, llama__feed_forward_length=[64, 64]))["intermediate_size"] == 64


def test_lfm2_without_heads_for_each_layer_is_refused(tmp_path: Path) -> None:
    meta = {f"lfm2.{key}": value for key, value in {**META, "block_count": 1}.items()}
    with pytest.raises(InvalidConfig, match=r"lfm2\.attention\.head_count_kv must have one number for each layer"):
        config_from_metadata(small(tmp_path, general__architecture="lfm2", **meta))


def test_stablelm_with_head_norms_is_refused(tmp_path: Path) -> None:
    meta = {f"stablelm.{key}": value for key, value in {**META, "block_count": 1}.items()}
    norms = {"blk.0.attn_q_norm.weight": Stored((HEADS, 8))}
    with pytest.raises(UnsupportedFormat, match="a StableLM whose queries and keys are normalised for each head"):
        config_from_metadata(small(tmp_path, norms, general__architecture="stablelm", **meta))


def test_unknown_tensor_is_refused(tmp_path: Path) -> None:
    checkpoint = small(tmp_path, {"blk.0.attn_magic.weight": Stored((3,))})
    with pytest.raises(
        CheckpointMismatch, match=r"1 tensors have no place in LlamaForCausalLM, such as blk\.0\.attn_magic"
    ):
        tensor_targets(checkpoint, config_from_metadata(checkpoint))


def test_layouts_undo_what_the_converter_did() -> None:
    array = np.arange(24 * 3, dtype=np.float32).reshape(24, 3)
    np.testing.assert_array_equal(apply_layout(UnpermuteHeads(num_heads=2), permute(array, 2)), array)
    np.testing.assert_array_equal(apply_layout(GroupQkv(num_heads=2, num_kv_heads=1), ungroup(array, 2, 1)), array)
    layout = GroupHeads(num_groups=2, heads_per_group=2, head_dim=4, offset=8)
    np.testing.assert_array_equal(apply_layout(layout, tile(array, 4, offset=8)), array)
    assert apply_layout(None, array) is array
