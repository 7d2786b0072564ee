"""The parts of a config.json that a GGUF file says in its own way, or only through its tensors.

Each function takes the facts of a file and completes the config.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from loadstone.architecture.gguf_rules import Facts, shortest
from loadstone.errors import InvalidConfig, UnsupportedFormat

Config = dict[str, Any]

# What llama.cpp takes where a file says nothing.
# Source: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-model.cpp (load_hparams)
DEFAULT_ROPE_THETA = 10000.0
DEFAULT_SLIDING_ROPE_THETA = 10000.0

# Layers of the Gemma models whose queries are scaled by the mean instead of the actual head width.
# Source: https://github.com/ggml-org/llama.cpp/tree/master/src/models (gemma2.cpp, gemma3.cpp: f_attention_scale)
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}

# Llama 3's rotary frequencies: every release has these two, the original context is searched for.
# Source: https://github.com/ggml-org/llama.cpp/blob/master/conversion/llama.py (generate_extra_tensors)
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR = 1.0, 4.0
_ORIGINAL_CONTEXTS = (8192, 4096, 16384, 32768, 2048, 65536, 131072)


def one_value(facts: Facts, key: str, value: Any) -> Any:
    """A number that GGUF may give for each layer, but the config has once."""
    if not isinstance(value, list):
        return value
    if len(set(value)) == 1:
        return value[0]
    raise UnsupportedFormat(
        f"{facts.where}: {facts.architecture}.{key} differs between layers ({sorted(set(value))}), which the class of "
        f"this architecture in transformers has no room for."
    )


def kv_heads(facts: Facts, config: Config) -> None:
    """Key-value heads: as many as heads where the file does not say."""
    value = facts.get("attention.head_count_kv", facts.num_heads)
    config["num_key_value_heads"] = one_value(facts, "attention.head_count_kv", value)


def head_dim(facts: Facts, config: Config) -> None:
    """The head width, always given: the classes' defaults are those of one checkpoint."""
    config["head_dim"] = facts.head_dim


def attention_bias(facts: Facts, config: Config) -> None:
    """Whether the projections of the attention have biases, as the tensors say."""
    config["attention_bias"] = facts.has("blk.*.attn_output.bias")


def mlp_bias(facts: Facts, config: Config) -> None:
    """Whether the projections of the MLP have biases, as the tensors say."""
    config["mlp_bias"] = facts.has("blk.*.ffn_up.bias")


def rope(facts: Facts, config: Config) -> None:
    """Rotary embedding: base, partial width, and the scaling of long contexts."""
    params: Config = {"rope_type": "default", "rope_theta": facts.get("rope.freq_base", DEFAULT_ROPE_THETA)}
    width = facts.get("rope.dimension_count")
    if width and width != facts.head_dim:
        params["partial_rotary_factor"] = width / facts.head_dim
    params.update(_scaling(facts))
    factors = facts.checkpoint.metadata.get("rope_freqs.weight")
    if factors and max(factors) > 1:
        params.update(_llama3_scaling(facts, factors, params["rope_theta"]))
    config["rope_parameters"] = params


def _scaling(facts: Facts) -> Config:
    kind = facts.get("rope.scaling.type", "none")
    factor = facts.get("rope.scaling.factor") or facts.get("rope.scale_linear")
    if kind == "yarn":
        return _yarn(facts)
    if factor and factor != 1 and kind in ("linear", "none"):
        return {"rope_type": "linear", "factor": factor}
    return {}


def _yarn(facts: Facts) -> Config:
    scaling: Config = {
        "rope_type": "yarn",
        "factor": facts.need("rope.scaling.factor"),
        "original_max_position_embeddings": facts.need("rope.scaling.original_context_length"),
    }
    renamed = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow", "yarn_attn_factor": "attention_factor"}
    for key, name in renamed.items():
        value = facts.get(f"rope.scaling.{key}")
        if value is not None:
            scaling[name] = float(value)
    return scaling


