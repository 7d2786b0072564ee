"""Write checkpoints of real geometries with random weights, for the benchmarks.

A checkpoint is written the way the hub has it: `config.json`, sharded safetensors and an index. The weights are
small random numbers, so that a forward pass stays finite; the tokenizer is left out.

    python benchmarks/make_checkpoint.py qwen2.5-1.5b /tmp/qwen2.5-1.5b
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

GEOMETRIES: dict[str, dict[str, Any]] = {
    # https://huggingface.co/Qwen/Qwen2.5-1.5B/blob/main/config.json
    "qwen2.5-1.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 1536,
        "initializer_range": 0.02,
        "intermediate_size": 8960,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    },
    # https://huggingface.co/Qwen/Qwen2.5-7B/blob/main/config.json, 14 of 28 layers: 8.7 GB
    "qwen2.5-7b-14-layers": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "num_attention_heads": 28,
        "num_hidden_layers": 14,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 152064,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    },
    # https://huggingface.co/TinyLlama/TinyLlama-1.1B-Chat-v1.0/blob/main/config.json
    "tinyllama-1.1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 32000,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    # https://huggingface.co/openai-community/gpt2/blob/main/config.json
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "torch_dtype": "bfloat16",
        "vocab_size": 50257,
    },
    # https://huggingface.co/HuggingFaceTB/SmolLM2-135M/blob/main/config.json
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 49152,
    },
    # https://huggingface.co/Qwen/Qwen2.5-0.5B/blob/main/config.json
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    # https://huggingface.co/google/gemma-3-270m/blob/main/config.json
    "gemma3-270m": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": 256,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "sliding_window": 512,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 262144,
    },
    # https://huggingface.co/mistralai/Mistral-7B-v0.1/blob/main/config.json, 3 of 32 layers
    "mistral-7b-3-layers": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 3,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    },
    # https://huggingface.co/ibm-granite/granite-3.0-1b-a400m-base/blob/main/config.json, 6 of 24 layers
    "granite-moe-1b-6-layers": {
        "architectures": ["GraniteMoeForCausalLM"],
        "model_type": "granitemoe",
        "hidden_size": 1024,
        "intermediate_size": 512,
        "max_position_embeddings": 4096,
        "num_attention_heads": 16,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 6,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 49152,
    },
    # https://huggingface.co/google-bert/bert-base-uncased/blob/main/config.json
    "bert-base": {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "max_position_embeddings": 512,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "torch_dtype": "bfloat16",
        "type_vocab_size": 2,
        "vocab_size": 30522,
    },
    # https://huggingface.co/google/t5-v1_1-base/blob/main/config.json
    "t5-base": {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "d_ff": 2048,
        "d_kv": 64,
        "d_model": 768,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "num_decoder_layers": 12,
        "num_heads": 12,
        "num_layers": 12,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 32128,
    },
    # The layout of https://huggingface.co/Qwen/Qwen3-30B-A3B (48 layers of 128 experts: 18,432 expert tensors),
    # made narrow so that only the number of tensors is large.
    "qwen3-moe-many-tensors": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 128,
        "max_position_embeddings": 4096,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def write(geometry: str, folder: Path, max_shard_size: str = "1GB") -> Path:
    """Write the checkpoint once; a folder that is complete already is left alone.

    Args:
        geometry: a key of `GEOMETRIES`.
        folder: where it goes; created when missing.
        max_shard_size: the size of a shard, as transformers writes sizes.

    Returns:
        The folder.
    """
    if (folder / "complete").exists():
        return folder
    import torch
    import transformers

    settings = GEOMETRIES[geometry]
    folder.mkdir(parents=True, exist_ok=True)
    config = transformers.AutoConfig.for_model(**settings)
    model_class = getattr(transformers, settings["architectures"][0])
    torch.manual_seed(0)
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "layernorm.weight")):
                parameter.fill_(1.0)
            else:
                parameter.copy_(torch.randn(parameter.shape, dtype=torch.float32).mul_(0.02))
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "complete").touch()
    return folder


def main() -> None:
    """Write the checkpoint that is named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("geometry", choices=sorted(GEOMETRIES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max-shard-size", default="1GB")
    arguments = parser.parse_args()
    write(arguments.geometry, arguments.folder, arguments.max_shard_size)


if __name__ == "__main__":
    main()
