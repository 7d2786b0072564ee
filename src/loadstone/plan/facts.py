"""The numbers of a config that memory and time depend on, under whatever names its family gives them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loadstone.architecture.config import Sizes
from loadstone.plan.layer_caches import LayerCache, layer_caches

# Where the config of the language model stands in those of larger models, in the order transformers looks.
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "decoder", "generator", "text_encoder")

# Classes that see the whole input at once and keep no cache between passes.
_ENCODERS = re.compile(
    r"albert|bert|big_bird|camembert|canine|convbert|data2vec-(audio|text|vision)|deberta(-v2)?|distilbert|electra|ernie"
    r"|esm|eurobert|flaubert|fnet|ibert|layoutlm|layoutlmv3|longformer|luke|mobilebert|modernbert|mpnet|nomic_bert"
    r"|megatron-bert|nystromformer|rembert|roberta(-prelayernorm)?|roc_bert|roformer|splinter|squeezebert"
    r"|xlm-roberta(-xl)?|xmod|yoso"
    r"|clip(_\w+)?|siglip2?(_\w+)?|convnext|deit|dinov2|dinov3_\w+|resnet|swin|vit"
    r"|hubert|unispeech|wav2vec2(-conformer)?|wavlm"
)
# Blocks of the inner width that are alive at a time: gate, up and their product. There are more where transformers
# writes an activation function out in steps; below, model types that mean such a function if their config names none.
# Source: https://github.com/huggingface/transformers/blob/main/src/transformers/activations.py
GATED_BLOCKS, _STEPWISE_BLOCKS = 3, 4
_STEPS = {
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh", "gated-gelu"), _STEPWISE_BLOCKS),
    "xielu": 6,
}
_STEPWISE = re.compile(
    r"albert|big_bird|bigbird_pegasus|codegen|fnet|funnel|gpt-sw3|gpt2|gpt_neo|gptj|kosmos_2_5_vision_model|mt5"
    r"|nystromformer|openai-gpt|phi|pix2struct_(text|vision)_model|umt5|vivit"
)
_HEADED = ("CausalLM", "LMHead", "ConditionalGeneration", "MaskedLM", "PreTraining", "Seq2Seq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a plan needs of a config. Zero stands for what it does not say.

    Attributes:
        width: of the residual stream.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        key_dim: the width of a key head.
        value_dim: the width of a value head.
        inner: the width of the widest dense feed-forward layer.
        inner_blocks: of that width, alive at a time: gate, up and their product, or what an activation function makes.
        expert_inner: the width of one expert.
        num_experts: that the router chooses from.
        num_chosen: experts for each token, shared ones included.
        vocab: rows of the head.
        max_source: the most tokens or frames of an encoder's input that has a fixed length.
        layers: what each layer keeps between passes.
        cross_numel: elements of the keys and values that each decoder layer keeps of one token of the encoder.
        latent_dim: the width of the compressed keys and values that are expanded in each pass; 0 if they are not.
        window: the narrowest window of attention in force; 0 if there is none.
        num_encoder_layers: of the encoder beside the decoder.
        ties_head: the config says that table and head are one.
        needs_head: the class has a head over the vocabulary.
        caches: whether something is kept between passes.
    """

    width: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    inner: int = 0
    inner_blocks: int = GATED_BLOCKS
    expert_inner: int = 0
    num_experts: int = 0
    num_chosen: int = 0
    vocab: int = 0
    max_source: int = 0
    layers: tuple[LayerCache, ...] = ()
    cross_numel: int = 0
    latent_dim: int = 0
    window: int = 0
    num_encoder_layers: int = 0
    ties_head: bool = False
    needs_head: bool = False
    caches: bool = False

    def expert_share(self, num_found: int | None) -> float:
        """The chosen part of the experts; `num_found` is how many the files hold in a layer, where that is known."""
        total = num_found or self.num_experts
        return min(1.0, self.num_chosen / total) if total and self.num_chosen else 1.0


def facts_of(config: Mapping[str, Any] | None) -> Facts:
    """Read a config.

    Args:
        config: the parsed config.json, or None where there is none.

    Returns:
        Its numbers; those of the language model where it is one part of several.
    """
    if config is None:
        return Facts()
    text = language_config(config)
    sizes = Sizes(config=text)
    is_decoder = not _is_encoder(config, text)
    key_dim, value_dim = _head_dims(sizes)
    layers = layer_caches(text) if is_decoder else ()
    seq2seq = bool(config.get("is_encoder_decoder"))
    return Facts(
        width=sizes.width or 0,
        num_heads=sizes.num_heads or 0,
        num_kv_heads=sizes.num_kv_heads or 0,
        key_dim=key_dim,
        value_dim=value_dim,
        inner=_inner(sizes),
        inner_blocks=_inner_blocks(text),
        expert_inner=sizes.number("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size") or 0,
        num_experts=_num_experts(sizes),
        num_chosen=_num_chosen(sizes),
        vocab=sizes.number("vocab_size") or 0,
        max_source=sizes.number("max_source_positions") or 0,
        layers=layers,
        cross_numel=(sizes.num_heads or 0) * (key_dim + value_dim) if seq2seq and layers else 0,
        latent_dim=sizes.number("kv_lora_rank") or 0,
        window=min((layer.window for layer in layers if layer.window), default=0),
        num_encoder_layers=(sizes.number("encoder_layers", "num_layers", "num_hidden_layers") or 0) if seq2seq else 0,
        ties_head=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        needs_head=any(word in name for name in _class_names(config) for word in _HEADED),
        caches=bool(layers),
    )


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model; the config itself where it has no parts."""
    for name in _NESTED:
        nested = config.get(name)
        if isinstance(nested, Mapping):
            return language_config(nested)
    return config


def _is_encoder(config: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    if text.get("is_decoder") or config.get("is_encoder_decoder"):
        return False
    names = _class_names(config)
    return _ENCODERS.fullmatch(str(text.get("model_type"))) is not None or any("MaskedLM" in name for name in names)


def _class_names(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [str(name) for name in names] if isinstance(names, list) else []


def _head_dims(sizes: Sizes) -> tuple[int, int]:
    """The widths of a key head and of a value head."""
    if sizes.number("kv_lora_rank"):
        nope = sizes.number("qk_nope_head_dim") or 0
        return nope + (sizes.number("qk_rope_head_dim") or 0), sizes.number("v_head_dim") or nope
    return sizes.head_dim or 0, sizes.head_dim or 0


def _inner(sizes: Sizes) -> int:
    inner = sizes.number("intermediate_size", "d_ff", "ffn_dim", "n_inner", "decoder_ffn_dim", "ffn_hidden_size")
    return inner or 4 * (sizes.width or 0)  # GPT-2's n_inner is null for four times the width


def _inner_blocks(text: Mapping[str, Any]) -> int:
    fields = ("hidden_act", "hidden_activation", "activation_function", "dense_act_fn", "feed_forward_proj")
    named = [text[name] for name in fields if isinstance(text.get(name), str)]
    if not named and _STEPWISE.fullmatch(str(text.get("model_type"))):
        return _STEPWISE_BLOCKS
    return max((_STEPS.get(name, GATED_BLOCKS) for name in named), default=GATED_BLOCKS)


def _num_experts(sizes: Sizes) -> int:
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
    return sizes.number(*names) or 0


def _num_chosen(sizes: Sizes) -> int:
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k_experts", "moe_k")
    return sizes.number(*names) or 0
