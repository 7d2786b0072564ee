"""Meta's own layout of Llama, which Mistral shares: params.json -> a config, and where each tensor belongs.

Source: https://github.com/meta-llama/llama-models/blob/main/models/llama3/args.py (params.json)
        https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py (what ranks share, and how)
        https://github.com/mistralai/mistral-inference/blob/main/src/mistral_inference/args.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from loadstone.architecture.gguf_layouts import UnpermuteHeads
from loadstone.architecture.keymap import Assignment, KeyMap, Part, list_names
from loadstone.checkpoint.meta_ranks import name_and_rank
from loadstone.checkpoint.values import Checkpoint, TensorInfo
from loadstone.errors import CheckpointMismatch, InvalidConfig, MissingShard, UnsupportedFormat

# What is understood. Widths are those of the tensors: multiple_of and ffn_dim_multiplier only say how they came about.
_WIDTHS = {"dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "norm_eps"}
_ROTARY = {"rope_theta", "use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor", "sliding_window"}
_LIMITS = {"max_seq_len", "max_position_embeddings", "max_batch_size", "multiple_of", "ffn_dim_multiplier"}
_KNOWN = _WIDTHS | _ROTARY | _LIMITS
_NEEDED = {"dim", "n_layers", "n_heads"}
_MAX_SETTING = 1 << 31
_FRACTIONS = {"norm_eps", "rope_theta", "rope_scaling_factor", "rope_high_freq_factor", "ffn_dim_multiplier"}

# Llama 3.1 to 3.3 stretch the rotary positions of Llama 3; params.json does not say by how much, but the small models
# of 3.2 do it four times as much as the others.
# Source: https://huggingface.co/meta-llama/Llama-3.1-8B and Llama-3.2-1B (config.json, rope_scaling)
_SCALED_CONTEXT, _ORIGINAL_CONTEXT = 131072, 8192
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR = 1.0, 4.0
_SMALL_WIDTH, _SMALL_FACTOR, _FACTOR = 4096, 32.0, 8.0

# Token ids are in the tokenizer only: <|begin_of_text|>, and <|end_of_text|>, <|eom_id|>, <|eot_id|> from Llama 3 on.
_LLAMA3_VOCAB = 128000
_LLAMA3_TOKENS: dict[str, Any] = {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]}
_OLD_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """Where a tensor goes.

    Attributes:
        name: of the parameter.
        shape: of the parameter, each side by its name in `_sides`.
        dim: the dimension along which ranks share it; None where the shapes must tell.
        heads: the config field with the number of heads whose rows are permuted, if they are.
    """

    name: str
    shape: tuple[str, ...]
    dim: int | None = 0
    heads: str | None = None


_TOP = {
    # Llama 1 and 2 share the width of the embedding among the ranks, Llama 3 the vocabulary.
    "tok_embeddings.weight": _Rule(name="model.embed_tokens.weight", shape=("tokens", "width"), dim=None),
    "norm.weight": _Rule(name="model.norm.weight", shape=("width",)),
    "output.weight": _Rule(name="lm_head.weight", shape=("tokens", "width")),
}
_LAYER = {
    "attention_norm.weight": _Rule(name="input_layernorm.weight", shape=("width",)),
    "ffn_norm.weight": _Rule(name="post_attention_layernorm.weight", shape=("width",)),
    "attention.wq.weight": _Rule(
        name="self_attn.q_proj.weight", shape=("queries", "width"), heads="num_attention_heads"
    ),
    "attention.wk.weight": _Rule(name="self_attn.k_proj.weight", shape=("keys", "width"), heads="num_key_value_heads"),
    "attention.wv.weight": _Rule(name="self_attn.v_proj.weight", shape=("keys", "width")),
    "attention.wo.weight": _Rule(name="self_attn.o_proj.weight", shape=("width", "queries"), dim=1),
    "feed_forward.w1.weight": _Rule(name="mlp.gate_proj.weight", shape=("inner", "width")),
    "feed_forward.w2.weight": _Rule(name="mlp.down_proj.weight", shape=("width", "inner"), dim=1),
    "feed_forward.w3.weight": _Rule(name="mlp.up_proj.weight", shape=("inner", "width")),
}
# Computed from the config.
_LEFT_OUT = "rope.freqs"


def config_from_params(checkpoint: Checkpoint) -> dict[str, Any]:
    """Say what params.json says in the words of config.json.

    Args:
        checkpoint: one with `params`.

    Returns:
        A new dict with `model_type`, `architectures` and every size.

    Raises:
        InvalidConfig: a size is missing or is none.
        UnsupportedFormat: params.json has settings that this layout does not have: experts, images, quantisation.
    """
    where = f"{checkpoint.root / 'params.json'}"
    params = checkpoint.params or {}
    nested = params.get("model")
    params = nested if isinstance(nested, Mapping) else params
    _check(params, where)
    dim, heads = params["dim"], params["n_heads"]
    is_mistral = "hidden_dim" in params
    rows = _rows(checkpoint, dim)
    config: dict[str, Any] = {
        "model_type": "mistral" if is_mistral else "llama",
        "architectures": ["MistralForCausalLM" if is_mistral else "LlamaForCausalLM"],
        "hidden_size": dim,
        "intermediate_size": params.get("hidden_dim") or _found(rows, "layers.0.feed_forward.w1.weight", where),
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": params.get("n_kv_heads") or heads,
        "head_dim": params.get("head_dim") or dim // heads,
        "rms_norm_eps": params.get("norm_eps") or 1e-5,
        "tie_word_embeddings": "output.weight" not in rows,
    }
    # Llama 1 and 2 write -1.
    vocab_size = params.get("vocab_size") or -1
    head = "tok_embeddings.weight" if config["tie_word_embeddings"] else "output.weight"
    config["vocab_size"] = vocab_size if vocab_size > 0 else _found(rows, head, where)
    if is_mistral:
        window = params.get("sliding_window")
        config["sliding_window"] = int(window) if window else None
    config["rope_parameters"] = _rope(params)
    config["max_position_embeddings"] = _context(params, is_mistral)
    return config | (_LLAMA3_TOKENS if config["vocab_size"] >= _LLAMA3_VOCAB else _OLD_TOKENS)


def _check(params: Mapping[str, Any], where: str) -> None:
    """Check that every setting is known, and that each is what it should be."""
    foreign = [key for key, value in params.items() if key not in _KNOWN and value not in (None, False)]
    if isinstance(params.get("sliding_window"), list):
        foreign.append("sliding_window for each layer")
    if foreign:
        raise UnsupportedFormat(
            f"{where}: expected the settings of Llama 1 to 3 or of Mistral 7B, found {foreign[0]} too, which changes "
            "what the model computes; use the checkpoint in the layout of Hugging Face."
        )
    for key in sorted(_KNOWN):
        value = params.get(key)
        if (key in _NEEDED or value not in (None, False)) and not _is_valid(key, value):
            raise InvalidConfig(f"{where}: expected a positive number as {key}, found {value!r}; download it again.")


def _is_valid(key: str, value: Any) -> bool:
    if key == "use_scaled_rope":
        return isinstance(value, bool)
    if key == "vocab_size" and value == -1:
        return True
    if key == "sliding_window" and isinstance(value, str):  # some releases write it as text
        return value.isdecimal() and len(value) < 10
    return type(value) in ((int, float) if key in _FRACTIONS else (int,)) and 0 < value < _MAX_SETTING


def _rows(checkpoint: Checkpoint, width: int) -> dict[str, int]:
    """The rows of each matrix that has so many columns, in whichever direction ranks share it."""
    numels: dict[str, int] = {}
    for name, info in checkpoint.tensors.items():
        whole, _ = name_and_rank(name)
        numels[whole] = numels.get(whole, 0) + info.numel
    return {name: numel // width for name, numel in numels.items()}


def _found(rows: Mapping[str, int], name: str, where: str) -> int:
    if name not in rows:
        raise InvalidConfig(f"{where}: expected a tensor {name} beside it, found none; it belongs to other weights.")
    return rows[name]


def _rope(params: Mapping[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": params.get("rope_theta") or 10000.0}
    if params.get("use_scaled_rope"):
        usual = _SMALL_FACTOR if params["dim"] < _SMALL_WIDTH else _FACTOR
        rope |= {
            "rope_type": "llama3",
            "factor": params.get("rope_scaling_factor") or usual,
            "low_freq_factor": _LOW_FREQ_FACTOR,
            "high_freq_factor": params.get("rope_high_freq_factor") or _HIGH_FREQ_FACTOR,
            "original_max_position_embeddings": _ORIGINAL_CONTEXT,
        }
    return rope


def _context(params: Mapping[str, Any], is_mistral: bool) -> int:
    """How many tokens the model was made for; what is not said is that of the releases with these settings."""
    said = params.get("max_position_embeddings") or params.get("max_seq_len")
    if said:
        return int(said)
    if is_mistral:
        return 32768
    if params.get("use_scaled_rope"):
        return _SCALED_CONTEXT
    theta = params.get("rope_theta") or 10000.0
    return 4096 if theta <= 10000 else 8192 if theta == 500000 else 16384


def map_whole_model(checkpoint: Checkpoint) -> KeyMap:
    """The key map of the model that params.json describes, for whoever has no module.

    Args:
        checkpoint: one with `params`.

    Raises:
        ConfigError: params.json makes no config.
        MissingShard: the slices of a tensor are too few to make a whole.
        CheckpointMismatch: they do not make one, have no place, or leave one empty.
    """
    config = config_from_params(checkpoint)
    # More layers than tensors cannot all be there: what a file promises must not decide how much is listed.
    shapes = _shapes(config, min(config["num_hidden_layers"], len(checkpoint.tensors)))
    keymap = map_meta_keys(replace(checkpoint, config=config), shapes)
    if keymap.unexpected:
        raise CheckpointMismatch(
            f"{checkpoint.root}: expected only tensors of the model that params.json describes, found others, which "
            f"belong nowhere: {list_names(keymap.unexpected)}; use the params.json that belongs to them.",
            unexpected=keymap.unexpected,
        )
    filled = {entry.target for entry in keymap.assignments}
    if missing := tuple(name for name in shapes if name not in filled):
        raise CheckpointMismatch(
            f"{checkpoint.root}: expected all tensors of the model that params.json describes, found none for "
            f"{list_names(missing)}; this layout is read as a whole: pass all of its files and tensors.",
            missing=missing,
        )
    return keymap


def _shapes(config: Mapping[str, Any], num_layers: int) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a model of so many layers, by name."""
    sides = {
        "tokens": config["vocab_size"],
        "width": config["hidden_size"],
        "inner": config["intermediate_size"],
        "queries": config["num_attention_heads"] * config["head_dim"],
        "keys": config["num_key_value_heads"] * config["head_dim"],
    }
    names = [name for name in _TOP if name != "output.weight" or not config["tie_word_embeddings"]]
    names += [f"layers.{layer}.{name}" for layer in range(num_layers) for name in _LAYER]
    rules = [rule for name in names if (rule := _rule(name))]
    return {rule.name: tuple(sides[side] for side in rule.shape) for rule in rules}


