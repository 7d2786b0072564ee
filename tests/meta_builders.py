"""Tiny checkpoints in Meta's own layout: consolidated.NN.pth, params.json, a bare tokenizer.model."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from builders import stir
from loadstone.architecture.gguf_pretokenizers import PRE_TOKENIZERS
from loadstone.architecture.gguf_tokenizer import byte_alphabet
from tiny_llama import tiny_llama

LAYER = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")
PARAMS: dict[str, Any] = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 96,
    "multiple_of": 16,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
}


def reference(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> LlamaForCausalLM:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 96, "rms_norm_eps": 1e-05}
    return tiny_llama(dtype, stirred=True, **{**sizes, **rope, **changes})


def interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Halves of a head's rows -> pairs, as Meta's rotary positions have them."""
    rows, columns = weight.shape
    return weight.view(num_heads, 2, rows // num_heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def meta_state(model: nn.Module, heads: int = 4, kv_heads: int = 2) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    made = {"tok_embeddings.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"]}
    made["output.weight"] = state["lm_head.weight"]
    for layer in range(2):
        for name, module in LAYER.items():
            weight = state[f"model.layers.{layer}.{module}.weight"]
            if name.endswith(("wq", "wk")):
                weight = interleaved(weight, heads if name.endswith("wq") else kv_heads)
            made[f"layers.{layer}.{name}.weight"] = weight
    made["rope.freqs"] = torch.ones(8)
    return {name: tensor.clone() for name, tensor in made.items()}


def write(folder: Path, state: dict[str, torch.Tensor], ranks: int = 1, embedding_dim: int = 1, **params: Any) -> Path:
    for rank in range(ranks):
        part = {}
        for name, tensor in state.items():
            dim = embedding_dim if name.startswith("tok_") else 1 if name.endswith(BY_COLUMNS) else 0
            part[name] = tensor.chunk(ranks, dim)[rank].clone() if tensor.ndim > 1 else tensor.clone()
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps({**PARAMS, **params}))
    return folder


def write_mistral(folder: Path) -> MistralForCausalLM:
    """Mistral's consolidated.safetensors, and the model that is in it."""
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=96,
        rms_norm_eps=1e-05,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        sliding_window=None,
    )
    model = MistralForCausalLM(config).eval()
    stir(model)
    state = meta_state(model)
    del state["rope.freqs"]
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "consolidated.safetensors")
    params = {**PARAMS, "head_dim": 8, "hidden_dim": 96, "rope_theta": 1e6}
    del params["multiple_of"]
    (folder / "params.json").write_text(json.dumps(params))
    return model


CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "What's 12345 + 678? It is 13023!",
    "naïve café, 日本語 too",
] * 20
TEXTS = [*CORPUS[:3], "  two  spaces\n\nand lines", "unseen: Żółć 🙂", ""]


def sentencepiece_file() -> bytes:
    """A tokenizer.model as Llama 1 and 2 have it."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=written,
        minloglevel=2,
        hard_vocab_limit=False,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    return written.getvalue()


def llama3_reference() -> Tokenizer:
    """A byte-level tokenizer with Llama 3's way to split text, trained on the corpus."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRE_TOKENIZERS["llama-bpe"].splits[0]), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return tokenizer


def tiktoken_file(vocab: dict[str, int]) -> bytes:
    spelled = {char: byte for byte, char in byte_alphabet().items()}
    ordered = sorted(vocab, key=lambda token: vocab[token])
    lines = [base64.b64encode(bytes(spelled[char] for char in token)) for token in ordered]
    return b"".join(line + b" %d\n" % rank for rank, line in enumerate(lines))
