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
TINY: dict[str, Any] = {
    # widths
    **dict.fromkeys(
        "hidden_size d_model n_embd dim embed_dim hidden_dim embedding_size decoder_hidden_size encoder_hidden_size "
        "d_embed model_dim text_hidden_size hidden_size_per_layer_input attention_hidden_size lru_width width "
        "vision_hidden_size dim_model decoder_input_dim conv_dim_in proj_dim".split(),
        64,
    ),
    **dict.fromkeys(
        "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size mlp_dim "
        "shared_expert_intermediate_size dense_intermediate_size moe_shared_expert_intermediate_size "
        "moe_ffn_hidden_size expert_ffn_hidden_size shared_intermediate_size block_ff_dim "
        "intermediate_size_mlp feed_forward_size dim_feedforward mamba_intermediate_size "
        "shared_expert_ffn_size ffn_intermediate_size hidden_size_mlp".split(),
        96,
    ),
    **dict.fromkeys("moe_intermediate_size expert_hidden_size".split(), 32),
    **dict.fromkeys("projection_dim pooler_output_size output_dim classifier_proj_size proj_size text_embed_dim".split(), 32),
    # depth
    **dict.fromkeys(
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
        "num_encoder_layers depth num_blocks num_conv_layers speech_decoder_layers text_decoder_layers "
        "text_encoder_layers speech_encoder_layers adapter_layers max_window_layers "
        "t2u_encoder_layers t2u_decoder_layers num_coarse_layers".split(),
        2,
    ),
    # heads
    **dict.fromkeys(
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
        "num_decoder_attention_heads attention_heads heads num_query_heads".split(),
        4,
    ),
    **dict.fromkeys("num_key_value_heads num_kv_heads n_head_kv multi_query_group_num swa_num_key_value_heads".split(), 2),
    **dict.fromkeys("head_dim d_kv attention_head_dim attention_head_size kv_channels".split(), 16),
    "global_head_dim": 16,
    "num_global_key_value_heads": 2,
    # vocabulary and positions
    **dict.fromkeys("vocab_size text_vocab_size input_vocab_size output_vocab_size decoder_vocab_size".split(), VOCAB),
    **dict.fromkeys(
        "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length max_target_positions seq_length "
        "max_source_positions max_text_len context_length".split(),
        64,
    ),
    **dict.fromkeys("sliding_window attention_window_size window_size attention_chunk_size".split(), 8),
    # experts
    **dict.fromkeys(
        "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts ffn_num_experts".split(), 4
    ),
    **dict.fromkeys(
        "num_experts_per_tok num_experts_per_token moe_top_k moe_topk top_k_experts moe_k experts_per_token".split(), 2
    ),
    **dict.fromkeys("n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts".split(), 1),
    "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    # state spaces
    **dict.fromkeys("state_size mamba_d_state ssm_state_size mamba_state_size d_state".split(), 8),
    **dict.fromkeys("conv_kernel mamba_d_conv conv_kernel_size".split(), 4),
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
EXCEPTIONS: dict[str, dict[str, Any]] = {}

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
    for name, value in default.to_dict().items():
        if name in exceptions:
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
        return _tensors(model(**inputs))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in _tensors(one)]
    return []
