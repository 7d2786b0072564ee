"""What each layer keeps between passes, as transformers' `DynamicCache` allocates it.

Source: https://github.com/huggingface/transformers/blob/main/src/transformers/cache_utils.py
(`get_layer_types_and_kwargs`, `DYNAMIC_LAYER_TYPE_MAPPING`) and the attention classes that fill it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loadstone.architecture.config import Sizes

# Kinds of layers by the words that configs use for them.
_WINDOWED = ("sliding", "local")
_STATES = ("linear", "mamba", "conv", "recurrent", "kda", "delta")
_NOTHING = ("dummy", "moe", "mlp", "reuse")

# Families whose every n-th layer attends to everything where config.json has no `layer_types`; the first is number 1.
# Source: `__post_init__` of their configuration classes in transformers.
_EVERY_NTH_FULL = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2, "llama4_text": 4}
_EVERY_NTH_FULL_LINEAR = {"qwen3_next": 4, "qwen3_5": 4, "qwen3_5_text": 4, "qwen3_5_moe": 4, "qwen3_5_moe_text": 4}
# Families whose layers are all states, and one whose layers all have both.
_ALL_STATES = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm")
_ALL_BOTH = ("falcon_h1", "hymba")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCache:
    """What one layer keeps of one sequence, in elements.

    Attributes:
        token_numel: keys and values of one token, or what stands for them.
        window: how many tokens are kept; None for all.
        state_numel: what does not grow with the tokens.
    """

    token_numel: int = 0
    window: int | None = None
    state_numel: int = 0

    def numel(self, context: int, prompt_tokens: int) -> int:
        """The most it holds of one sequence.

        A windowed layer's tensors are views of those that the prompt was computed with, which stay whole until the
        next token (`DynamicSlidingWindowLayer.update`).
        """
        kept = context if self.window is None else min(context, max(self.window, prompt_tokens))
        return self.token_numel * kept + self.state_numel


def layer_caches(config: Mapping[str, Any]) -> tuple[LayerCache, ...]:
    """The caches of a decoder's layers, in order.

    Args:
        config: of the language model.

    Returns:
        One for each layer; none where the config does not say how wide keys and values are.
    """
    sizes = Sizes(config=config)
    kinds = _kinds(config, sizes)
    token, state = _token_numel(sizes), _state_numel(sizes)
    chunk = sizes.number("attention_chunk_size")
    window = sizes.window
    makers = {
        "full": LayerCache(token_numel=token),
        "sliding": LayerCache(token_numel=token, window=window),
        "chunked": LayerCache(token_numel=token, window=chunk or window),
        "state": LayerCache(state_numel=state),
        "both": LayerCache(token_numel=token, state_numel=state),
        "nothing": LayerCache(),
    }
    shared = sizes.number("num_kv_shared_layers") or 0  # the last layers read what earlier ones keep (Gemma 3n)
    return tuple(
        LayerCache() if shared and index >= len(kinds) - shared else makers[kind] for index, kind in enumerate(kinds)
    )


def _token_numel(sizes: Sizes) -> int:
    """Elements of one token in one layer of attention."""
    latent = sizes.number("kv_lora_rank")
    if latent:
        # The compressed vector is cached and expanded in each pass (DeepseekV3Attention.forward, `expand_kv`).
        per_layer = latent + (sizes.number("qk_rope_head_dim") or 0) + (sizes.number("index_head_dim") or 0)
        return per_layer * (2 if sizes.config.get("model_type") == "longcat_flash" else 1)
    widest_heads = max(sizes.num_kv_heads or 0, sizes.number("swa_num_key_value_heads") or 0)
    widest_dim = max(sizes.head_dim or 0, sizes.number("global_head_dim") or 0)
    return 2 * widest_heads * widest_dim


def _state_numel(sizes: Sizes) -> int:
    """Elements of the state of one layer without attention; states that are kept in float32 count double."""
    key_heads, value_heads = sizes.number("linear_num_key_heads"), sizes.number("linear_num_value_heads")
    kernel = sizes.number("linear_conv_kernel_dim", "mamba_d_conv", "conv_kernel", "conv_L_cache", "conv1d_width") or 4
    if key_heads and value_heads:  # gated delta nets
        key_dim, value_dim = sizes.number("linear_key_head_dim") or 0, sizes.number("linear_value_head_dim") or 0
        channels = 2 * key_heads * key_dim + value_heads * value_dim
        return 2 * value_heads * key_dim * value_dim + channels * kernel
    width = sizes.width or 0
    expand = sizes.config.get("mamba_expand", sizes.config.get("expand", 2))
    inner = sizes.number("mamba_intermediate_size", "mamba_d_ssm", "lru_width")
    inner = inner or int(width * (expand if isinstance(expand, int | float) else 2))
    state = sizes.number("mamba_d_state", "state_size", "ssm_state_size", "mamba_state_dim") or 16
    groups = sizes.number("mamba_n_groups", "mamba_ngroups", "n_groups") or 1
    return 2 * inner * state + (inner + 2 * groups * state) * kernel


def _kinds(config: Mapping[str, Any], sizes: Sizes) -> list[str]:
    """The kind of each layer: full, sliding, chunked, state, both or nothing."""
    count = sizes.num_layers or 0
    for name in ("layer_types", "layers_block_type", "block_types"):
        listed = config.get(name)
        if isinstance(listed, list) and listed:
            repeated = [listed[index % len(listed)] for index in range(count or len(listed))]
            return [_kind(str(kind), sizes) for kind in repeated]
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str) and pattern:  # Nemotron-H: M a state, * attention, - a feed-forward layer
        return [{"M": "state", "*": "full"}.get(letter, "nothing") for letter in pattern]
    return [_kind_at(index, config, sizes) for index in range(count)]


def _kind(word: str, sizes: Sizes) -> str:
    if "hybrid" in word:
        return "both"
    if "chunked" in word:
        return "chunked"
    if any(part in word for part in _WINDOWED):
        return "sliding" if sizes.window else "full"
    if any(part in word for part in _STATES):
        return "state"
    return "nothing" if word in _NOTHING else "full"


def _kind_at(index: int, config: Mapping[str, Any], sizes: Sizes) -> str:
    """The kind of a layer that is not listed but follows from a rule of its family."""
    model_type = str(config.get("model_type"))
    if model_type in _ALL_STATES:
        return "state"
    if model_type in _ALL_BOTH:
        return "both"
    attending = _attending(index, config, sizes, model_type)
    if attending is not None:
        return "full" if attending else "state"
    every = sizes.number("sliding_window_pattern", "_sliding_window_pattern") or _EVERY_NTH_FULL.get(model_type)
    if sizes.window is None and not sizes.number("attention_chunk_size"):
        return "full"
    if every is not None and (index + 1) % every == 0:
        return "full"
    windowed_from = sizes.number("max_window_layers")
    if config.get("use_sliding_window") and windowed_from is not None and index < windowed_from:
        return "full"
    return "sliding" if sizes.window else "chunked"


def _attending(index: int, config: Mapping[str, Any], sizes: Sizes, model_type: str) -> bool | None:
    """Whether a layer of a hybrid attends; None where nothing says that the model is one."""
    period = sizes.number("attn_layer_period")
    if period:
        return index % period == (sizes.number("attn_layer_offset") or 0)
    for name in ("attn_layer_indices", "full_attn_idxs"):
        if isinstance(config.get(name), list):
            return index in config[name]
    linear = config.get("linear_attn_config")
    if isinstance(linear, Mapping) and isinstance(linear.get("full_attn_layers"), list):
        return index + 1 in linear["full_attn_layers"]  # Kimi Linear counts from 1
    every = sizes.number("full_attention_interval") or _EVERY_NTH_FULL_LINEAR.get(model_type)
    return (index + 1) % every == 0 if every else None
