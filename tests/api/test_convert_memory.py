"""The memory of a conversion stays under what was computed from the headers, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gguf_builders import Gguf, Stored, stored_array
from loadstone.architecture.gguf_layouts import UnpermuteHeads
from loadstone.architecture.keymap import Assignment, Part
from loadstone.checkpoint.values import TensorInfo
from loadstone.checkpoint.write import NewTensor, plan_shards
from loadstone.stream.rewrite import Sources, bound_bytes
from meta_builders import write

Q8_0 = 8

CHILD = """
import json, sys
from loadstone.api.convert import convert
report = convert(sys.argv[1], sys.argv[2], dtype=sys.argv[3] or None, max_shard_size=sys.argv[4])
print(json.dumps([report.before_bytes, report.peak_bytes, report.bound_bytes]))
"""


def measured(source: Path, made: Path, dtype: str = "", shard: str = "5GB") -> tuple[int, int, int]:
    """Memory before, peak on top, and bound, of a conversion in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, source, made, dtype, shard], capture_output=True, text=True, check=True
    )
    before, peak, bound = json.loads(done.stdout)
    return before, peak, bound


def large_safetensors(folder: Path) -> tuple[Path, int]:
    save_file({f"{n}": torch.full((8192, 4096), n, dtype=torch.bfloat16) for n in range(2)}, folder / "m.safetensors")
    return folder / "m.safetensors", 2 * 8192 * 4096


def large_bin(folder: Path) -> tuple[Path, int]:
    torch.save({"t": torch.ones(4096, 8192, dtype=torch.bfloat16).t(), "a": torch.ones(9)}, folder / "m.bin")
    return folder / "m.bin", 2 * 8192 * 4096


def large_gguf(folder: Path) -> tuple[Path, int]:
    width, vocabulary = 2048, 16384
    raw = bytes(width * width // 32 * 34)
    tensors = {
        "token_embd.weight": Stored((vocabulary, width), Q8_0, bytes(vocabulary * width // 32 * 34)),
        "output_norm.weight": stored_array(np.ones(width)),
        **{f"blk.0.attn_{name}.weight": Stored((width, width), Q8_0, raw) for name in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{name}.weight": Stored((width, width), Q8_0, raw) for name in ("gate", "up", "down")},
        **{f"blk.0.{name}_norm.weight": stored_array(np.ones(width)) for name in ("attn", "ffn")},
    }
    keys = {"context_length": 128, "block_count": 1, "embedding_length": width, "feed_forward_length": width}
    keys |= {"attention.head_count": 16, "attention.layer_norm_rms_epsilon": 1e-5}
    head = {"general.architecture": "llama", **{f"llama.{key}": value for key, value in keys.items()}}
    return Gguf(head, tensors).write(folder / "m.gguf"), 4 * vocabulary * width


def large_meta(folder: Path) -> tuple[Path, int]:
    """Two ranks: rows of both are streamed, matrices that are cut by columns are 8 MB."""
    width, vocabulary = 2048, 16384
    shapes = {"tok_embeddings": (vocabulary, width), "output": (vocabulary, width), "norm": (width,)}
    shapes |= {f"layers.0.attention.{name}": (width, width) for name in ("wq", "wk", "wv", "wo")}
    shapes |= {f"layers.0.feed_forward.{name}": (width, width) for name in ("w1", "w2", "w3")}
    shapes |= {f"layers.0.{name}_norm": (width,) for name in ("attention", "ffn")}
    state = {f"{name}.weight": torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    params = {"dim": width, "n_layers": 1, "n_heads": 16, "n_kv_heads": None, "vocab_size": vocabulary}
    return write(folder, state, 2, embedding_dim=0, **params), 4 * vocabulary * width


# What does not depend on the tensors: slots of two files at once, and eight reading threads.
FIXED_BYTES = 170_000_000


@pytest.mark.parametrize(
    ("build", "dtype", "shard"),
    [
        (large_safetensors, "", "5GB"),
        (large_safetensors, "float32", "100MB"),
        (large_bin, "", "5GB"),
        (large_bin, "float32", "5GB"),
        (large_gguf, "", "5GB"),
        (large_meta, "", "5GB"),
        (large_meta, "float32", "100MB"),
    ],
)
def test_memory_stays_under_the_bound(tmp_path: Path, build: Any, dtype: str, shard: str) -> None:
    (tmp_path / "source").mkdir()
    source, largest_bytes = build(tmp_path / "source")
    before, peak, bound = measured(source, tmp_path / "made", dtype, shard)
    assert 0 < peak <= bound
    assert bound <= 2 * largest_bytes + FIXED_BYTES
    # By far: no tensor is ever in memory as a whole, but for what is rearranged, 17 MB each.
    assert peak < 110_000_000
    assert before < 60_000_000  # torch was not imported


def test_the_bound_counts_what_is_rearranged_as_a_whole() -> None:
    shape = (4096, 4096)
    info = TensorInfo(name="q", dtype="float32", shape=shape, file=Path("m"), offset=0, nbytes=1, encoding="Q8_0")
    shards = plan_shards([NewTensor(name="q", dtype="float32", shape=shape)], 10**12)

    def bound(layout: object) -> int:
        entry = Assignment(target="q", parts=(Part(source="q", layout=layout),))
        return bound_bytes(shards, Sources(tensors={"q": info}, assignments={"q": entry}), cores=2)

    assert bound(UnpermuteHeads(num_heads=32)) - bound(None) == 2 * 4 * 4096 * 4096
