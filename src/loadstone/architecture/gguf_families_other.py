"""The families of GGUF files whose classes have names of their own.

Source: https://github.com/ggml-org/llama.cpp/tree/master/conversion for how each is converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loadstone.architecture.gguf_config import (
    attention_bias,
    falcon,
    gpt_neox,
    gpt_oss,
    head_dim,
    kv_heads,
    lfm2,
    mamba,
    moe_widths,
    qwen35,
    rope,
    t5,
)
from loadstone.architecture.gguf_layouts import Chain, GroupHeads, Layout
from loadstone.architecture.gguf_names import (
    ATTENTION,
    COLUMN_KERNEL,
    EXPERT_KEYS,
    GEMMA_TOP,
    KEYS,
    LOG_NEGATE,
    MLP,
    MOE,
    QK_NORMS,
    SHARED_EXPERT,
    TRANSPOSE,
    causal,
    group_qkv,
    offset,
    without_rms,
)
from loadstone.architecture.gguf_rules import Family, Fused, Names, Rule

Config = Mapping[str, Any]


def _t5_block(names: Names, feed_forward: int) -> Names:
    attention = {f"attn_{letter}": f"layer.0.SelfAttention.{letter}" for letter in "qkvo"}
    return {
        **attention,
        **names,
        "attn_norm": "layer.0.layer_norm",
        "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
        "ffn_norm": f"layer.{feed_forward}.layer_norm",
        "ffn_gate": f"layer.{feed_forward}.DenseReluDense.wi_0",
        "ffn_up": Rule(
            name=f"layer.{feed_forward}.DenseReluDense.wi",
            beside=("ffn_gate.weight", f"layer.{feed_forward}.DenseReluDense.wi_1"),
        ),
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
    return Chain(layouts=(_value_rows_after_keys(config), COLUMN_KERNEL))


def _value_decay(config: Config) -> Layout:
    return Chain(layouts=(LOG_NEGATE, _value_heads(config)))


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
    **ATTENTION,
    **MLP,
    **offset({"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm", **QK_NORMS}),
    **_LINEAR_ATTENTION,
}


def _gpt_oss_experts() -> dict[str, str | Rule]:
    rules: dict[str, str | Rule] = {"ffn_gate_inp": "mlp.router"}
    for index, gguf_name in enumerate(("ffn_gate_exps", "ffn_up_exps")):
        rules[f"{gguf_name}.weight"] = Rule(
            name="mlp.experts.gate_up_proj",
            exact=True,
            layout=TRANSPOSE,
            fused=Fused(dim=2, index=index, interleaved=True),
        )
        rules[f"{gguf_name}.bias"] = Rule(
            name="mlp.experts.gate_up_proj_bias", exact=True, fused=Fused(dim=1, index=index, interleaved=True)
        )
    rules["ffn_down_exps.weight"] = Rule(name="mlp.experts.down_proj", exact=True, layout=TRANSPOSE)
    rules["ffn_down_exps.bias"] = Rule(name="mlp.experts.down_proj_bias", exact=True)
    return rules


_GPT2_KEYS = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_BLOOM_KEYS = {
    "block_count": "n_layer",
    "embedding_length": "hidden_size",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_FALCON_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "ffn_hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_MAMBA_KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
    "ssm.conv_kernel": "conv_kernel",
    "ssm.state_size": "state_size",
    "ssm.time_step_rank": "time_step_rank",
}
_QWEN35_KEYS = {
    **KEYS,
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
}
_FALCON_BLOCK: Names = {
    "attn_norm": Rule(name="input_layernorm", beside=("attn_norm_2.weight", "ln_mlp")),
    "attn_qkv": Rule(name="self_attention.query_key_value", layout=group_qkv),
    "attn_output": "self_attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_TRANSFORMER_TOP: Names = {
    "token_embd": "transformer.word_embeddings",
    "token_embd_norm": "transformer.word_embeddings_layernorm",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_T5_ENCODER: dict[str, tuple[str, Names]] = {"enc.blk": ("encoder.block", _t5_block({}, 1))}
_T5_TOP: Names = {
    "token_embd": "shared",
    "enc.output_norm": "encoder.final_layer_norm",
    "dec.output_norm": "decoder.final_layer_norm",
    "output": "lm_head",
}

OTHERS: dict[str, Family] = {
    "gpt2": Family(
        model_type="gpt2",
        model_class="GPT2LMHeadModel",
        keys=_GPT2_KEYS,
        top={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        blocks={
            "blk": (
                "transformer.h",
                {
                    "attn_norm": "ln_1",
                    "attn_qkv.weight": Rule(name="attn.c_attn.weight", exact=True, layout=TRANSPOSE),
                    "attn_qkv.bias": "attn.c_attn",
                    "attn_output.weight": Rule(name="attn.c_proj.weight", exact=True, layout=TRANSPOSE),
                    "attn_output.bias": "attn.c_proj",
                    "ffn_norm": "ln_2",
                    "ffn_up.weight": Rule(name="mlp.c_fc.weight", exact=True, layout=TRANSPOSE),
                    "ffn_up.bias": "mlp.c_fc",
                    "ffn_down.weight": Rule(name="mlp.c_proj.weight", exact=True, layout=TRANSPOSE),
                    "ffn_down.bias": "mlp.c_proj",
                },
            )
        },
    ),
    "gptneox": Family(
        model_type="gpt_neox",
        model_class="GPTNeoXForCausalLM",
        keys=without_rms("layer_norm_eps"),
        top={"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "lm_head"},
        blocks={
            "blk": (
                "gpt_neox.layers",
                {
                    **_FALCON_BLOCK,
                    "attn_qkv": Rule(name="attention.query_key_value", layout=group_qkv),
                    "attn_output": "attention.dense",
                },
            )
        },
        finish=(rope, gpt_neox),
    ),
    "bloom": Family(
        model_type="bloom",
        model_class="BloomForCausalLM",
        keys=_BLOOM_KEYS,
        top=_TRANSFORMER_TOP,
        blocks={"blk": ("transformer.h", _FALCON_BLOCK)},
    ),
    "falcon": Family(
        model_type="falcon",
        model_class="FalconForCausalLM",
        keys=_FALCON_KEYS,
        top=_TRANSFORMER_TOP,
        blocks={"blk": ("transformer.h", {**_FALCON_BLOCK, "attn_norm_2": "ln_attn"})},
        finish=(rope, falcon),
    ),
    "t5": Family(
        model_type="t5",
        model_class="T5ForConditionalGeneration",
        keys=_T5_KEYS,
        top=_T5_TOP,
        blocks={**_T5_ENCODER, "dec.blk": ("decoder.block", _t5_block(_CROSS_ATTENTION, 2))},
        finish=(t5,),
    ),
    "t5encoder": Family(
        model_type="t5",
        model_class="T5EncoderModel",
        keys=_T5_KEYS,
        top=_T5_TOP,
        blocks=_T5_ENCODER,
        finish=(t5,),
    ),
    "mamba": Family(
        model_type="mamba",
        model_class="MambaForCausalLM",
        keys=_MAMBA_KEYS,
        top={"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f", "output": "lm_head"},
        blocks={
            "blk": (
                "backbone.layers",
                {
                    "attn_norm": "norm",
                    "ssm_in": "mixer.in_proj",
                    "ssm_conv1d.weight": Rule(name="mixer.conv1d.weight", exact=True, layout=COLUMN_KERNEL),
                    "ssm_conv1d.bias": "mixer.conv1d",
                    "ssm_x": "mixer.x_proj",
                    "ssm_dt": "mixer.dt_proj",
                    "ssm_a": Rule(name="mixer.A_log", exact=True, layout=LOG_NEGATE),
                    "ssm_d": Rule(name="mixer.D", exact=True),
                    "ssm_out": "mixer.out_proj",
                },
            )
        },
        finish=(mamba,),
    ),
    "lfm2": causal(
        "lfm2 Lfm2ForCausalLM",
        {
            **ATTENTION,
            "attn_norm": "operator_norm",
            "attn_output": "self_attn.out_proj",
            "attn_q_norm": "self_attn.q_layernorm",
            "attn_k_norm": "self_attn.k_layernorm",
            "ffn_norm": "ffn_norm",
            "ffn_gate": "feed_forward.w1",
            "ffn_up": "feed_forward.w3",
            "ffn_down": "feed_forward.w2",
            "shortconv.in_proj": "conv.in_proj",
            "shortconv.out_proj": "conv.out_proj",
            "shortconv.conv.weight": Rule(name="conv.conv.weight", exact=True, layout=COLUMN_KERNEL),
            "shortconv.conv.bias": "conv.conv",
        },
        lfm2,
        keys={
            **{key: name for key, name in KEYS.items() if name != "rms_norm_eps"},
            "attention.layer_norm_rms_epsilon": "norm_eps",
            "shortconv.l_cache": "conv_L_cache",
        },
        top={
            "token_embd": "model.embed_tokens",
            "token_embd_norm": "model.embedding_norm",
            "output_norm": "model.embedding_norm",
            "output": "lm_head",
        },
    ),
    "gpt-oss": causal(
        "gpt_oss GptOssForCausalLM",
        {
            **ATTENTION,
            **_gpt_oss_experts(),
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "attn_sinks.weight": Rule(name="self_attn.sinks", exact=True),
        },
        kv_heads,
        head_dim,
        rope,
        attention_bias,
        gpt_oss,
        keys={
            **KEYS,
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
            "attention.sliding_window": "sliding_window",
        },
    ),
    "qwen35": causal(
        "qwen3_5_text Qwen3_5ForCausalLM", _QWEN35_BLOCK, kv_heads, qwen35, keys=_QWEN35_KEYS, top=GEMMA_TOP
    ),
    "qwen35moe": causal(
        "qwen3_5_moe_text Qwen3_5MoeForCausalLM",
        {**_QWEN35_BLOCK, **MOE, **SHARED_EXPERT},
        kv_heads,
        qwen35,
        moe_widths,
        keys={**_QWEN35_KEYS, **EXPERT_KEYS},
        top=GEMMA_TOP,
    ),
}
