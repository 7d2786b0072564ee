"""config.json as facts: every field explained, and what follows from it for this very model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loadstone.architecture.config_fields import MEANINGS, UNKNOWN
from loadstone.checkpoint.values import Checkpoint
from loadstone.dtypes import DTYPES
from loadstone.units import format_bytes, format_count

_EXAMPLE_CONTEXT = 4096
_CACHE_DTYPE = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFact:
    """One field of config.json.

    Attributes:
        field: its name; fields of nested configs have a dot.
        value: as it stands in the file.
        meaning: what the field means.
        consequence: what follows from it for this model, or None.
    """

    field: str
    value: Any
    meaning: str
    consequence: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """A config with the checkpoint it belongs to; sizes are found under any of the names families give them.

    Attributes:
        config: the (possibly nested) config.
        checkpoint: its checkpoint, or None.
    """

    config: Mapping[str, Any]
    checkpoint: Checkpoint | None = None

    def number(self, *names: str) -> int | None:
        """The first of these fields that is a positive whole number."""
        for name in names:
            value = self.config.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return None

    @property
    def num_layers(self) -> int | None:
        """Blocks that keep a KV cache: the decoder's in encoder-decoder models."""
        names: tuple[str, ...] = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
        names += ("num_decoder_layers",)
        if self.config.get("is_encoder_decoder"):
            names = ("num_decoder_layers", "decoder_layers", "num_layers", "num_hidden_layers")
        return self.number(*names)

    @property
    def num_heads(self) -> int | None:
        """Query heads."""
        names: tuple[str, ...] = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
        names += ("decoder_attention_heads", "num_decoder_attention_heads", "encoder_attention_heads")
        return self.number(*names)

    @property
    def num_kv_heads(self) -> int | None:
        """Key and value heads."""
        if self.config.get("multi_query"):
            return 1
        return self.number("num_key_value_heads", "num_kv_heads") or self.num_heads

    @property
    def width(self) -> int | None:
        """The width of the residual stream."""
        return self.number("hidden_size", "d_model", "n_embd")

    @property
    def head_dim(self) -> int | None:
        """The width of a head."""
        own = self.number("head_dim", "d_kv")
        if own is None and self.width and self.num_heads:
            return self.width // self.num_heads
        return own

    @property
    def window(self) -> int | None:
        """The sliding window, where it is in force."""
        return None if self.config.get("use_sliding_window") is False else self.number("sliding_window")

    @property
    def dtype(self) -> str:
        """The dtype that the config declares."""
        declared = str(self.config.get("dtype") or self.config.get("torch_dtype") or "").removeprefix("torch.")
        return declared if declared in DTYPES else _CACHE_DTYPE


def explain(config: Mapping[str, Any], checkpoint: Checkpoint | None = None) -> tuple[ConfigFact, ...]:
    """Explain every field of a config.

    Args:
        config: the parsed config.json.
        checkpoint: its checkpoint, which says what the files really hold; None where there is none.

    Returns:
        A fact for each field, in the order of the file; nested configs are gone into.
    """
    return tuple(_facts(config, checkpoint, ""))


def _facts(config: Mapping[str, Any], checkpoint: Checkpoint | None, prefix: str) -> Iterator[ConfigFact]:
    sizes = Sizes(config=config, checkpoint=checkpoint)
    for name, value in config.items():
        consequence = _consequence(name, value, sizes)
        nested = isinstance(value, Mapping) and name.endswith("_config") and name != "quantization_config"
        yield ConfigFact(
            field=prefix + name,
            value="{...}" if nested else value,
            meaning=MEANINGS.get(name, UNKNOWN),
            consequence=consequence,
        )
        if nested:
            yield from _facts(value, checkpoint, f"{prefix}{name}.")


def _consequence(name: str, value: Any, sizes: Sizes) -> str | None:
    rule = _CONSEQUENCES.get(name)
    if rule is None or value is None:
        return _NULL_CONSEQUENCES.get(name) if value is None and rule is not None else None
    try:
        return rule(value, sizes)
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError, IndexError):
        return None  # a field of a type that the family does not have: its value is shown, nothing is concluded


def kv_cache_bytes_per_token(config: Mapping[str, Any], dtype_bits: int = 16) -> int | None:
    """What each token of context adds to the KV cache, over all layers, while no window cuts it off.

    Args:
        config: the parsed config.json, or a nested one.
        dtype_bits: the width of a cached element.

    Returns:
        Bytes, or None where the config does not say enough.
    """
    sizes = Sizes(config=config)
    layers, kv_heads, head_dim = sizes.num_layers, sizes.num_kv_heads, sizes.head_dim
    latent = sizes.number("kv_lora_rank")
    if latent is not None and layers:
        return layers * (latent + (sizes.number("qk_rope_head_dim") or 0)) * dtype_bits // 8
    if not (layers and kv_heads and head_dim):
        return None
    return 2 * layers * kv_heads * head_dim * dtype_bits // 8


