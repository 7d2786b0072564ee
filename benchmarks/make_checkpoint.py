"""Write checkpoints of real geometries with random weights, for the benchmarks.

A checkpoint is written the way the hub has it: `config.json`, sharded safetensors and an index. The weights are
small random numbers, so that a forward pass stays finite; the tokenizer is left out.

    python benchmarks/make_checkpoint.py qwen2.5-1.5b /tmp/qwen2.5-1.5b
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

GEOMETRIES: dict[str, dict[str, object]] = {
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
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = GEOMETRIES[geometry]
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(**settings)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
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
