"""Models and machines for the planner, made of values alone: no file lies behind them."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from random import Random
from typing import Any

from loadstone.checkpoint.values import Checkpoint, CheckpointFile, Format, TensorInfo
from loadstone.dtypes import DTYPES, nbytes_of
from loadstone.hardware.spec import ComputeRate, Cpu, Device, Machine, Rates

FILE = Path("model.safetensors")


def checkpoint(
    shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any] | None = None, dtype: str = "bfloat16"
) -> Checkpoint:
    """Tensors one after another in one file."""
    tensors, offset = {}, 0
    for name, shape in shapes.items():
        nbytes = nbytes_of(DTYPES[dtype], prod(shape))
        tensors[name] = TensorInfo(name=name, dtype=dtype, shape=shape, file=FILE, offset=offset, nbytes=nbytes)
        offset += nbytes
    files = (CheckpointFile(path=FILE, nbytes=offset),)
    return Checkpoint(format=Format.SAFETENSORS, root=Path("folder"), files=files, tensors=tensors, config=config)


def llama(
    layers: int = 4, width: int = 64, inner: int = 160, vocab: int = 1000, *, tied: bool = False, experts: int = 0
) -> Checkpoint:
    """A Llama, or a Mixtral where it has experts."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for layer in range(layers):
        start = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{start}.self_attn.{name}.weight"] = (width, width)
        parts = [f"mlp.experts.{expert}." for expert in range(experts)] or ["mlp."]
        for part in parts:
            shapes[f"{start}.{part}gate_proj.weight"] = (inner, width)
            shapes[f"{start}.{part}up_proj.weight"] = (inner, width)
            shapes[f"{start}.{part}down_proj.weight"] = (width, inner)
        shapes[f"{start}.input_layernorm.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, width)
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }
    if experts:
        config |= {"num_local_experts": experts, "num_experts_per_tok": min(2, experts)}
    return checkpoint(shapes, config)


def machine(host_bytes: int, *gpu_bytes: int, rates: Rates | None = None, compute: bool = False) -> Machine:
    """A machine with so many GPUs."""
    devices = [
        Device(
            id=f"cuda:{index}",
            kind="cuda",
            name="GPU",
            total_bytes=nbytes,
            free_bytes=nbytes,
            link_bytes_per_s=10e9 if compute else None,
            compute={"bfloat16": ComputeRate(weight_bytes_per_s=5e11, flops_per_s=5e13)} if compute else {},
        )
        for index, nbytes in enumerate(gpu_bytes)
    ]
    host = Device(
        id="cpu",
        kind="cpu",
        name="CPU",
        total_bytes=host_bytes,
        free_bytes=host_bytes,
        compute={"bfloat16": ComputeRate(weight_bytes_per_s=2e10, flops_per_s=2e11)} if compute else {},
    )
    return Machine(devices=(*devices, host), cpu=Cpu(name="CPU", num_cores=4), rates=rates or Rates())


def random_model(random: Random) -> Checkpoint:
    """Any depth, any widths, dense or with experts, tied or not."""
    width = 4 * random.randrange(4, 200)
    return llama(
        layers=random.randrange(1, 14),
        width=width,
        inner=random.randrange(8, 1200),
        vocab=random.randrange(50, 30_000),
        tied=random.random() < 0.4,
        experts=random.choice((0, 0, 0, 2, 8)),
    )
