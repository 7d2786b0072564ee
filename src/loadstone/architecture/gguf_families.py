"""The families of GGUF files, each described by the names and keys of its architecture.

Source: https://github.com/ggml-org/llama.cpp/tree/master/conversion and gguf-py's tensor_mapping.py for the GGUF side;
the state dicts of transformers' classes for the other. What llama.cpp knows without being told (the attention scale of
the largest Gemma, say) comes from its src/models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loadstone.architecture.gguf_config import (
    attention_bias,
    cohere,
    gemma2,
    gemma3,
    head_dim,
    kv_heads,
    mlp_bias,
    moe_widths,
    olmo2,
    phi3,
    rope,
    stablelm,
    starcoder2,
)
from loadstone.architecture.gguf_layouts import (
    AddConstant,
    Chain,
    GroupHeads,
    GroupQkv,
    Layout,
    LogNegate,
    Reshape,
    Transpose,
    UnpermuteHeads,
)
from loadstone.architecture.gguf_rules import Family, Fused, Names, Rule

Config = Mapping[str, Any]

_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_EXPERT_KEYS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}


def _without_rms(name: str) -> dict[str, str]:
    """The common keys, with a layer norm's epsilon in place of the RMS norm's."""
    keys = {key: value for key, value in _KEYS.items() if not key.endswith("rms_epsilon")}
    return {**keys, "attention.layer_norm_epsilon": name}


def _query_heads(config: Config) -> Layout:
    return UnpermuteHeads(num_heads=config["num_attention_heads"])


def _kv_heads(config: Config) -> Layout:
    return UnpermuteHeads(num_heads=config["num_key_value_heads"])


def _group_qkv(config: Config) -> Layout:
    heads = config.get("num_attention_heads") or config["n_head"]
    return GroupQkv(num_heads=heads, num_kv_heads=config.get("num_kv_heads", heads))


def _minus_one(config: Config) -> Layout:
    del config
    return AddConstant(value=-1.0)


def _transpose(config: Config) -> Layout:
    del config
    return Transpose()


def _column_kernel(config: Config) -> Layout:
    del config
    return Reshape(shape=(-1, 1, 0))


def _row(config: Config) -> Layout:
    del config
    return Reshape(shape=(1, -1))


def _log_negate(config: Config) -> Layout:
    del config
    return LogNegate()


_TOP: Names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION: Names = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QK_NORMS: Names = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_PERMUTED: Names = {
    "attn_q": Rule(name="self_attn.q_proj", layout=_query_heads),
    "attn_k": Rule(name="self_attn.k_proj", layout=_kv_heads),
}
_NORMS: Names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_MLP: Names = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_DECODER: Names = {**_ATTENTION, **_NORMS, **_MLP}


def _experts(parent: str, router: str) -> dict[str, str | Rule]:
    fused = f"{parent}.experts.gate_up_proj"
    return {
        "ffn_gate_inp": router,
        "ffn_gate_exps.weight": Rule(name=fused, exact=True, fused=Fused(dim=1, index=0)),
        "ffn_up_exps.weight": Rule(name=fused, exact=True, fused=Fused(dim=1, index=1)),
        "ffn_down_exps.weight": Rule(name=f"{parent}.experts.down_proj", exact=True),
    }


_MOE: Names = _experts("mlp", "mlp.gate")
_SHARED_EXPERT: Names = {
    "ffn_gate_inp_shexp": Rule(name="mlp.shared_expert_gate", layout=_row),
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}


def _offset(names: Names) -> Names:
    """The same names, where the weights of the norms are stored plus one."""
    return {
        f"{stem}.weight": Rule(name=f"{name}.weight", exact=True, layout=_minus_one) for stem, name in names.items()
    }


def _layers(names: Names) -> dict[str, tuple[str, Names]]:
    return {"blk": ("model.layers", names)}


_GEMMA_TOP: Names = {**_TOP, **_offset({"output_norm": "model.norm"})}
_GEMMA2_NORMS: Names = _offset(
    {
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
)

LLAMA = Family(
    model_type="llama",
    model_class="LlamaForCausalLM",
    keys=_KEYS,
    top=_TOP,
    blocks=_layers({**_DECODER, **_PERMUTED}),
    finish=(kv_heads, head_dim, rope, attention_bias, mlp_bias),
)
MIXTRAL = Family(
    model_type="mixtral",
    model_class="MixtralForCausalLM",
    keys={**_KEYS, "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    top=_TOP,
    blocks=_layers({**_DECODER, **_PERMUTED, **_MOE}),
    finish=(kv_heads, head_dim, rope),
)


def _t5_block(names: Names, feed_forward: int) -> Names:
    attention = {f"attn_{letter}": f"layer.0.SelfAttention.{letter}" for letter in "qkvo"}
    return {
        **attention,
        **names,
        "attn_norm": "layer.0.layer_norm",
        "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
        "ffn_norm": f"layer.{feed_forward}.layer_norm",
        "ffn_gate": f"layer.{feed_forward}.DenseReluDense.wi_0",
        "ffn_up": f"layer.{feed_forward}.DenseReluDense.wi_1",
        "ffn_up_alone": f"layer.{feed_forward}.DenseReluDense.wi",
        "ffn_down": f"layer.{feed_forward}.DenseReluDense.wo",
    }


_CROSS_ATTENTION: Names = {
    "cross_attn_norm": "layer.1.layer_norm",
    **{f"cross_attn_{letter}": f"layer.1.EncDecAttention.{letter}" for letter in "qkvo"},
}
_T5_KEYS = {
    "context_length": "n_positions",
    "block_count": "num_layers",
    "feed_forward_length": "d_ff",
    "embedding_length": "d_model",
    "attention.key_length": "d_kv",
    "attention.head_count": "num_heads",
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
    "attention.relative_buckets_count": "relative_attention_num_buckets",
}


def _value_heads(config: Config, *, head_dim: int = 1, dim: int = 0, offset: int = 0) -> GroupHeads:
    groups = config["linear_num_key_heads"]
    return GroupHeads(
        num_groups=groups,
        heads_per_group=config["linear_num_value_heads"] // groups,
        head_dim=head_dim,
        dim=dim,
        offset=offset,
    )


def _value_rows(config: Config) -> Layout:
    return _value_heads(config, head_dim=config["linear_value_head_dim"])


def _value_columns(config: Config) -> Layout:
    return _value_heads(config, head_dim=config["linear_value_head_dim"], dim=1)


def _value_rows_after_keys(config: Config) -> Layout:
    offset = 2 * config["linear_key_head_dim"] * config["linear_num_key_heads"]
    return _value_heads(config, head_dim=config["linear_value_head_dim"], offset=offset)


def _value_kernel(config: Config) -> Layout:
    return Chain(layouts=(_value_rows_after_keys(config), _column_kernel(config)))


def _value_decay(config: Config) -> Layout:
    return Chain(layouts=(LogNegate(), _value_heads(config)))


_LINEAR_ATTENTION: Names = {
    "attn_qkv": Rule(name="linear_attn.in_proj_qkv", layout=_value_rows_after_keys),
    "attn_gate": Rule(name="linear_attn.in_proj_z", layout=_value_rows),
    "ssm_alpha": Rule(name="linear_attn.in_proj_a", layout=_value_heads),
    "ssm_beta": Rule(name="linear_attn.in_proj_b", layout=_value_heads),
    "ssm_conv1d": Rule(name="linear_attn.conv1d", layout=_value_kernel),
    "ssm_norm": "linear_attn.norm",
    "ssm_out": Rule(name="linear_attn.out_proj", layout=_value_columns),
    "ssm_a": Rule(name="linear_attn.A_log", exact=True, layout=_value_decay),
    "ssm_dt.bias": Rule(name="linear_attn.dt_bias", exact=True, layout=_value_heads),
}
_QWEN35_BLOCK: Names = {
    **_ATTENTION,
    **_MLP,
    **_offset({"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm", **_QK_NORMS}),
    **_LINEAR_ATTENTION,
}


def _gpt_oss_experts() -> dict[str, str | Rule]:
    rules: dict[str, str | Rule] = {"ffn_gate_inp": "mlp.router"}
    for index, gguf_name in enumerate(("ffn_gate_exps", "ffn_up_exps")):
        rules[f"{gguf_name}.weight"] = Rule(
            name="mlp.experts.gate_up_proj",
            exact=True,
            layout=_transpose,
            fused=Fused(dim=2, index=index, interleaved=True),
        )
        rules[f"{gguf_name}.bias"] = Rule(
            name="mlp.experts.gate_up_proj_bias", exact=True, fused=Fused(dim=1, index=index, interleaved=True)
        )
    rules["ffn_down_exps.weight"] = Rule(name="mlp.experts.down_proj", exact=True, layout=_transpose)
    rules["ffn_down_exps.bias"] = Rule(name="mlp.experts.down_proj_bias", exact=True)
    return rules


def _causal(model: str, names: Names, *finish: Any, keys: Mapping[str, str] = _KEYS, top: Names = _TOP) -> Family:
    """A decoder whose layers are `model.layers`; `model` is "model_type ClassName"."""
    model_type, model_class = model.split()
    return Family(
        model_type=model_type, model_class=model_class, keys=keys, top=top, blocks=_layers(names), finish=finish
    )


FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "qwen2": _causal("qwen2 Qwen2ForCausalLM", _DECODER, kv_heads, rope),
    "qwen3": _causal("qwen3 Qwen3ForCausalLM", {**_DECODER, **_QK_NORMS}, kv_heads, head_dim, rope, attention_bias),
    "qwen2moe": _causal(
        "qwen2_moe Qwen2MoeForCausalLM",
        {**_DECODER, **_MOE, **_SHARED_EXPERT},
        kv_heads,
        rope,
        moe_widths,
        keys={**_KEYS, **_EXPERT_KEYS},
    ),
    "qwen3moe": _causal(
        "qwen3_moe Qwen3MoeForCausalLM",
        {**_DECODER, **_QK_NORMS, **_MOE},
        kv_heads,
        head_dim,
        rope,
        attention_bias,
        moe_widths,
        keys={**_KEYS, **_EXPERT_KEYS},
    ),
    "gemma": _causal(
        "gemma GemmaForCausalLM", {**_DECODER, **_offset(_NORMS)}, kv_heads, head_dim, rope, top=_GEMMA_TOP
    ),
    "gemma2": _causal(
        "gemma2 Gemma2ForCausalLM",
        {**_ATTENTION, **_MLP, **_GEMMA2_NORMS},
        kv_heads,
        head_dim,
        rope,
        gemma2,
        top=_GEMMA_TOP,
    ),
    "gemma3": _causal(
        "gemma3_text Gemma3ForCausalLM",
        {**_ATTENTION, **_MLP, **_GEMMA2_NORMS, **_offset(_QK_NORMS)},
        kv_heads,
        head_dim,
        gemma2,
        gemma3,
        top=_GEMMA_TOP,
    ),
    "phi2": _causal(
        "phi PhiForCausalLM",
        {
            **_ATTENTION,
            "attn_norm": "input_layernorm",
            "attn_output": "self_attn.dense",
            "ffn_up": "mlp.fc1",
            "ffn_down": "mlp.fc2",
        },
        kv_heads,
        rope,
        keys=_without_rms("layer_norm_eps"),
        top={**_TOP, "output_norm": "model.final_layernorm"},
    ),
    "phi3": _causal(
        "phi3 Phi3ForCausalLM",
        {**_DECODER, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        kv_heads,
        rope,
        phi3,
    ),
    "starcoder2": _causal(
        "starcoder2 Starcoder2ForCausalLM",
        {**_ATTENTION, **_NORMS, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        kv_heads,
        rope,
        starcoder2,
        keys=_without_rms("norm_epsilon"),
    ),
    "stablelm": _causal(
        "stablelm StableLmForCausalLM", _DECODER, kv_heads, rope, stablelm, keys=_without_rms("layer_norm_eps")
    ),
    "nemotron": _causal(
        "nemotron NemotronForCausalLM",
        {**_DECODER, **_offset(_NORMS), "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
        kv_heads,
        head_dim,
        rope,
        attention_bias,
        mlp_bias,
        keys=_without_rms("norm_eps"),
        top=_GEMMA_TOP,
    ),
    "olmo": _causal(
        "olmo OlmoForCausalLM",
        {**_DECODER, **_PERMUTED},
        kv_heads,
        rope,
        attention_bias,
        keys={**_KEYS, "attention.clamp_kqv": "clip_qkv"},
    ),
    "olmo2": _causal(
        "olmo2 Olmo2ForCausalLM",
        {
            **_ATTENTION,
            **_MLP,
            **_QK_NORMS,
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        kv_heads,
        rope,
        attention_bias,
        olmo2,
    ),
    "olmoe": _causal(
        "olmoe OlmoeForCausalLM",
        {**_DECODER, **_QK_NORMS, **_MOE},
        kv_heads,
        rope,
        attention_bias,
        keys={**_KEYS, **_EXPERT_KEYS},
    ),
    "command-r": _causal(
        "cohere CohereForCausalLM",
        {**_DECODER, **_QK_NORMS},
        kv_heads,
        rope,
        attention_bias,
        cohere,
        keys={**_without_rms("layer_norm_eps"), "logit_scale": "logit_scale"},
    ),
    "cohere2": _causal(
        "cohere2 Cohere2ForCausalLM",
        _DECODER,
        kv_heads,
        head_dim,
        rope,
        attention_bias,
        keys={
            **_without_rms("layer_norm_eps"),
            "logit_scale": "logit_scale",
            "attention.sliding_window": "sliding_window",
        },
    ),
    "granite": _causal(
        "granite GraniteForCausalLM",
        {**_DECODER, **_PERMUTED},
        kv_heads,
        rope,
        attention_bias,
        mlp_bias,
        keys={
            **_KEYS,
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
    "granitemoe": _causal(
        "granitemoe GraniteMoeForCausalLM",
        {**_DECODER, **_PERMUTED, **_experts("block_sparse_moe", "block_sparse_moe.router")},
        kv_heads,
        rope,
        attention_bias,
        keys={
            **_KEYS,
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
        },
    ),
    "smollm3": _causal(
        "smollm3 SmolLM3ForCausalLM", {**_DECODER, **_PERMUTED}, kv_heads, rope, attention_bias, mlp_bias
    ),
}
