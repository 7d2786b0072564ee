"""What `convert` writes: bit for bit what transformers would load, everything beside it, in bounded memory."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

import builders
import loadstone
from architecture_sweep import differences
from gguf_builders import Gguf, Stored, stored_array
from loadstone.checkpoint.manifest import read_manifest
from loadstone.errors import (
    DestinationError,
    DestinationExists,
    DiskFull,
    NotACheckpoint,
    TruncatedFile,
    UnsupportedDtype,
    UnsupportedFormat,
)
from loadstone.events import BytesMoved, Event

Q8_0 = 8

# (kind, type, format, stored, wanted): every format; casts up, down and across; ties; classes that keep float32.
SPREAD = (
    ("causal", "llama", "safetensors", "bfloat16", None),
    ("causal", "gpt2", "bin", "float32", "bfloat16"),
    ("causal", "gemma", "sharded bin", "bfloat16", "float32"),
    ("causal", "mixtral", "sharded safetensors", "float32", "float16"),
    ("causal", "deepseek_v3", "safetensors", "float32", "bfloat16"),
    ("causal", "rwkv", "sharded bin", "bfloat16", "float16"),
    ("seq2seq", "t5", "bin", "float32", "float16"),
    ("encoder", "bert", "sharded safetensors", "float32", None),
    ("contrastive", "clip", "bin", "float32", "bfloat16"),
)


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def same_model(ours: Any, theirs: Any) -> None:
    found = [line for line in differences(ours, theirs) if "_name_or_path" not in line]
    assert found == []


@pytest.mark.filterwarnings("ignore")  # of third parties
@pytest.mark.parametrize(("kind", "model_type", "file_format", "stored", "wanted"), SPREAD)
def test_the_result_loads_as_the_source_would(
    tmp_path: Path, kind: str, model_type: str, file_format: builders.Format, stored: str, wanted: str | None
) -> None:
    model = builders.tiny_model(model_type, kind, getattr(torch, stored))
    builders.write_checkpoint(model, tmp_path / "source", file_format)
    loadstone.convert(tmp_path / "source", tmp_path / "made", dtype=wanted, max_shard_size="40kB")
    expected = type(model).from_pretrained(tmp_path / "source", dtype=wanted or "auto")
    same_model(type(model).from_pretrained(tmp_path / "made", dtype="auto"), expected)
    same_model(loadstone.load(tmp_path / "made", architecture=type(model).__name__), expected)


def test_without_a_dtype_every_tensor_stays_as_it_is(llama_folder: Path, tmp_path: Path) -> None:
    report = loadstone.convert(llama_folder, tmp_path / "made")
    source, made = (load_file(folder / "model.safetensors") for folder in (llama_folder, tmp_path / "made"))
    assert list(report.files) == ["model.safetensors"]
    assert source.keys() == made.keys()
    assert all(torch.equal(source[name], made[name]) and source[name].dtype == made[name].dtype for name in source)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "made" / name).read_bytes() == (llama_folder / name).read_bytes()


def test_files_are_no_larger_than_asked_for(llama_folder: Path, tmp_path: Path) -> None:
    report = loadstone.convert(llama_folder, tmp_path / "made", max_shard_size=8000)
    index = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == list(report.files)
    assert len(report.files) > 3
    for name in report.files:
        assert sum(tensor.nbytes for tensor in load_file(tmp_path / "made" / name).values()) <= 8000
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in load_file(llama_folder / "model.safetensors").values()
    )


def test_the_manifest_lists_every_file(chatty_folder: Path, tmp_path: Path) -> None:
    report = loadstone.convert(chatty_folder, tmp_path / "made", max_shard_size="20kB")
    sums = read_manifest(tmp_path / "made" / "SHA256SUMS")
    assert set(sums) == {path.name for path in (tmp_path / "made").iterdir()} - {"SHA256SUMS"}
    assert set(sums) == {*report.files, *report.side_files}
    for name, digest in sums.items():
        assert hashlib.sha256((tmp_path / "made" / name).read_bytes()).hexdigest() == digest


def test_what_belongs_to_a_model_comes_along_and_code_does_not(llama_copy: Path, tmp_path: Path) -> None:
    beside = ("tokenizer.json", "LICENSE", "chat_template.jinja", "preprocessor_config.json", "tokenizer.model")
    left = ("modeling_x.py", "pytorch_model.bin.index.json", "notes.md", "training_args.bin")
    for name in (*beside, *left):
        (llama_copy / name).write_text("{}")
    (llama_copy / "additional_chat_templates").mkdir()
    (llama_copy / "additional_chat_templates" / "tool.jinja").write_text("t")
    os.mkfifo(llama_copy / "pipe.json")
    config = json.loads((llama_copy / "config.json").read_text())
    (llama_copy / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling_x.X"}}))
    report = loadstone.convert(llama_copy, tmp_path / "made")
    assert set(report.side_files) == {
        *beside,
        "config.json",
        "generation_config.json",
        "additional_chat_templates/tool.jinja",
    }
    assert (tmp_path / "made" / "additional_chat_templates" / "tool.jinja").read_text() == "t"
    assert any("names code of the checkpoint's own (AutoModel), which was not copied" in note for note in report.notes)


def test_a_lone_file_takes_nothing_of_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    save_file({"a": torch.ones(3)}, tmp_path / "downloads" / "x.safetensors")
    (tmp_path / "downloads" / "letter.txt").write_text("private")
    report = loadstone.convert(tmp_path / "downloads" / "x.safetensors", tmp_path / "downloads" / "made")
    assert report.side_files == ()
    assert any("holds no config.json" in note for note in report.notes)
    assert torch.equal(load_file(tmp_path / "downloads" / "made" / "model.safetensors")["a"], torch.ones(3))


def test_the_config_says_the_dtype_that_was_asked_for(llama_copy: Path, tmp_path: Path) -> None:
    config = json.loads((llama_copy / "config.json").read_text())
    config |= {"torch_dtype": "bfloat16", "vision_config": {"torch_dtype": "bfloat16", "dtype": None, "size": 3}}
    (llama_copy / "config.json").write_text(json.dumps(config))
    loadstone.convert(llama_copy, tmp_path / "made", dtype=torch.float32)
    made = json.loads((tmp_path / "made" / "config.json").read_text())
    assert made == {
        **config,
        "dtype": "float32",
        "torch_dtype": "float32",
        "vision_config": {"torch_dtype": "float32", "dtype": "float32", "size": 3},
    }


def test_only_floating_point_is_cast_and_quantised_parts_are_not(tmp_path: Path) -> None:
    state = {
        "f": torch.randn(3),
        "i": torch.arange(4),
        "b": torch.tensor([True, False]),
        "q": torch.randn(8).to(torch.float8_e4m3fn),
    }
    save_file(state, tmp_path / "m.safetensors")
    report = loadstone.convert(tmp_path / "m.safetensors", tmp_path / "made", dtype="bf16")
    made = load_file(tmp_path / "made" / "model.safetensors")
    assert torch.equal(made["f"], state["f"].to(torch.bfloat16))
    for name in ("i", "b", "q"):
        assert made[name].dtype == state[name].dtype
        assert torch.equal(made[name].view(torch.uint8), state[name].view(torch.uint8))
    assert any("1 tensors stay as stored, because float8_e4m3fn means nothing" in note for note in report.notes)
    assert any("no model class was asked" in note for note in report.notes)


def test_casting_quantised_weights_is_refused(llama_copy: Path, tmp_path: Path) -> None:
    config = json.loads((llama_copy / "config.json").read_text())
    (llama_copy / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UnsupportedDtype, match=r"the weights are quantised \(fp8\); .* Convert them as they are"):
        loadstone.convert(llama_copy, tmp_path / "made", dtype="float32")
    assert not (tmp_path / "made").exists()
    loadstone.convert(llama_copy, tmp_path / "made")


def tied_folder(folder: Path, *, tie: bool) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tie,
        architectures=["LlamaForCausalLM"],
    )
    model = transformers.LlamaForCausalLM(config)
    model.lm_head.weight = model.model.embed_tokens.weight
    config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("tie", [True, False])
def test_tied_tensors_are_written_once_if_the_class_ties_them(tmp_path: Path, tie: bool) -> None:
    source = tied_folder(tmp_path / "source", tie=tie)
    report = loadstone.convert(source, tmp_path / "made")
    made = load_file(tmp_path / "made" / "model.safetensors")
    assert ("lm_head.weight" in made) is not tie
    assert any("written once" in note for note in report.notes) is tie
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    state = torch.load(source / "pytorch_model.bin")
    assert all(torch.equal(theirs.state_dict()[name], tensor) for name, tensor in state.items())


def test_a_legacy_pickle_with_views(tmp_path: Path) -> None:
    base = torch.randn(300, 200)
    state = {"view": base.t(), "column": base[:, 3], "whole": base}
    torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    loadstone.convert(tmp_path / "m.pt", tmp_path / "made", dtype="float16")
    made = load_file(tmp_path / "made" / "model.safetensors")
    assert all(torch.equal(made[name], tensor.to(torch.float16)) for name, tensor in state.items())


# --- GGUF


def tiny_gguf(folder: Path, **metadata: Any) -> Path:
    """A Llama of Q8_0 blocks: two layers, tied, grouped queries."""
    random = np.random.default_rng(0)

    def blocks(*shape: int) -> Stored:
        count = int(np.prod(shape)) // 32
        raw = random.integers(-40, 40, (count, 34), np.int8).view(np.uint8)
        raw[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        return Stored(shape, Q8_0, raw.tobytes())

    tensors = {"token_embd.weight": blocks(64, 64), "output_norm.weight": stored_array(random.random(64))}
    for layer in range(2):
        shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
        shapes |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
        tensors |= {f"blk.{layer}.{name}.weight": blocks(*shape) for name, shape in shapes.items()}
        tensors |= {f"blk.{layer}.{name}_norm.weight": stored_array(random.random(64)) for name in ("attn", "ffn")}
    keys = {
        "context_length": 128,
        "block_count": 2,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    described = {f"llama.{key}": value for key, value in keys.items()}
    head = {"general.architecture": "llama", **described, "tokenizer.ggml.eos_token_id": 2, **metadata}
    return Gguf(head, tensors).write(folder / "m.gguf")


@pytest.mark.parametrize("wanted", [None, "bfloat16"])
def test_a_gguf_file_becomes_a_folder_that_loads_the_same(tmp_path: Path, wanted: str | None) -> None:
    path = tiny_gguf(tmp_path)
    loadstone.convert(path, tmp_path / "made", dtype=wanted, max_shard_size="30kB")
    direct = loadstone.load(path, dtype=wanted)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    same_model(theirs, direct)
    same_model(loadstone.load(tmp_path / "made"), direct)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, direct(tokens).logits)


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_the_tokenizer_of_a_gguf_file_comes_back(tmp_path: Path, name: str) -> None:
    from architecture.test_gguf_tokenizer import TEXTS, byte_level, from_sentencepiece, train

    described = byte_level(**{"tokenizer.ggml.add_bos_token": True}) if name == "byte_level" else None
    if described is None:
        pieces = train(model_type="bpe", vocab_size=420, byte_fallback=True, normalization_rule_name="identity")
        described = from_sentencepiece(pieces, "llama")
    path = tiny_gguf(tmp_path, **{key: value for key, value in described.items() if key.startswith("tokenizer.")})
    report = loadstone.convert(path, tmp_path / "made")
    assert report.peak_bytes <= report.bound_bytes
    ours, direct = loadstone.load_tokenizer(tmp_path / "made"), loadstone.load_tokenizer(path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "made")
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"] == direct(text)["input_ids"], text
    assert ours.special_tokens_map == direct.special_tokens_map
    assert ours.chat_template == direct.chat_template
    assert ours.model_max_length == direct.model_max_length


def test_a_tokenizer_that_is_not_known_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path, **{"tokenizer.ggml.model": "bananas"})
    with pytest.raises(UnsupportedFormat, match=r"m\.gguf: tokenizer\.ggml\.model is 'bananas'"):
        loadstone.convert(path, tmp_path / "made")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]


# --- destinations and faults


def test_destinations_in_or_over_the_source_are_refused(llama_copy: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in llama_copy.iterdir())
    for place in (llama_copy, llama_copy / "made", tmp_path / "x" / ".." / "llama"):
        with pytest.raises(DestinationError, match="expected a folder outside the source"):
            loadstone.convert(llama_copy, place)
    with pytest.raises(DestinationExists, match="found a folder that is not empty"):
        loadstone.convert(llama_copy / "model.safetensors", tmp_path)
    assert sorted(path.name for path in llama_copy.iterdir()) == before


def test_a_disk_that_is_full_leaves_nothing(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: memoryview, offset: int) -> int:
        if offset and next(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    real, calls = os.pwrite, itertools.count()
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DiskFull, match="nothing was left on it"):
        loadstone.convert(llama_folder, tmp_path / "made", dtype="float32", max_shard_size="9kB")
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_cut_short_meanwhile_leaves_nothing(llama_copy: Path, tmp_path: Path) -> None:
    def cut(event: Event) -> None:
        if isinstance(event, BytesMoved):
            os.truncate(llama_copy / "model.safetensors", 9000)

    with pytest.raises(TruncatedFile, match="cut short"):
        loadstone.convert(llama_copy, tmp_path / "made", dtype="float32", max_shard_size="1kB", progress=cut)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_an_interruption_leaves_nothing(llama_folder: Path, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, BytesMoved):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loadstone.convert(llama_folder, tmp_path / "made", max_shard_size="1kB", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["5 bananas", "0", "-1GB", "", "1e9", "GB", "5iB"])
def test_a_size_that_is_none(llama_folder: Path, tmp_path: Path, size: str) -> None:
    with pytest.raises(ValueError, match="max_shard_size: expected a size such as 5GB, 500MB or 2GiB"):
        loadstone.convert(llama_folder, tmp_path / "made", max_shard_size=size)


def test_progress_tells_every_byte(llama_folder: Path, tmp_path: Path) -> None:
    moved: list[BytesMoved] = []
    report = loadstone.convert(
        llama_folder,
        tmp_path / "made",
        max_shard_size="9kB",
        progress=lambda event: moved.append(event) if isinstance(event, BytesMoved) else None,
    )
    assert max(event.done_bytes for event in moved) == moved[0].total_bytes == report.nbytes
    assert [phase.stage for phase in report.phases] == ["headers", "write", "side files", "put in place"]


def test_a_file_without_tensors_is_no_checkpoint(tmp_path: Path) -> None:
    save_file({}, tmp_path / "m.safetensors")
    with pytest.raises(NotACheckpoint, match=r"expected tensors, found none"):
        loadstone.convert(tmp_path / "m.safetensors", tmp_path / "made")
    assert not (tmp_path / "made").exists()