def _cache_line(sizes: Sizes) -> str | None:
    per_token = kv_cache_bytes_per_token(sizes.config, DTYPES[sizes.dtype].bits)
    if per_token is None:
        return None
    context = min(_EXAMPLE_CONTEXT, sizes.number("max_position_embeddings", "n_positions") or _EXAMPLE_CONTEXT)
    return (
        f"the KV cache takes {per_token:,} bytes per token in {sizes.dtype}, {format_bytes(per_token * context)} for "
        f"{context:,} tokens"
    )


def _kv_heads(value: Any, sizes: Sizes) -> str | None:
    heads = sizes.num_heads or 0
    if value == heads:
        kind = "one for each query head (multi-head attention)"
    elif value == 1:
        kind = f"one for all {heads} query heads (multi-query attention)"
    else:
        kind = f"{heads // value} query heads share each (grouped-query attention)"
    cache = _cache_line(sizes)
    saved = f", {heads // value} times less than with a pair for each query head" if heads > value else ""
    return f"{kind}; {cache}{saved}" if cache else kind


def _heads(value: Any, sizes: Sizes) -> str | None:
    if sizes.head_dim is None:
        return None
    text = f"each is {sizes.head_dim} wide"
    if sizes.number("num_key_value_heads", "num_kv_heads", "kv_lora_rank") is None and not sizes.config.get(
        "multi_query"
    ):
        cache = _cache_line(sizes)
        return f"{text}; {cache}" if cache and _generates(sizes) else text
    return text


def _generates(sizes: Sizes) -> bool:
    names = " ".join(map(str, sizes.config.get("architectures") or ()))
    return any(word in names for word in ("CausalLM", "LMHead", "ConditionalGeneration"))


def _window(value: Any, sizes: Sizes) -> str | None:
    if sizes.config.get("use_sliding_window") is False:
        return "not in force: use_sliding_window is false, so every layer attends to the whole context"
    per_token = kv_cache_bytes_per_token(sizes.config, DTYPES[sizes.dtype].bits)
    if per_token is None:
        return f"windowed layers see {value:,} tokens back"
    share = _windowed_share(sizes)
    if share == 1:
        return f"the KV cache stops growing at {value:,} tokens, {format_bytes(per_token * value)}"
    return f"the cache of windowed layers stops growing at {value:,} tokens"


def _windowed_share(sizes: Sizes) -> float:
    kinds = sizes.config.get("layer_types")
    if isinstance(kinds, list) and kinds:
        return sum("sliding" in str(kind) for kind in kinds) / len(kinds)
    pattern = sizes.number("sliding_window_pattern", "_sliding_window_pattern")
    windowed_from = sizes.number("max_window_layers")
    if windowed_from is not None and sizes.num_layers:
        return max(0, sizes.num_layers - windowed_from) / sizes.num_layers
    return 1.0 if pattern is None else 1 - 1 / pattern


def _use_window(value: Any, sizes: Sizes) -> str | None:
    if value is False and sizes.config.get("sliding_window"):
        return f"sliding_window ({sizes.config['sliding_window']:,}) is disabled"
    return f"{_windowed_share(sizes):.0%} of the layers use the window" if value else None


def _layer_types(value: Any, sizes: Sizes) -> str:
    counts: dict[str, int] = {}
    for kind in value:
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{count} × {kind}" for kind, count in counts.items())


def _tied(value: Any, sizes: Sizes) -> str | None:
    vocabulary, width = sizes.number("vocab_size"), sizes.width
    if not vocabulary or not width:
        return None
    nbytes = vocabulary * width * DTYPES[sizes.dtype].bits // 8
    table = f"{vocabulary:,} × {width:,} elements of {sizes.dtype}"
    if value:
        return f"one table instead of two saves {format_bytes(nbytes)} ({table})"
    return f"the output head is a table of its own, {format_bytes(nbytes)} ({table})"


def _dtype(value: Any, sizes: Sizes) -> str | None:
    name = str(value).removeprefix("torch.")
    if sizes.checkpoint is None or name not in DTYPES:
        return None
    stored: dict[str, int] = {}
    for info in sizes.checkpoint.tensors.values():
        kind = info.encoding or info.dtype
        stored[kind] = stored.get(kind, 0) + info.nbytes
    most = max(stored, key=lambda kind: stored[kind], default=name)
    width = f"{DTYPES[name].bits // 8} bytes per parameter"
    if most == name:
        return f"{width}; the files hold {most} indeed"
    return f"{width}; the files mostly hold {most}, so loading as {name} casts"


