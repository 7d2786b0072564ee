"""What follows from the fields about sizes, experts, tables, tokens and images, with the numbers of this very model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from loadstone.architecture.config_rules_attention import Rule
from loadstone.architecture.config_sizes import Sizes, language_config
from loadstone.dtypes import DTYPES
from loadstone.units import format_bytes, format_count

_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "shared.weight",
    "token_embd.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
    "token_embedding.weight",
)

# What the names of nonlinearities stand for.
# Source: https://github.com/huggingface/transformers/blob/main/src/transformers/activations.py (ACT2CLS)
_ACTIVATIONS = {
    "silu": "x · sigmoid(x), also called swish",
    "swish": "x · sigmoid(x), also called SiLU",
    "gelu": "x · Φ(x), exact",
    "gelu_new": "x · Φ(x), by its tanh approximation",
    "gelu_fast": "x · Φ(x), by its tanh approximation",
    "gelu_pytorch_tanh": "x · Φ(x), by its tanh approximation",
    "quick_gelu": "x · sigmoid(1.702 x)",
    "relu": "max(x, 0)",
    "relu2": "max(x, 0)²",
    "tanh": "between -1 and 1",
}


def _classes(value: Any, sizes: Sizes) -> str | None:
    if not isinstance(value, list) or not value:
        return None
    return f"{value[0]} is built" + (f"; the other {len(value) - 1} are not" if len(value) > 1 else "")


def _width(value: Any, sizes: Sizes) -> str:
    return f"a token's vector takes {format_bytes(value * sizes.dtype_bits / 8)} in {sizes.dtype}"


def _layers(value: Any, sizes: Sizes) -> str | None:
    if sizes.held is None or sizes.name not in {"", "text_config"}:
        return None
    stacks: dict[str, list[int]] = {}
    for block in sizes.held.blocks:
        if block.stack is not None:
            stacks.setdefault(block.stack, []).append(block.nbytes)
    if not stacks:
        return None
    largest = max(stacks.values(), key=sum)
    alike = [blocks for blocks in stacks.values() if len(blocks) == value]
    if alike:
        found = max(alike, key=sum)
        return f"the files hold {value} of them, {format_bytes(sum(found) / value)} each on average"
    extra = sizes.number("num_nextn_predict_layers") or 0
    if len(largest) == value + extra:
        return f"the files hold {value} of them and {extra} for predicting further tokens"
    return f"but the files hold {len(largest)}"


def _feed_forward(value: Any, sizes: Sizes) -> str | None:
    if not sizes.width:
        return None
    if sizes.number("moe_intermediate_size") and sizes.number("num_experts", "n_routed_experts"):
        dense = _dense_layers(sizes)
        if dense == 0:
            return "not used: every layer has experts, moe_intermediate_size wide"
        return f"used by the {dense} layers without experts" if dense else None
    return f"{value / sizes.width:.3g} times the width of the residual stream"


def _inner_width(value: Any, sizes: Sizes) -> str | None:
    return f"4 × {sizes.width:,} = {4 * sizes.width:,}" if sizes.width else None


def _tied(value: Any, sizes: Sizes) -> str | None:
    vocabulary, width = sizes.number("vocab_size"), sizes.width
    if not isinstance(value, bool) or not vocabulary or not width:
        return None
    nbytes = vocabulary * width * sizes.dtype_bits // 8
    table = f"{vocabulary:,} × {width:,} elements of {sizes.dtype}"
    if value:
        return f"one table instead of two saves {format_bytes(nbytes)} ({table})"
    return f"the output head is a table of its own, {format_bytes(nbytes)} ({table})"


def _dtype(value: Any, sizes: Sizes) -> str | None:
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        return None
    width = f"{DTYPES[name].bits // 8} bytes per parameter"
    if sizes.held is None or not sizes.held.nbytes_by_dtype:
        return width
    most = next(iter(sizes.held.nbytes_by_dtype))
    if most == name:
        others = [kind for kind in sizes.held.nbytes_by_dtype if kind != name]
        return f"{width}; the files hold {most} indeed" + (f", beside some {', '.join(others[:3])}" if others else "")
    if most in DTYPES and DTYPES[most].floating:
        return f"{width}; but the files mostly hold {most}, so loading as {name} casts"
    return f"{width} once decoded; the files mostly hold {most}"


def _vocabulary(value: Any, sizes: Sizes) -> str | None:
    if sizes.width is None:
        return None
    numel = value * sizes.width
    table = f"the embedding table has {format_count(numel)} parameters, {format_bytes(numel * sizes.dtype_bits / 8)}"
    if sizes.held is None:
        return table
    rows = _embedding_rows(sizes, sizes.width)
    return f"{table}; but the files hold {rows:,} rows" if rows not in {None, value} else table


def _embedding_rows(sizes: Sizes, width: int) -> int | None:
    found = {
        info.shape[0]
        for name, info in (sizes.held.tensors.items() if sizes.held is not None else ())
        if name.endswith(_EMBEDDINGS) and len(info.shape) == 2 and info.shape[1] == width
    }
    return found.pop() if len(found) == 1 else None


def _dense_layers(sizes: Sizes) -> int | None:
    """The layers of a mixture model that have no experts."""
    layers = sizes.num_layers
    if layers is None:
        return None
    step = sizes.number("decoder_sparse_step", "interleave_moe_layer_step") or 1
    first = sizes.number("first_k_dense_replace") or 0
    named = sizes.get("mlp_only_layers")
    dense = set(named) if isinstance(named, list) else set()
    return sum(index < first or index in dense or (index + 1) % step != 0 for index in range(layers))


def _expert_numel(sizes: Sizes) -> int | None:
    inner = sizes.number("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
    return 3 * sizes.width * inner if sizes.width and inner else None


def _num_experts(sizes: Sizes) -> int | None:
    return sizes.number("num_experts", "num_local_experts", "n_routed_experts")


def _experts(value: Any, sizes: Sizes) -> str | None:
    layers, dense, numel = sizes.num_layers, _dense_layers(sizes), _expert_numel(sizes)
    if layers is None or dense is None or numel is None:
        return None
    return (
        f"{layers - dense} layers × {value} experts × {format_count(numel)} parameters = "
        f"{format_count((layers - dense) * value * numel)}"
    )


def _chosen(value: Any, sizes: Sizes) -> str | None:
    total = _num_experts(sizes)
    if not total:
        return None
    text = f"{value} of {total} work on a token ({value / total:.1%})"
    layers, dense, numel = sizes.num_layers, _dense_layers(sizes), _expert_numel(sizes)
    if layers is None or dense is None or numel is None:
        return text
    idle = (layers - dense) * (total - value) * numel
    if sizes.held is None:
        return f"{text}: {format_count((layers - dense) * value * numel)} of their parameters"
    held = sum(info.numel for info in sizes.held.tensors.values())
    # Quantised files pack several parameters into an element; what they hold cannot be counted so.
    return f"{text}: {format_count(held - idle)} of {format_count(held)} parameters are active" if held > idle else text


def _expert_width(value: Any, sizes: Sizes) -> str | None:
    if not _num_experts(sizes) or not sizes.width:
        return None
    return f"an expert has 3 × {sizes.width:,} × {value:,} = {format_count(3 * sizes.width * value)} parameters"


def _shared_experts(value: Any, sizes: Sizes) -> str | None:
    numel = _expert_numel(sizes)
    return f"{format_count(value * numel)} parameters in each layer with experts" if numel else None


def _which_layers(value: Any, sizes: Sizes) -> str | None:
    dense = _dense_layers(sizes)
    if dense is None or sizes.num_layers is None:
        return None
    if dense == 0:
        return f"all {sizes.num_layers} layers have experts"
    return f"{dense} layers are dense, {sizes.num_layers - dense} have experts"


def _further_tokens(value: Any, sizes: Sizes) -> str | None:
    layers = sizes.num_layers
    return f"layers from number {layers} on in the files are such" if layers and value else None


def _activation(value: Any, sizes: Sizes) -> str | None:
    return _ACTIVATIONS.get(str(value))


def _gated(value: Any, sizes: Sizes) -> str | None:
    return f"{3 if value.startswith('gated-') else 2} matrices in each feed-forward layer"


def _token(value: Any, sizes: Sizes) -> str | None:
    ids = value if isinstance(value, list) else [value]
    vocabulary = sizes.number("vocab_size")
    beyond = [one for one in ids if vocabulary and isinstance(one, int) and one >= vocabulary]
    return f"beyond the vocabulary of {vocabulary:,}" if beyond else None


def _ends(value: Any, sizes: Sizes) -> str | None:
    generation = sizes.held.generation_config if sizes.held is not None else None
    stated = None if generation is None else generation.get("eos_token_id")
    if stated is not None and stated != value:
        return f"generation_config.json says {stated}, and that is what generate() uses"
    return f"any of these {len(value)} ends the text" if isinstance(value, list) else _token(value, sizes)


def _patches(value: Any, sizes: Sizes) -> str | None:
    image, patch = sizes.number("image_size"), sizes.number("patch_size")
    if not image or not patch:
        return None
    side = image // patch
    return f"an image becomes {side} × {side} = {side * side:,} patches"


def _channels(value: Any, sizes: Sizes) -> str | None:
    patch = sizes.number("patch_size", "spatial_patch_size")
    frames = sizes.number("temporal_patch_size") or 1
    return f"a patch is {value * frames * patch * patch:,} numbers" if patch else None


def _merged(value: Any, sizes: Sizes) -> str:
    return f"{value * value} patches make one token"


def _temperature(value: Any, sizes: Sizes) -> str:
    return f"e^{value:g} = {math.exp(value):.3g}"


def _labels(value: Any, sizes: Sizes) -> str:
    names = ", ".join(str(label)[:24] for label in list(value.values())[:4])
    return f"{len(value):,} classes: {names}" + (", ..." if len(value) > 4 else "")


def _label_count(value: Any, sizes: Sizes) -> str:
    return f"{len(value):,} classes"


def _tasks(value: Any, sizes: Sizes) -> str:
    return f"for {', '.join(map(str, value))}"


def _remote(value: Any, sizes: Sizes) -> str:
    codes = ", ".join(str(code) for code in value.values())
    return f"names {codes}; transformers' own class is used where there is one"


def _quantised(value: Any, sizes: Sizes) -> str:
    bits = f", {value['bits']} bits" if isinstance(value.get("bits"), int) else ""
    return f"method {value.get('quant_method', 'unknown')}{bits}; Loadstone does not load these weights yet"


def _nested(value: Any, sizes: Sizes) -> str | None:
    inner = Sizes(config=value, parent=sizes.config)
    if not isinstance(value, Mapping) or language_config(value) is not value:
        return None
    layers, width = inner.number("num_hidden_layers", "depth", "encoder_layers"), inner.width
    return f"{layers} blocks, {width:,} wide" if layers and width else None


CONTENTS_INTEGERS: dict[str, Rule] = {
    **dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id", "image_token_id"), _token),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim"), _width),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), _layers),
    **dict.fromkeys(("intermediate_size", "d_ff", "n_inner", "ffn_dim", "ffn_hidden_size"), _feed_forward),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim"), _feed_forward),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), _experts),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "experts_per_token"), _chosen),
    **dict.fromkeys(("decoder_sparse_step", "first_k_dense_replace"), _which_layers),
    **dict.fromkeys(("num_channels", "in_channels"), _channels),
    "vocab_size": _vocabulary,
    "moe_intermediate_size": _expert_width,
    "n_shared_experts": _shared_experts,
    "num_nextn_predict_layers": _further_tokens,
    "eos_token_id": _ends,
    "patch_size": _patches,
    "spatial_merge_size": _merged,
}

CONTENTS_REALS: dict[str, Rule] = {"logit_scale_init_value": _temperature}

CONTENTS_OTHERS: dict[str, Rule] = {
    **dict.fromkeys(("dtype", "torch_dtype"), _dtype),
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function", "dense_act_fn"), _activation),
    **dict.fromkeys(("text_config", "vision_config", "audio_config"), _nested),
    "architectures": _classes,
    "tie_word_embeddings": _tied,
    "mlp_only_layers": _which_layers,
    "feed_forward_proj": _gated,
    "eos_token_id": _ends,
    "id2label": _labels,
    "label2id": _label_count,
    "task_specific_params": _tasks,
    "auto_map": _remote,
    "quantization_config": _quantised,
}

CONTENTS_NULLS: dict[str, Rule] = {
    "n_inner": _inner_width,
    "pad_token_id": lambda value, sizes: "texts of one batch cannot be padded until one is chosen",
}
