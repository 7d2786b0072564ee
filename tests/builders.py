"""Tiny checkpoints of every kind of model that transformers can build: a config shrinker and a writer.

The shrinker works by field names, which mean the same in most of transformers' 400 config classes; what a family does
differently stands in `EXCEPTIONS`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import load_file
from torch import nn

Format = Literal["safetensors", "sharded safetensors", "bin", "sharded bin"]

VOCAB = 160
SEED = 0


# The tiny value of a field, wherever it occurs. Widths are multiples of 16 and heads divide them.
def _each(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


TINY: dict[str, Any] = {
    # widths
    **_each(
        "hidden_size d_model n_embd dim embed_dim hidden_dim embedding_size decoder_hidden_size encoder_hidden_size "
        "d_embed model_dim text_hidden_size hidden_size_per_layer_input attention_hidden_size lru_width width "
        "vision_hidden_size dim_model decoder_input_dim conv_dim_in proj_dim",
        64,
    ),
    **_each(
        "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size mlp_dim "
        "shared_expert_intermediate_size dense_intermediate_size moe_shared_expert_intermediate_size "
        "moe_ffn_hidden_size expert_ffn_hidden_size shared_intermediate_size block_ff_dim "
        "intermediate_size_mlp feed_forward_size dim_feedforward mamba_intermediate_size "
        "shared_expert_ffn_size ffn_intermediate_size hidden_size_mlp",
        96,
    ),
    **_each("moe_intermediate_size expert_hidden_size", 32),
    **_each("projection_dim pooler_output_size output_dim classifier_proj_size proj_size text_embed_dim", 32),
    # depth
    **_each(
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
        "num_encoder_layers depth num_blocks num_conv_layers speech_decoder_layers text_decoder_layers "
        "text_encoder_layers speech_encoder_layers adapter_layers max_window_layers "
        "t2u_encoder_layers t2u_decoder_layers num_coarse_layers",
        2,
    ),
    # heads
    **_each(
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
        "num_decoder_attention_heads attention_heads heads num_query_heads",
        4,
    ),
    **_each("num_key_value_heads num_kv_heads n_head_kv multi_query_group_num swa_num_key_value_heads", 2),
    **_each("head_dim d_kv attention_head_dim attention_head_size kv_channels", 16),
    "global_head_dim": 16,
    **_each("rotary_dim indexer_head_dim index_head_dim", 8),
    **_each("linear_head_dim", 16),
    **_each("linear_num_heads layer_group_size num_expert_group", 2),
    "num_global_key_value_heads": 2,
    # vocabulary and positions
    **_each("vocab_size text_vocab_size input_vocab_size output_vocab_size decoder_vocab_size", VOCAB),
    **_each(
        "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length max_target_positions seq_length "
        "max_source_positions max_text_len context_length",
        64,
    ),
    **_each("sliding_window attention_window_size window_size attention_chunk_size", 8),
    # experts
    **_each("num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts ffn_num_experts", 4),
    **_each("num_experts_per_tok num_experts_per_token moe_top_k moe_topk top_k_experts moe_k experts_per_token", 2),
    **_each("n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts", 1),
    "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    # state spaces
    **_each("state_size mamba_d_state ssm_state_size mamba_state_size d_state", 8),
    **_each("conv_kernel mamba_d_conv conv_kernel_size", 4),
    "time_step_rank": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    # vision and audio
    "image_size": 32,
    "patch_size": 8,
    "num_mel_bins": 16,
    "type_vocab_size": 2,
}

# What a family does differently. A value replaces the rule, DROP leaves the field at its default.
DROP = object()
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"num_hidden_layers": 2},
    "cohere_compass_text": {"layer_types": DROP, "num_hidden_layers": 4},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0, "num_hidden_layers": 2, "layer_types": DROP},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "attention_layers": DROP},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 8]},
    "xlstm": {"num_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": DROP, "num_hidden_layers": 6, "attention_head_dim": 32, "num_key_value_heads": 4},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "mamba_headdim": 16,
        "hybrid_layer_ids": [1, 3],
    },
    "zaya": {"num_experts_per_tok": 1},
}

# Token ids and the like must lie inside the tiny vocabulary.
_ID_SUFFIXES = ("_token_id", "_token_index", "_token_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A way to use models: which of transformers' mappings lists them."""

    name: str
    auto_class: str


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(name="causal", auto_class="AutoModelForCausalLM"),
        Kind(name="seq2seq", auto_class="AutoModelForSeq2SeqLM"),
        Kind(name="encoder", auto_class="AutoModelForMaskedLM"),
        Kind(name="image", auto_class="AutoModelForImageClassification"),
        Kind(name="ctc", auto_class="AutoModelForCTC"),
        Kind(name="speech", auto_class="AutoModelForSpeechSeq2Seq"),
        Kind(name="image-text", auto_class="AutoModelForImageTextToText"),
        Kind(name="contrastive", auto_class="AutoModelForZeroShotImageClassification"),
    )
}


def model_types(kind: str) -> list[str]:
    """The model types that transformers lists for a kind."""
    mapping = getattr(transformers, KINDS[kind].auto_class)._model_mapping
    return sorted(set(mapping._model_mapping) & set(mapping._config_mapping))


