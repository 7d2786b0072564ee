"""Write safetensors checkpoints of any size as sparse files: real headers and indexes, no data on the disk."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path

Shapes = dict[str, tuple[int, ...]]

# https://huggingface.co/meta-llama/Meta-Llama-3-70B/blob/main/config.json
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

# https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/blob/main/config.json
QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

# The layout of https://huggingface.co/deepseek-ai/DeepSeek-V3 with experts as many and as wide as 1.5 TB ask for.
MOE_1500GB = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 1664,
    "num_hidden_layers": 61,
    "n_routed_experts": 330,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "vocab_size": 163840,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def llama_shapes(config: dict[str, object]) -> Shapes:
    """The tensors of a Llama checkpoint."""
    width, inner = int(str(config["hidden_size"])), int(str(config["intermediate_size"]))
    narrow = width // int(str(config["num_attention_heads"])) * int(str(config["num_key_value_heads"]))
    vocabulary = int(str(config["vocab_size"]))
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(int(str(config["num_hidden_layers"]))):
        start = f"model.layers.{layer}."
        shapes |= {
            f"{start}self_attn.q_proj.weight": (width, width),
            f"{start}self_attn.k_proj.weight": (narrow, width),
            f"{start}self_attn.v_proj.weight": (narrow, width),
            f"{start}self_attn.o_proj.weight": (width, width),
            f"{start}mlp.gate_proj.weight": (inner, width),
            f"{start}mlp.up_proj.weight": (inner, width),
            f"{start}mlp.down_proj.weight": (width, inner),
            f"{start}input_layernorm.weight": (width,),
            f"{start}post_attention_layernorm.weight": (width,),
        }
    return {**shapes, "model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def qwen_shapes(config: dict[str, object]) -> Shapes:
    """The tensors of a Qwen2 checkpoint: Llama's, and biases of queries, keys and values."""
    shapes = llama_shapes(config)
    for name, shape in list(shapes.items()):
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            shapes[name.replace(".weight", ".bias")] = shape[:1]
    return shapes


def moe_shapes(config: dict[str, object]) -> Shapes:
    """The tensors of a checkpoint with three per expert, and latent attention."""
    width, inner = int(str(config["hidden_size"])), int(str(config["moe_intermediate_size"]))
    vocabulary = int(str(config["vocab_size"]))
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(int(str(config["num_hidden_layers"]))):
        start = f"model.layers.{layer}."
        shapes |= {
            f"{start}self_attn.q_a_proj.weight": (1536, width),
            f"{start}self_attn.q_b_proj.weight": (64 * 192, 1536),
            f"{start}self_attn.kv_a_proj_with_mqa.weight": (576, width),
            f"{start}self_attn.kv_b_proj.weight": (64 * 256, 512),
            f"{start}self_attn.o_proj.weight": (width, 64 * 128),
            f"{start}input_layernorm.weight": (width,),
        }
        for expert in range(int(str(config["n_routed_experts"]))):
            for name in ("gate_proj", "up_proj"):
                shapes[f"{start}mlp.experts.{expert}.{name}.weight"] = (inner, width)
            shapes[f"{start}mlp.experts.{expert}.down_proj.weight"] = (width, inner)
    return {**shapes, "model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def write(folder: Path, config: dict[str, object], shapes: Shapes, num_shards: int) -> Path:
    """Write a bf16 checkpoint as sparse files.

    Args:
        folder: where; created when missing.
        config: the content of config.json.
        shapes: every tensor with its shape.
        num_shards: over how many files they are spread.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weight_map: dict[str, str] = {}
    for number, part in enumerate(_parts(shapes, num_shards), start=1):
        name = f"model-{number:05d}-of-{num_shards:05d}.safetensors"
        header, offset = {}, 0
        for tensor, shape in part.items():
            end = offset + 2 * prod(shape)
            header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
            weight_map[tensor] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + offset)
    index = {"metadata": {"total_size": sum(2 * prod(shape) for shape in shapes.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _parts(shapes: Shapes, count: int) -> Iterator[Shapes]:
    names = list(shapes)
    for number in range(count):
        begin, end = number * len(names) // count, (number + 1) * len(names) // count
        yield {name: shapes[name] for name in names[begin:end]}
