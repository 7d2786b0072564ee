"""What follows from the fields about attention and positions, with the numbers of this very model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from loadstone.architecture.config_sizes import Sizes, cache_bytes
from loadstone.units import format_bytes

# What follows from a value; a rule is only asked about values of the type its table is for.
Rule = Callable[[Any, Sizes], str | None]

_EXAMPLE_CONTEXT = 4096


def cache_line(sizes: Sizes) -> str | None:
    """What the KV cache takes for a token and for a few thousand."""
    per_token = cache_bytes(sizes, 1)
    context = min(_EXAMPLE_CONTEXT, sizes.context or _EXAMPLE_CONTEXT)
    nbytes = cache_bytes(sizes, context)
    if not per_token or nbytes is None:
        return None
    return f"the KV cache takes {per_token:,} bytes per token in {sizes.dtype}, {format_bytes(nbytes)} for {context:,} tokens"


def _kv_heads(value: Any, sizes: Sizes) -> str | None:
    heads = sizes.num_heads or value
    if sizes.latent is not None:
        return "unpacked from the latent; the KV cache holds only that (kv_lora_rank)"
    cache = cache_line(sizes)
    if value == heads:
        kind = "one for each query head (multi-head attention)"
    elif value == 1:
        kind = f"one for all {heads} query heads (multi-query attention)"
    elif heads % value:
        return f"{heads} query heads cannot share {value} evenly"
    else:
        kind = f"{heads // value} query heads share each (grouped-query attention)"
    saved = f": {heads // value} times less than with one for each query head" if heads > value else ""
    return f"{kind}; {cache}{saved}" if cache else kind


def _heads(value: Any, sizes: Sizes) -> str | None:
    if sizes.head_dim is None:
        return None
    text = f"each is {sizes.head_dim} wide, {value * sizes.head_dim:,} together"
    grouped = sizes.names_any("num_key_value_heads", "num_kv_heads", "multi_query", "kv_lora_rank")
    cache = None if grouped else cache_line(sizes)
    return f"{text}; {cache}" if cache else text


def _head_dim(value: Any, sizes: Sizes) -> str | None:
    if not sizes.width or not sizes.num_heads:
        return None
    implied = sizes.width // sizes.num_heads
    if implied == value:
        return "the same as width over heads"
    together = value * sizes.num_heads
    return f"not width over heads ({implied}): the {sizes.num_heads} heads together are {together:,} wide"


def _implied_head_dim(value: Any, sizes: Sizes) -> str | None:
    if not sizes.width or not sizes.num_heads:
        return None
    return f"width over heads: {sizes.width:,} / {sizes.num_heads} = {sizes.width // sizes.num_heads}"


def _latent(value: Any, sizes: Sizes) -> str | None:
    cache, heads = cache_line(sizes), sizes.num_heads
    key_width = (sizes.number("qk_nope_head_dim") or 0) + (sizes.number("qk_rope_head_dim") or 0)
    value_width = sizes.number("v_head_dim")
    if cache is None or heads is None or value_width is None or not sizes.latent:
        return cache
    ratio = heads * (key_width + value_width) / sizes.latent
    return f"{cache}: {ratio:.0f} times less than the keys and values of all {heads} heads"


def _key_width(value: Any, sizes: Sizes) -> str | None:
    rope, nope = sizes.number("qk_rope_head_dim"), sizes.number("qk_nope_head_dim")
    return f"a query or key head is {nope} + {rope} = {nope + rope} wide" if rope and nope else None


def _window(value: Any, sizes: Sizes) -> str | None:
    if not sizes.window_is_on:
        return "not in force: use_sliding_window is false, so every layer attends to the whole context"
    windowed = sum(kind in {"sliding_attention", "chunked_attention"} for kind in sizes.cached_kinds)
    nbytes = cache_bytes(sizes, value)
    if not windowed or not nbytes:
        return None
    if windowed == len(sizes.cached_kinds):
        return f"the KV cache stops growing at {value:,} tokens, {format_bytes(nbytes)}"
    grows = len(sizes.cached_kinds) - windowed
    per_token = nbytes // value
    return (
        f"{windowed} layers stop growing at {value:,} tokens; beyond them {grows} go on, "
        f"{per_token * grows // len(sizes.cached_kinds):,} bytes per token"
    )


def _use_window(value: Any, sizes: Sizes) -> str | None:
    window = sizes.number("sliding_window")
    if not isinstance(value, bool):
        return None
    if not value:
        return f"sliding_window ({window:,}) is disabled" if window else "every layer attends to the whole context"
    windowed = sizes.kinds.count("sliding_attention")
    return f"{windowed} of {len(sizes.kinds)} layers use the window" if sizes.kinds else None


def _full_layers(value: Any, sizes: Sizes) -> str | None:
    if not sizes.window_is_on:
        return "not in force: use_sliding_window is false"
    return _use_window(True, sizes)


def _pattern(value: Any, sizes: Sizes) -> str | None:
    full = sizes.kinds.count("full_attention")
    return f"{full} of {len(sizes.kinds)} layers attend to everything" if sizes.kinds else None


def _layer_types(value: Any, sizes: Sizes) -> str | None:
    if not isinstance(value, list):
        return None
    counts: dict[str, int] = {}
    for kind in map(str, value):
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{count} × {kind}" for kind, count in counts.items())


def _shared_cache(value: Any, sizes: Sizes) -> str | None:
    layers = sizes.num_layers
    return f"{layers - value} of {layers} layers keep a KV cache" if layers and value else None


def _scale(value: Any, sizes: Sizes) -> str | None:
    if sizes.head_dim == value:
        return f"divided by √{value} = {math.sqrt(value):.4g}, as the head width would have it"
    return f"divided by √{value} = {math.sqrt(value):.4g}, where the head width ({sizes.head_dim}) would give " + (
        f"{math.sqrt(sizes.head_dim):.4g}" if sizes.head_dim else "another number"
    )


def _context(value: Any, sizes: Sizes) -> str | None:
    nbytes = cache_bytes(sizes, value)
    if nbytes:
        return f"filled to the end, the KV cache of one sequence takes {format_bytes(nbytes)}"
    return None


def _position_table(value: Any, sizes: Sizes) -> str | None:
    positions, width = sizes.context, sizes.width
    if value != "absolute" or not positions or not width:
        return None
    return f"a table of {positions:,} × {width:,}; nothing longer than {positions:,} tokens fits"


def _source_positions(value: Any, sizes: Sizes) -> str | None:
    layers, width = sizes.num_layers, sizes.width
    if not sizes.is_encoder_decoder or not layers or not width:
        return None
    nbytes = 2 * layers * width * value * sizes.dtype_bits // 8
    seconds = " (30 s of sound)" if sizes.model_type == "whisper" and value == 1500 else ""
    return f"the decoder keeps keys and values of {value:,} encoder positions{seconds}: {format_bytes(nbytes)}"


def _base(value: Any, sizes: Sizes) -> str | None:
    width = sizes.number("qk_rope_head_dim") or sizes.head_dim
    if not width:
        return None
    width = int(width * float(sizes.get("partial_rotary_factor") or 1))
    slowest = 2 * math.pi * float(value) ** ((width - 2) / width)
    return f"of {width // 2} frequencies the slowest turns once in {slowest:,.0f} tokens"


def _rope(value: Any, sizes: Sizes) -> str | None:
    kinds = {name: inner for name, inner in value.items() if isinstance(inner, Mapping)}
    if kinds:
        return "; ".join(f"{name}: {_rope(inner, sizes)}" for name, inner in kinds.items())
    kind = str(value.get("rope_type", value.get("type", "default")))
    base = f"base {value['rope_theta']:,}" if "rope_theta" in value else ""
    stretch = _STRETCHES.get(kind)
    told = stretch(value, sizes) if stretch is not None else ""
    return ", ".join(text for text in (f"type {kind}", base, told) if text)


def _original(value: Mapping[str, Any], sizes: Sizes) -> int | None:
    found = value.get("original_max_position_embeddings") or sizes.number("original_max_position_embeddings")
    return found if isinstance(found, int) else None


def _factor(value: Mapping[str, Any]) -> float:
    factor = value["factor"]
    if not isinstance(factor, int | float):
        raise TypeError(f"factor is {factor!r}")
    return float(factor)


def _stretched(value: Mapping[str, Any], sizes: Sizes) -> str:
    original = _original(value, sizes)
    reach = f": {original:,} tokens become {int(original * _factor(value)):,}" if original else ""
    return f"stretched {_factor(value):g} times{reach}"


def _llama3(value: Mapping[str, Any], sizes: Sizes) -> str:
    original, context = _original(value, sizes), sizes.context
    reach = f"; trained on {original:,} tokens, made for {context:,}" if original and context else ""
    return f"slow frequencies turn {_factor(value):g} times slower, fast ones as before{reach}"


def _long(value: Mapping[str, Any], sizes: Sizes) -> str:
    original, context = _original(value, sizes), sizes.context
    if not original or not context:
        return "each frequency has a factor of its own"
    return (
        f"each frequency has a factor of its own, short_factor up to {original:,} tokens and long_factor beyond: made "
        f"for {context:,}, {context / original:g} times what it was trained on first"
    )


def _dynamic(value: Mapping[str, Any], sizes: Sizes) -> str:
    since = f" beyond {sizes.context:,} tokens" if sizes.context else ""
    return f"the base grows with the text{since}, by a factor of {_factor(value):g}"


def _linear(value: Mapping[str, Any], sizes: Sizes) -> str:
    return f"positions are divided by {_factor(value):g}"


def _sections(value: Mapping[str, Any], sizes: Sizes) -> str:
    return f"frequencies are shared out to time, height and width as {value.get('mrope_section')}"


# Source: https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_rope_utils.py
_STRETCHES: dict[str, Callable[[Mapping[str, Any], Sizes], str]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _stretched,
    "llama3": _llama3,
    "longrope": _long,
    "su": _long,
    "mrope": _sections,
}


def _trained_context(value: Any, sizes: Sizes) -> str | None:
    context = sizes.context
    return f"stretched {context / value:g} times to {context:,}" if context and context != value else None


def _partial(value: Any, sizes: Sizes) -> str | None:
    return f"{int(value * sizes.head_dim)} of {sizes.head_dim} entries of a head are turned" if sizes.head_dim else None


def _distance_table(value: Any, sizes: Sizes) -> str | None:
    heads = sizes.num_heads
    return f"a table of {value} × {heads} in the first block of each stack, which all share" if heads else None


def _use_cache(value: Any, sizes: Sizes) -> str | None:
    if not sizes.cached_kinds:
        return "no effect: this family keeps no KV cache" if sizes.num_layers else None
    return "generation computes every earlier token again for each new one" if value is False else None


ATTENTION_INTEGERS: dict[str, Rule] = {
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), _kv_heads),
    **dict.fromkeys(("num_attention_heads", "decoder_attention_heads", "n_head", "n_heads", "num_heads"), _heads),
    **dict.fromkeys(("head_dim", "d_kv"), _head_dim),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), _window),
    **dict.fromkeys(("sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval"), _pattern),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_target_positions"), _context),
    "kv_lora_rank": _latent,
    "qk_nope_head_dim": _key_width,
    "max_window_layers": _full_layers,
    "num_kv_shared_layers": _shared_cache,
    "max_source_positions": _source_positions,
    "original_max_position_embeddings": _trained_context,
    "relative_attention_num_buckets": _distance_table,
}

ATTENTION_REALS: dict[str, Rule] = {
    "query_pre_attn_scalar": _scale,
    "rope_theta": _base,
    "partial_rotary_factor": _partial,
    "rotary_pct": _partial,
}

ATTENTION_OTHERS: dict[str, Rule] = {
    "use_sliding_window": _use_window,
    "layer_types": _layer_types,
    "position_embedding_type": _position_table,
    "rope_scaling": _rope,
    "rope_parameters": _rope,
    "use_cache": _use_cache,
}

ATTENTION_NULLS: dict[str, Rule] = {
    "sliding_window": lambda value, sizes: "every layer attends to the whole context",
    "head_dim": _implied_head_dim,
    "rope_scaling": lambda value, sizes: "positions are used as they were trained",
    "q_lora_rank": lambda value, sizes: "queries are projected in one step",
    "num_key_value_heads": lambda value, sizes: _kv_heads(sizes.num_kv_heads, sizes) if sizes.num_kv_heads else None,
}