def map_meta_keys(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> KeyMap:
    """Find the place of each tensor, and of each rank's slice in it.

    Args:
        checkpoint: one with `params` and `config`.
        shapes: the shape of each of the module's places, by name.

    Raises:
        MissingShard: the slices are too few to make a whole.
        CheckpointMismatch: they do not make one.
    """
    groups: dict[str, list[TensorInfo]] = {}
    for name in checkpoint.tensors:
        groups.setdefault(name_and_rank(name)[0], []).append(checkpoint.tensors[name])
    assignments: list[Assignment] = []
    unexpected: list[str] = []
    left_out: list[str] = []
    for whole, infos in groups.items():
        rule = _rule(whole)
        if whole == _LEFT_OUT:
            left_out.append(whole)
        elif rule is None or rule.name not in shapes:
            unexpected.extend(info.name for info in infos)
        else:
            infos.sort(key=lambda info: name_and_rank(info.name)[1])
            parts = _parts(infos, rule, shapes[rule.name], checkpoint)
            assignments.append(Assignment(target=rule.name, parts=parts))
    notes = tuple(f"{name} is computed from the config instead" for name in left_out)
    return KeyMap(assignments=tuple(assignments), unexpected=tuple(unexpected), notes=notes)


def _rule(name: str) -> _Rule | None:
    if name in _TOP:
        return _TOP[name]
    prefix, _, rest = name.partition(".")
    number, _, leaf = rest.partition(".")
    if prefix != "layers" or leaf not in _LAYER:
        return None
    rule = _LAYER[leaf]
    return replace(rule, name=f"model.layers.{number}.{rule.name}")


def _parts(
    infos: Sequence[TensorInfo], rule: _Rule, shape: tuple[int, ...], checkpoint: Checkpoint
) -> tuple[Part, ...]:
    dim = rule.dim
    if dim is None:
        dim = 0 if infos[0].shape[-1:] == shape[-1:] else 1
    _check_whole(infos, rule.name, shape, dim)
    parts, begin = [], 0
    for info in infos:
        width = info.shape[dim]
        index = (slice(None), slice(begin, begin + width)) if dim == 1 and len(infos) > 1 else None
        parts.append(
            Part(
                source=info.name,
                start=begin * prod(info.shape[1:]) if index is None else 0,
                shape=info.shape,
                index=index,
                layout=_layout(info, rule, shape, checkpoint) if rule.heads else None,
            )
        )
        begin += width
    return tuple(parts)


def _layout(info: TensorInfo, rule: _Rule, shape: tuple[int, ...], checkpoint: Checkpoint) -> UnpermuteHeads:
    """The rows of the heads that this slice holds, which are whole ones."""
    config = checkpoint.config or {}
    heads = config.get(rule.heads or "") or config.get("num_attention_heads")
    rows = info.shape[0]
    if not isinstance(heads, int) or heads * rows % shape[0] or rows % (2 * max(1, heads * rows // shape[0])):
        raise _mismatch([info], rule.name, shape)
    return UnpermuteHeads(num_heads=heads * rows // shape[0])


def _check_whole(infos: Sequence[TensorInfo], target: str, shape: tuple[int, ...], dim: int) -> None:
    """Compare the slices together with the place they fill."""
    first = infos[0]
    alike = all(
        len(info.shape) == len(shape) and info.shape[:dim] + info.shape[dim + 1 :] == shape[:dim] + shape[dim + 1 :]
        for info in infos
    )
    total = sum(info.shape[dim] for info in infos) if alike else 0
    if total == shape[dim]:
        return
    if total and first.shape[dim] and total < shape[dim] and shape[dim] % first.shape[dim] == 0:
        count = shape[dim] // first.shape[dim]
        raise MissingShard(
            f"{first.file.parent}: expected {count} files, consolidated.00.pth to consolidated.{count - 1:02d}.pth, as "
            f"the shape of {name_and_rank(first.name)[0]} says, found {len(infos)}; download the others, or pass "
            "all of them."
        )
    raise _mismatch(infos, target, shape)


def _mismatch(infos: Sequence[TensorInfo], target: str, shape: tuple[int, ...]) -> CheckpointMismatch:
    found = " + ".join(str(list(info.shape)) for info in infos)
    fault = f"{target} (expected {list(shape)}, found {found} in {infos[0].name})"
    return CheckpointMismatch(
        f"{infos[0].file.parent}: expected tensors that make whole heads and matrices, found others for the parameter "
        f"{fault}; use the params.json that belongs to them.",
        mismatched=(fault,),
    )