def _vocabulary(value: Any, sizes: Sizes) -> str | None:
    if sizes.width is None:
        return None
    table = f"the embedding table has {format_count(value * sizes.width)} parameters"
    if sizes.checkpoint is None:
        return table
    rows = _embedding_rows(sizes.checkpoint, sizes.width)
    if rows is not None and rows != value:
        return f"{table}; but the files hold {rows:,} rows"
    return table


def _embedding_rows(checkpoint: Checkpoint, width: int) -> int | None:
    for name in ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "shared.weight", "token_embd.weight"):
        for info in checkpoint.tensors.values():
            if info.name.endswith(name) and len(info.shape) == 2 and info.shape[1] == width:
                return info.shape[0]
    return None


def _head_dim(value: Any, sizes: Sizes) -> str | None:
    if not sizes.width or not sizes.num_heads:
        return None
    implied = sizes.width // sizes.num_heads
    if implied == value:
        return "the same as hidden size over heads"
    return f"not hidden size over heads ({implied}): the heads together are {value * sizes.num_heads:,} wide"


def _experts(value: Any, sizes: Sizes) -> str | None:
    chosen = sizes.number("num_experts_per_tok")
    if chosen is None:
        return None
    text = f"{chosen} of {value} work on a token ({chosen / value:.1%})"
    width, inner = sizes.width, sizes.number("moe_intermediate_size", "intermediate_size")
    if width and inner:
        text += f"; one has {format_count(3 * width * inner)} parameters"
    return text


def _feed_forward(value: Any, sizes: Sizes) -> str | None:
    if not sizes.width:
        return None
    return f"{value / sizes.width:.2f} times the width of the residual stream"


def _context(value: Any, sizes: Sizes) -> str | None:
    per_token = kv_cache_bytes_per_token(sizes.config, DTYPES[sizes.dtype].bits)
    if per_token is None or not _generates(sizes) or sizes.window is not None:
        return None
    return f"filled to the end, the KV cache takes {format_bytes(per_token * value)}"


def _latent(value: Any, sizes: Sizes) -> str | None:
    return _cache_line(sizes)


def _rope(value: Any, sizes: Sizes) -> str | None:
    kind = value.get("rope_type", value.get("type", "default"))
    factor = value.get("factor")
    base = f"base {value['rope_theta']:,}" if "rope_theta" in value else ""
    if kind == "default" or factor is None:
        return ", ".join(text for text in (f"type {kind}", base) if text)
    original = value.get("original_max_position_embeddings") or sizes.number("original_max_position_embeddings")
    reach = f": {original:,} tokens become {int(original * factor):,}" if original else ""
    return ", ".join(text for text in (f"type {kind}", base, f"stretched {factor:g} times{reach}") if text)


def _patches(value: Any, sizes: Sizes) -> str | None:
    image, patch = sizes.number("image_size"), sizes.number("patch_size")
    if not image or not patch:
        return None
    side = image // patch
    return f"an image becomes {side} × {side} = {side * side:,} patches"


def _labels(value: Any, sizes: Sizes) -> str:
    return f"{len(value)} classes: {', '.join(str(label) for label in list(value.values())[:4])}" + (
        ", ..." if len(value) > 4 else ""
    )


def _remote(value: Any, sizes: Sizes) -> str:
    return (
        f"names {', '.join(str(code) for code in value.values())}; transformers' own class is used where there is one"
    )


def _quantised(value: Any, sizes: Sizes) -> str:
    return f"method {value.get('quant_method', 'unknown')}; Loadstone does not load these weights yet"


def _partial(value: Any, sizes: Sizes) -> str | None:
    return f"{int(value * sizes.head_dim)} of {sizes.head_dim} entries of a head are turned" if sizes.head_dim else None


_CONSEQUENCES: dict[str, Callable[[Any, Sizes], str | None]] = {
    "num_key_value_heads": _kv_heads,
    "num_kv_heads": _kv_heads,
    "num_attention_heads": _heads,
    "n_head": _heads,
    "num_heads": _heads,
    "head_dim": _head_dim,
    "sliding_window": _window,
    "use_sliding_window": _use_window,
    "layer_types": _layer_types,
    "tie_word_embeddings": _tied,
    "dtype": _dtype,
    "torch_dtype": _dtype,
    "vocab_size": _vocabulary,
    "num_experts": _experts,
    "num_local_experts": _experts,
    "n_routed_experts": _experts,
    "intermediate_size": _feed_forward,
    "d_ff": _feed_forward,
    "max_position_embeddings": _context,
    "n_positions": _context,
    "kv_lora_rank": _latent,
    "rope_scaling": _rope,
    "rope_parameters": _rope,
    "patch_size": _patches,
    "id2label": _labels,
    "auto_map": _remote,
    "quantization_config": _quantised,
    "partial_rotary_factor": _partial,
}

_NULL_CONSEQUENCES: dict[str, str] = {
    "sliding_window": "every layer attends to the whole context",
    "rope_scaling": "positions are used as they were trained",
    "head_dim": "hidden size over heads",
}