def _llama3_scaling(facts: Facts, factors: Sequence[float], theta: float) -> Config:
    """The scaling that gives these factors; GGUF keeps the factors only."""
    factor = float(max(factors))
    for context in _ORIGINAL_CONTEXTS:
        expected = _llama3_factors(len(factors), theta, factor, context)
        if all(math.isclose(one, other, rel_tol=1e-3) for one, other in zip(factors, expected, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LOW_FREQ_FACTOR,
                "high_freq_factor": _HIGH_FREQ_FACTOR,
                "original_max_position_embeddings": context,
            }
    raise UnsupportedFormat(
        f"{facts.where}: the rotary factors in rope_freqs.weight are not those of Llama 3's scaling for any original "
        f"context among {_ORIGINAL_CONTEXTS}; use the safetensors checkpoint of this model."
    )


def _llama3_factors(count: int, theta: float, factor: float, context: int) -> list[float]:
    factors = []
    for index in range(count):
        turns = context / (2 * math.pi * theta ** (index / count))
        smooth = (turns - _LOW_FREQ_FACTOR) / (_HIGH_FREQ_FACTOR - _LOW_FREQ_FACTOR)
        smooth = min(1.0, max(0.0, smooth))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def moe_widths(facts: Facts, config: Config) -> None:
    """The widths of experts and of the shared expert, and which layers have none."""
    config["moe_intermediate_size"] = facts.shape("blk.*.ffn_down_exps.weight")[-1]
    if facts.has("blk.*.ffn_down_shexp.weight"):
        config["shared_expert_intermediate_size"] = facts.shape("blk.*.ffn_down_shexp.weight")[-1]
    # llama.cpp normalises the weights of Qwen3's experts without being told.
    config["norm_topk_prob"] = facts.get("expert_weights_norm", facts.architecture == "qwen3moe")
    layers = range(config["num_hidden_layers"])
    config["mlp_only_layers"] = [layer for layer in layers if not facts.has(f"blk.{layer}.ffn_down_exps.weight")]


def gemma2(facts: Facts, config: Config) -> None:
    """Gemma 2's and 3's soft caps, window and attention scale."""
    default_caps = (50.0, 30.0) if facts.architecture == "gemma2" else (None, None)
    config["attn_logit_softcapping"] = facts.get("attn_logit_softcapping", default_caps[0])
    config["final_logit_softcapping"] = facts.get("final_logit_softcapping", default_caps[1])
    if facts.get("attention.sliding_window"):
        config["sliding_window"] = facts.get("attention.sliding_window")
    is_27b = config["num_hidden_layers"] == _GEMMA_27B_LAYERS[facts.architecture]
    config["query_pre_attn_scalar"] = config["hidden_size"] // facts.num_heads if is_27b else facts.head_dim


def gemma3(facts: Facts, config: Config) -> None:
    """Gemma 3's two rotary bases, for full and for sliding layers."""
    full: Config = {"rope_type": "default", "rope_theta": facts.get("rope.freq_base", 1e6), **_scaling(facts)}
    sliding: Config = {
        "rope_type": "default",
        "rope_theta": facts.get("rope.freq_base_swa", DEFAULT_SLIDING_ROPE_THETA),
    }
    config["rope_parameters"] = {"full_attention": full, "sliding_attention": sliding}
    if not facts.get("attention.sliding_window"):
        config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]


def phi3(facts: Facts, config: Config) -> None:
    """Phi-3's window (0 means none) and long rotary factors."""
    config["sliding_window"] = facts.get("attention.sliding_window") or None
    original = facts.get("rope.scaling.original_context_length", config["max_position_embeddings"])
    config["original_max_position_embeddings"] = original
    metadata = facts.checkpoint.metadata
    long, short = metadata.get("rope_factors_long.weight"), metadata.get("rope_factors_short.weight")
    if long and short:
        config["rope_parameters"] |= {
            "rope_type": "longrope",
            "long_factor": [shortest(value) for value in long],
            "short_factor": [shortest(value) for value in short],
            "original_max_position_embeddings": original,
        }


def phi2(facts: Facts, config: Config) -> None:
    """Phi-2's normalisation of queries and keys is not in GGUF; no released model has it."""
    config["qk_layernorm"] = False
    config["partial_rotary_factor"] = config["rope_parameters"].get("partial_rotary_factor", 1.0)


def starcoder2(facts: Facts, config: Config) -> None:
    """StarCoder 2's biases."""
    config["use_bias"] = facts.has("blk.*.attn_q.bias")


def stablelm(facts: Facts, config: Config) -> None:
    """StableLM's variants: biases, and the parallel residual that has no second norm."""
    if facts.has("blk.*.attn_q_norm.weight"):
        raise UnsupportedFormat(
            f"{facts.where}: a StableLM whose queries and keys are normalised for each head; GGUF keeps these norms in "
            "one tensor that transformers has in many. Use the safetensors checkpoint."
        )
    config["use_qkv_bias"] = facts.has("blk.*.attn_q.bias")
    config["use_parallel_residual"] = not facts.has("blk.*.ffn_norm.weight")


def olmo2(facts: Facts, config: Config) -> None:
    """OLMo 2, or 3 where it has a sliding window."""
    window = facts.get("attention.sliding_window")
    if window:
        sliding = facts.get("attention.sliding_window_pattern")
        layers = range(config["num_hidden_layers"])
        slides = sliding if isinstance(sliding, list) else [(layer + 1) % 4 != 0 for layer in layers]
        kinds = ["sliding_attention" if slide else "full_attention" for slide in slides]
        config |= {
            "model_type": "olmo3",
            "architectures": ["Olmo3ForCausalLM"],
            "sliding_window": window,
            "layer_types": kinds,
        }


