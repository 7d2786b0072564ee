"""The sizes of a model from its config alone: layers, heads, windows, and the KV cache they imply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loadstone.architecture.blocks import Block
from loadstone.architecture.config_defaults import (
    ALTERNATION,
    DEFAULTS,
    ENCODER_ONLY,
    WINDOW_ON_REQUEST,
    Defaults,
)
from loadstone.checkpoint.values import TensorInfo
from loadstone.dtypes import DTYPES

# A config may say anything; no model has more layers, and tuples of this length are made.
_MAX_LAYERS = 10_000
_CACHE_DTYPE = "bfloat16"
_NONE = Defaults()

# Where multi-modal configs keep their language model.
LANGUAGE_CONFIGS = ("text_config", "llm_config", "language_config", "decoder")

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "depth")
_DECODER_LAYERS = ("num_decoder_layers", "decoder_layers", "num_layers", "num_hidden_layers")
_ENCODER_LAYERS = ("encoder_layers", "num_layers", "num_hidden_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_DECODER_HEADS = ("decoder_attention_heads", *_HEADS)
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")
_CONTEXTS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")
# The kinds of layer whose keys and values are kept; linear attention, convolutions and the like have a fixed state.
_CACHED = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What the files of the checkpoint hold.

    Attributes:
        tensors: by name.
        blocks: the same, grouped.
        nbytes_by_dtype: stored bytes by dtype or block encoding, the most first.
        generation_config: the parsed generation_config.json, if any.
    """

    tensors: Mapping[str, TensorInfo]
    blocks: tuple[Block, ...]
    nbytes_by_dtype: Mapping[str, int]
    generation_config: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """A config with what surrounds it; sizes are found under any of the names families give them.

    Attributes:
        config: the config, or one nested in it.
        parent: the config around a nested one.
        name: of the nested config, `vision_config`; empty for the outermost.
        held: what the files hold, where there are files.
    """

    config: Mapping[str, Any]
    parent: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    held: Held | None = None

    def get(self, name: str) -> Any:
        """A field of the config or, where it has none, of the language config inside."""
        value = self.config.get(name)
        if value is not None:
            return value
        inner = language_config(self.config)
        return None if inner is self.config else inner.get(name)

    def names_any(self, *names: str) -> bool:
        """Whether the config has one of these fields, null or not; then no default is filled in."""
        configs = (self.config, language_config(self.config))
        return any(name in config for config in configs for name in names)

    def number(self, *names: str) -> int | None:
        """The first of these fields that is a positive whole number."""
        for name in names:
            value = self.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return None

    @property
    def model_type(self) -> str:
        """The family; a nested config without one takes it from the config around it."""
        inner = language_config(self.config)
        own = inner.get("model_type") or (None if inner is self.config else f"{self.config.get('model_type')}_text")
        if own is None and self.name in LANGUAGE_CONFIGS:
            own = f"{self.parent.get('model_type')}_text"
        own = str(own or "")
        return own if own in DEFAULTS or f"{own}_text" not in DEFAULTS else f"{own}_text"

    @property
    def defaults(self) -> Defaults:
        """What the config class fills in."""
        return DEFAULTS.get(self.model_type, _NONE)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether there are two stacks of blocks."""
        return bool(self.get("is_encoder_decoder"))

    @property
    def num_layers(self) -> int | None:
        """Blocks of the stack that generates: the decoder's in encoder-decoder models."""
        found = self.number(*(_DECODER_LAYERS if self.is_encoder_decoder else _LAYERS)) or self.defaults.num_layers
        return found if found is not None and found <= _MAX_LAYERS else None

    @property
    def num_encoder_layers(self) -> int:
        """Blocks of the encoder in encoder-decoder models; 0 elsewhere."""
        return (self.number(*_ENCODER_LAYERS) or 0) if self.is_encoder_decoder else 0

    @property
    def num_heads(self) -> int | None:
        """Query heads."""
        return self.number(*(_DECODER_HEADS if self.is_encoder_decoder else _HEADS)) or self.defaults.num_heads

    @property
    def num_kv_heads(self) -> int | None:
        """Key and value heads."""
        if self.get("multi_query") and not self.get("new_decoder_architecture"):
            return 1
        names = ("num_key_value_heads", "num_kv_heads")
        default = None if self.names_any(*names) else self.defaults.num_kv_heads
        return self.number(*names) or default or self.num_heads

    @property
    def width(self) -> int | None:
        """The width of the residual stream."""
        return self.number(*_WIDTHS) or self.defaults.width

    @property
    def head_dim(self) -> int | None:
        """The width of a head."""
        own = self.number("head_dim", "d_kv")
        if own is None and not self.names_any("head_dim"):
            own = self.defaults.head_dim
        if own is None and self.width and self.num_heads:
            return self.width // self.num_heads
        return own

    @property
    def context(self) -> int | None:
        """The longest context that the positions are made for, in tokens."""
        return self.number(*_CONTEXTS)

    @property
    def window_is_on(self) -> bool:
        """Whether sliding_window is in force."""
        use = self.get("use_sliding_window")
        return self.model_type not in WINDOW_ON_REQUEST if use is None else bool(use)

    @property
    def window(self) -> int | None:
        """How many tokens back a windowed or chunked layer sees; None where none does."""
        names = ("sliding_window", "attention_chunk_size")
        if not self.window_is_on:
            return None
        return self.number(*names) if self.names_any(*names) else self.defaults.window

    @property
    def dtype(self) -> str:
        """The dtype that the config declares, or the one around it; bfloat16 where none does."""
        for config in (self.config, self.parent, language_config(self.config)):
            declared = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
            if declared in DTYPES:
                return declared
        return _CACHE_DTYPE

    @property
    def dtype_bits(self) -> int:
        """The width of an element of that dtype."""
        return DTYPES[self.dtype].bits

    @property
    def tied(self) -> bool | None:
        """Whether embedding and output head are one tensor; None where nobody says."""
        own = self.get("tie_word_embeddings")
        return own if isinstance(own, bool) else self.defaults.tied

    @property
    def latent(self) -> int | None:
        """The elements that multi-head latent attention caches for a token in a layer; None for other attention."""
        rank = self.number("kv_lora_rank")
        return None if rank is None else rank + (self.number("qk_rope_head_dim") or 0)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of attention of each layer, in transformers' words."""
        layers = self.num_layers or 0
        named = self.get("layer_types")
        if isinstance(named, list) and len(named) == layers:
            return tuple(map(str, named))
        other, period = ALTERNATION.get(self.model_type, ("sliding_attention", 0))
        names = ("sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval")
        period = self.number(*names) or period
        if period and (self.window or other == "linear_attention"):
            return tuple("full_attention" if (index + 1) % period == 0 else other for index in range(layers))
        first = self.number("max_window_layers") or 0 if self.model_type in WINDOW_ON_REQUEST else 0
        return tuple(
            "sliding_attention" if self.window and index >= first else "full_attention" for index in range(layers)
        )

    @property
    def cached_kinds(self) -> tuple[str, ...]:
        """The kinds of the layers that keep keys and values of their own."""
        if self.model_type in ENCODER_ONLY and not self.config.get("is_decoder"):
            return ()
        kinds = self.kinds
        shared = self.number("num_kv_shared_layers") or 0
        return tuple(kind for kind in kinds[: len(kinds) - shared] if kind in _CACHED)


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model: the one nested in a multi-modal config, else the config itself."""
    for name in LANGUAGE_CONFIGS:
        inner = config.get(name)
        if isinstance(inner, Mapping):
            return inner
    return config


def num_blocks(config: Mapping[str, Any]) -> int | None:
    """How many numbered blocks the language model has, encoder and decoder together.

    Args:
        config: the parsed config.json.

    Returns:
        The count, or None where the config does not say.
    """
    sizes = Sizes(config=config)
    return None if sizes.num_layers is None else sizes.num_layers + sizes.num_encoder_layers


def kv_cache_bytes_per_token(config: Mapping[str, Any], dtype_bits: int = 16) -> int | None:
    """What each token of context adds to the KV cache, over all layers, while no window cuts it off.

    Args:
        config: the parsed config.json, or a nested one.
        dtype_bits: the width of a cached element.

    Returns:
        Bytes; 0 for models that keep no cache; None where the config does not say enough.
    """
    return cache_bytes(Sizes(config=config), 1, dtype_bits)


def kv_cache_bytes(config: Mapping[str, Any], num_tokens: int, dtype_bits: int = 16) -> int | None:
    """The KV cache of one sequence, over all layers; windowed layers stop growing at their window.

    Args:
        config: the parsed config.json, or a nested one.
        num_tokens: the length of the sequence.
        dtype_bits: the width of a cached element.

    Returns:
        Bytes, of self-attention only: what a decoder keeps of its encoder's output is not counted. None where the
        config does not say enough.
    """
    return cache_bytes(Sizes(config=config), num_tokens, dtype_bits)


def cache_bytes(sizes: Sizes, num_tokens: int, dtype_bits: int | None = None) -> int | None:
    """The same as `kv_cache_bytes`, of sizes that know what surrounds them; in their own dtype by default."""
    bits = dtype_bits or sizes.dtype_bits
    kinds, window = sizes.cached_kinds, sizes.window or num_tokens
    if sizes.num_layers is None:
        return None
    positions = sum(num_tokens if kind == "full_attention" else min(num_tokens, window) for kind in kinds)
    if sizes.latent is not None:
        return positions * sizes.latent * bits // 8
    if sizes.num_kv_heads is None or sizes.head_dim is None:
        return None
    return 2 * positions * sizes.num_kv_heads * sizes.head_dim * bits // 8