def tiny_config(model_type: str) -> Any:
    """A config of that type with tiny sizes."""
    config_class = transformers.CONFIG_MAPPING[model_type]
    return _shrunk(config_class, EXCEPTIONS.get(model_type, {}))


def _shrunk(config_class: Any, exceptions: dict[str, Any]) -> Any:
    changes: dict[str, Any] = {}
    default = config_class()
    fields = default.to_dict()
    changes.update(_layer_kinds(fields))
    # In latent attention the head width that rotary positions see is the rotary part's.
    if "qk_rope_head_dim" in fields:
        changes |= {"head_dim": TINY["qk_rope_head_dim"]} if "head_dim" in fields else {}
        changes |= {"num_key_value_heads": TINY["num_attention_heads"]} if "num_key_value_heads" in fields else {}
    for name, value in fields.items():
        if name in exceptions or name in changes:
            continue
        if name in (getattr(config_class, "sub_configs", None) or {}) and value is not None:
            sub = getattr(default, name)
            nested = exceptions.get(f"{name}.", {})
            changes[name] = _shrunk(type(sub), {**EXCEPTIONS.get(sub.model_type, {}), **nested}).to_dict()
        elif name in TINY and isinstance(value, int) and not isinstance(value, bool):
            changes[name] = TINY[name]
        elif name.endswith(_ID_SUFFIXES):
            changes[name] = _inside(value, name)
    changes.update({name: value for name, value in exceptions.items() if value is not DROP and not name.endswith(".")})
    return config_class(**changes)


def _layer_kinds(fields: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind that the default config has, so that no kind goes untested."""
    changes: dict[str, Any] = {}
    for name in ("layer_types", "mlp_layer_types"):
        kinds = list(dict.fromkeys(fields.get(name) or ()))
        if len(kinds) > 1:
            changes[name] = kinds
    count = max((len(kinds) for kinds in changes.values()), default=0)
    for name, kinds in changes.items():
        changes[name] = kinds + kinds[-1:] * (count - len(kinds))
    return {**changes, "num_hidden_layers": count} if count else {}


def _inside(value: Any, name: str) -> Any:
    """A token id that fits: small ids stay, large ones get a place of their own near the end of the vocabulary."""
    if isinstance(value, int) and value >= VOCAB - 32:
        return VOCAB - 32 + sum(map(ord, name)) % 32
    if isinstance(value, list):
        return [_inside(one, f"{name}{index}") for index, one in enumerate(value)]
    return value


def tiny_model(model_type: str, kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with seeded random weights in which no two tensors are alike, in eval mode."""
    torch.manual_seed(SEED)
    auto_class = getattr(transformers, KINDS[kind].auto_class)
    model: nn.Module = auto_class.from_config(tiny_config(model_type))
    stir(model)
    return model.to(dtype).eval()


def stir(model: nn.Module) -> None:
    """Change every parameter a little, so that swapped or left-out tensors change the outputs."""
    generator = torch.Generator().manual_seed(SEED + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.dtype), alpha=0.02)


def write_checkpoint(model: Any, folder: Path, file_format: Format = "safetensors") -> Path:
    """Write a model as the hub has it.

    Args:
        model: a transformers model.
        folder: where; created when missing.
        file_format: transformers writes safetensors; the others are made from those, in the same names.

    Returns:
        The folder.
    """
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    sharded = file_format.startswith("sharded")
    model.save_pretrained(folder, max_shard_size=max(1000, nbytes // 3) if sharded else "50GB")
    if file_format.endswith("bin"):
        for path in folder.glob("*.safetensors"):
            torch.save(load_file(path), folder / _bin_name(path.name))
            path.unlink()
        index = folder / "model.safetensors.index.json"
        if index.exists():
            content = json.loads(index.read_text())
            content["weight_map"] = {name: _bin_name(file) for name, file in content["weight_map"].items()}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content))
            index.unlink()
    return folder


def _bin_name(name: str) -> str:
    return "pytorch_" + name.removesuffix(".safetensors") + ".bin"


def sample_inputs(model: Any, kind: str) -> dict[str, torch.Tensor]:
    """Fixed inputs for a forward pass."""
    tokens = torch.arange(3, 15)[None]
    text = {"input_ids": tokens}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if kind in {"causal", "encoder", "image-text"}:
        return text
    if kind == "seq2seq":
        return {**text, "decoder_input_ids": tokens[:, :5]}
    if kind == "ctc":
        name = model.main_input_name
        if name == "input_values":
            return {name: _signal(1, 2000).to(dtype)}
        return {name: _signal(1, 64, getattr(model.config, "num_mel_bins", 16)).to(dtype)}
    if kind == "speech":
        if model.main_input_name == "input_values":
            features = _signal(1, 2000)
        else:
            features = _signal(1, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        return {model.main_input_name: features.to(dtype), "decoder_input_ids": tokens[:, :5]}
    config = getattr(model.config, "vision_config", None) or model.config
    size = getattr(config, "image_size", 32)
    height, width = (size, size) if isinstance(size, int) else size
    pixels = _signal(1, getattr(config, "num_channels", 3), height, width).to(dtype)
    return {**text, "pixel_values": pixels} if kind == "contrastive" else {"pixel_values": pixels}


def _signal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED + 2))


def outputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """All output tensors of a forward pass, flat."""
    torch.manual_seed(SEED)
    with torch.inference_mode():
        return flat(model(**inputs))


def flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in flat(one)]
    return []
