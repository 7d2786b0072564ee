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
_STATES = ("linear", "mamba", "recurrent", "kda", "delta")
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
        conv_numel: the last inputs of a convolution, which do not grow with the tokens.
        recurrent_numel: a recurrent state, which does not grow either and is kept in float32.
    """

    token_numel: int = 0
    window: int | None = None
    conv_numel: int = 0
    recurrent_numel: int = 0

    def nbytes(self, context: int, prompt_tokens: int, width_bytes: int) -> int:
        """The most it holds of one sequence, in a dtype of so many bytes.

        A windowed layer's tensors are views of those that the prompt was computed with, which stay whole until the
        next token (`DynamicSlidingWindowLayer.update`).
        """
        kept = context if self.window is None else min(context, max(self.window, prompt_tokens))
        return (self.token_numel * kept + self.conv_numel) * width_bytes + 4 * self.recurrent_numel


def layer_caches(config: Mapping[str, Any]) -> tuple[LayerCache, ...]:
    """The caches of a decoder's layers, in order.

    Args:
        config: of the language model.

    Returns:
        One for each layer; none where the config does not say how wide keys and values are.
    """
    sizes = Sizes(config=config)
    kinds = _kinds(config, sizes)
    shared = sizes.number("num_kv_shared_layers") or 0  # the last layers read what earlier ones keep (Gemma 3n)
    keeping = len(kinds) - shared if shared else len(kinds)
    own = config.get("per_layer_config")  # what single layers have otherwise, by their number
    found: dict[str, LayerCache] = {kind: _layer_cache(kind, sizes) for kind in dict.fromkeys(kinds)}
    layers = [found[kind] if index < keeping else LayerCache() for index, kind in enumerate(kinds)]
    for number, changes in own.items() if isinstance(own, Mapping) else ():
        if number.isdecimal() and int(number) < keeping and isinstance(changes, Mapping):
            changed = Sizes(config={**config, **changes})
            layers[int(number)] = _layer_cache(kinds[int(number)], changed)
    return tuple(layers)


def _layer_cache(kind: str, sizes: Sizes) -> LayerCache:
    if kind == "nothing":
        return LayerCache()
    if kind == "conv":
        return LayerCache(conv_numel=(sizes.width or 0) * (sizes.number("conv_L_cache", "conv_kernel") or 4))
    conv, recurrent = _state_numel(sizes) if kind in ("state", "both") else (0, 0)
    chunk = sizes.number("attention_chunk_size")
    windows = {"sliding": sizes.window, "chunked": chunk or sizes.window}
    return LayerCache(
        token_numel=0 if kind == "state" else _token_numel(sizes),
        window=windows.get(kind),
        conv_numel=conv,
        recurrent_numel=recurrent,
    )


def _token_numel(sizes: Sizes) -> int:
    """Elements of one token in one layer of attention."""
    latent = sizes.number("kv_lora_rank")
    if latent:
        # The compressed vector is cached and expanded in each pass (DeepseekV3Attention.forward, `expand_kv`).
        per_layer = latent + (sizes.number("qk_rope_head_dim") or 0) + (sizes.number("index_head_dim") or 0)
        return per_layer * (2 if sizes.config.get("model_type") == "longcat_flash" else 1)
    heads = max(sizes.num_kv_heads or 0, sizes.number("swa_num_key_value_heads") or 0)
    key_dim = max(sizes.head_dim or 0, sizes.number("global_head_dim") or 0, sizes.number("swa_head_dim") or 0)
    value_dim = max(sizes.number("v_head_dim") or key_dim, sizes.number("swa_v_head_dim") or 0)
    return heads * (key_dim + value_dim)


def _state_numel(sizes: Sizes) -> tuple[int, int]:
    """Elements of one layer that keeps states: the last inputs of its convolution, and its recurrent state."""
    config = sizes.config
    kernel = sizes.number("linear_conv_kernel_dim", "mamba_d_conv", "conv_kernel", "conv1d_width") or 4
    key_heads, value_heads = sizes.number("linear_num_key_heads"), sizes.number("linear_num_value_heads")
    if key_heads and value_heads:  # gated delta nets
        key_dim, value_dim = sizes.number("linear_key_head_dim") or 0, sizes.number("linear_value_head_dim") or 0
        channels = 2 * key_heads * key_dim + value_heads * value_dim
        return channels * kernel, value_heads * key_dim * value_dim
    linear = config.get("linear_attn_config")
    if isinstance(linear, Mapping):  # Kimi Linear
        own = Sizes(config=linear)
        heads, dim = own.number("num_heads") or 0, own.number("head_dim") or 0
        return 3 * heads * dim * (own.number("short_conv_kernel_size") or 4), heads * dim * dim
    inner = _state_width(sizes)
    state = sizes.number("mamba_d_state", "state_size", "ssm_state_size", "mamba_state_dim") or 16
    groups = sizes.number("mamba_n_groups", "mamba_ngroups", "n_groups") or 0
    return (inner + 2 * groups * state) * kernel, inner * state


def _state_width(sizes: Sizes) -> int:
    """The channels of a state space layer."""
    heads, dim = sizes.number("mamba_num_heads", "mamba_n_heads"), sizes.number("mamba_head_dim", "mamba_d_head")
    if heads and dim:
        return heads * dim
    own = sizes.number("mamba_intermediate_size", "mamba_d_ssm", "lru_width")
    if own is None and sizes.config.get("model_type") in _ALL_STATES:
        own = sizes.number("intermediate_size")
    expand = sizes.config.get("mamba_expand", sizes.config.get("expand", 2))
    return own or int((sizes.width or 0) * (expand if isinstance(expand, int | float) else 2))


def _kinds(config: Mapping[str, Any], sizes: Sizes) -> list[str]:
    """The kind of each layer: full, sliding, chunked, conv, state, both or nothing."""
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
    if "conv" in word:
        return "conv"
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
        return "full" if attending else "conv" if sizes.number("conv_L_cache") else "state"
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