def cohere(facts: Facts, config: Config) -> None:
    """Command R's normalisation of queries and keys, in the larger models."""
    config["use_qk_norm"] = facts.has("blk.*.attn_q_norm.weight")


def falcon(facts: Facts, config: Config) -> None:
    """Falcon's three generations, told apart by their key-value heads and norms."""
    heads, groups = facts.num_heads, facts.get("attention.head_count_kv", 1)
    two_norms = facts.has("blk.*.attn_norm_2.weight")
    new = two_norms or groups not in (1, heads)
    config |= {
        "num_kv_heads": groups,
        "multi_query": groups == 1,
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": (2 if two_norms else 1) if new else None,
        "parallel_attn": not facts.has("blk.*.ffn_norm.weight"),
        "bias": facts.has("blk.*.attn_qkv.bias"),
        "alibi": False,
    }


def t5(facts: Facts, config: Config) -> None:
    """T5's feed-forward kind, decoder depth and start token; UMT5 has a position bias in every block."""
    gated = facts.has("enc.blk.*.ffn_gate.weight")
    config["feed_forward_proj"] = "gated-gelu" if gated else "relu"
    config["num_decoder_layers"] = facts.get("decoder_block_count", config["num_layers"])
    config["decoder_start_token_id"] = facts.get("decoder_start_token_id", 0)
    if facts.has("enc.blk.1.attn_rel_b.weight"):
        name = config["architectures"][0]
        config |= {"model_type": "umt5", "architectures": [f"UM{name}"]}


def mamba(facts: Facts, config: Config) -> None:
    """Mamba's sizes; Falcon Mamba normalises B, C and the time step."""
    config["expand"] = facts.need("ssm.inner_size") // config["hidden_size"]
    config["intermediate_size"] = facts.need("ssm.inner_size")
    config["use_bias"] = facts.has("blk.*.ssm_in.bias")
    config["use_conv_bias"] = facts.has("blk.*.ssm_conv1d.bias")
    if facts.get("ssm.dt_b_c_rms"):
        config |= {"model_type": "falcon_mamba", "architectures": ["FalconMambaForCausalLM"]}


def lfm2(facts: Facts, config: Config) -> None:
    """LFM2: layers without key-value heads are convolutions."""
    heads = facts.need("attention.head_count_kv")
    if not isinstance(heads, list) or len(heads) != config["num_hidden_layers"]:
        raise InvalidConfig(f"{facts.where}: lfm2.attention.head_count_kv must have one number for each layer.")
    config |= {
        "num_key_value_heads": max(heads),
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "block_auto_adjust_ff_dim": False,
        "conv_bias": facts.has("blk.*.shortconv.in_proj.bias"),
        "rope_parameters": {"rope_type": "default", "rope_theta": facts.get("rope.freq_base", 1e6)},
    }


def gpt_neox(facts: Facts, config: Config) -> None:
    """GPT-NeoX's residual."""
    config["use_parallel_residual"] = facts.get("use_parallel_residual", True)
    config["attention_bias"] = facts.has("blk.*.attn_qkv.bias")


def gpt_oss(facts: Facts, config: Config) -> None:
    """gpt-oss: its YaRN scaling rounds no boundaries, which llama.cpp knows without being told."""
    config["intermediate_size"] = facts.shape("blk.*.ffn_down_exps.weight")[-1]
    if config["rope_parameters"]["rope_type"] == "yarn":
        config["rope_parameters"] = {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            **config["rope_parameters"],
            "truncate": False,
        }


def qwen35(facts: Facts, config: Config) -> None:
    """Qwen 3.5: linear attention with full attention in between, three-axis rotary positions."""
    value_heads = facts.need("ssm.time_step_rank")
    config |= {
        "num_hidden_layers": config["num_hidden_layers"] - facts.get("nextn_predict_layers", 0),
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": facts.need("ssm.inner_size") // value_heads,
        "head_dim": facts.need("attention.key_length"),
    }
    linear = [facts.has(f"blk.{layer}.ssm_a") for layer in range(config["num_hidden_layers"])]
    config["layer_types"] = ["linear_attention" if is_linear else "full_attention" for is_linear in linear]
    config["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": facts.get("rope.freq_base", 1e7),
        "mrope_section": [section for section in facts.need("rope.dimension_sections") if section],
        "mrope_interleaved": True,
        "partial_rotary_factor": facts.need("rope.dimension_count") / config["head_dim"],
    }
