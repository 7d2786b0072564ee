"""Names, keys and layouts that several families of GGUF files share.

Source: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/tensor_mapping.py for the GGUF side; the state
dicts of transformers' classes for the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loadstone.architecture.gguf_layouts import (
    AddConstant,
    GroupQkv,
    Layout,
    LogNegate,
    Transpose,
    UnpermuteHeads,
    Unsqueeze,
)
from loadstone.architecture.gguf_rules import Family, Finish, Fused, Names, Rule

Config = Mapping[str, Any]

KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
EXPERT_KEYS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}


def without_rms(name: str) -> dict[str, str]:
    """The common keys, with a layer norm's epsilon in place of the RMS norm's."""
    keys = {key: value for key, value in KEYS.items() if not key.endswith("rms_epsilon")}
    return {**keys, "attention.layer_norm_epsilon": name}


def query_heads_layout(config: Config) -> Layout:
    """The rows of the query projection."""
    return UnpermuteHeads(num_heads=config["num_attention_heads"])


def kv_heads_layout(config: Config) -> Layout:
    """The rows of the key projection."""
    return UnpermuteHeads(num_heads=config["num_key_value_heads"])


def group_qkv(config: Config) -> Layout:
    """The rows of a joint projection."""
    heads = config.get("num_attention_heads") or config["n_head"]
    return GroupQkv(num_heads=heads, num_kv_heads=config.get("num_kv_heads", heads))


MINUS_ONE = AddConstant(value=-1.0)
TRANSPOSE = Transpose()
COLUMN_KERNEL = Unsqueeze(dim=1, ndim=3)
ROW = Unsqueeze(dim=0, ndim=2)
LOG_NEGATE = LogNegate()

TOP: Names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION: Names = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
QK_NORMS: Names = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
PERMUTED: Names = {
    "attn_q": Rule(name="self_attn.q_proj", layout=query_heads_layout),
    "attn_k": Rule(name="self_attn.k_proj", layout=kv_heads_layout),
}
NORMS: Names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
MLP: Names = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
DECODER: Names = {**ATTENTION, **NORMS, **MLP}


def experts(parent: str, router: str) -> dict[str, str | Rule]:
    """Experts below `parent`, which transformers keeps in two parameters, and their router."""
    fused = f"{parent}.experts.gate_up_proj"
    return {
        "ffn_gate_inp": router,
        "ffn_gate_exps.weight": Rule(name=fused, exact=True, fused=Fused(dim=1, index=0)),
        "ffn_up_exps.weight": Rule(name=fused, exact=True, fused=Fused(dim=1, index=1)),
        "ffn_down_exps.weight": Rule(name=f"{parent}.experts.down_proj", exact=True),
    }


MOE: Names = experts("mlp", "mlp.gate")
SHARED_EXPERT: Names = {
    "ffn_gate_inp_shexp": Rule(name="mlp.shared_expert_gate", layout=ROW),
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}


def offset(names: Names) -> Names:
    """The same names, where the weights of the norms are stored plus one."""
    return {f"{stem}.weight": Rule(name=f"{name}.weight", exact=True, layout=MINUS_ONE) for stem, name in names.items()}


def layers(names: Names) -> dict[str, tuple[str, Names]]:
    """Blocks named as most decoders name them."""
    return {"blk": ("model.layers", names)}


GEMMA_TOP: Names = {**TOP, **offset({"output_norm": "model.norm"})}
GEMMA2_NORMS: Names = offset(
    {
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
)


def causal(model: str, names: Names, *finish: Finish, keys: Mapping[str, str] = KEYS, top: Names = TOP) -> Family:
    """A decoder whose layers are `model.layers`; `model` is "model_type ClassName"."""
    model_type, model_class = model.split()
    return Family(
        model_type=model_type, model_class=model_class, keys=keys, top=top, blocks=layers(names), finish=finish
    )
