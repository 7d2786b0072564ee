"""A bare tokenizer.model, as it lies beside Meta's own checkpoints, in the words of a GGUF header.

Llama 1 and 2 and Mistral have SentencePiece's format, Llama 3 that of tiktoken: a line for each token, its bytes in
base64 and its rank. What a GGUF header says is then made into a tokenizer as for GGUF files.

Source: https://github.com/meta-llama/llama-models/blob/main/models/llama3/tokenizer.py
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from loadstone.architecture.gguf_tokenizer import byte_alphabet, implied_merges
from loadstone.checkpoint.files import open_regular
from loadstone.checkpoint.layout import PARAMS_NAME
from loadstone.errors import InvalidHeader

VOCABULARY_NAME = "tokenizer.model"
_MAX_BYTES = 64_000_000
_TIKTOKEN_LINE = re.compile(rb"([A-Za-z0-9+/]+=*) (\d+)")

# Token types. Source: https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h (enum llama_token_type)
_NORMAL, _UNKNOWN, _CONTROL, _UNUSED, _BYTE = 1, 2, 3, 5, 6

# Llama 3's special tokens follow its vocabulary; the file does not have them.
# Source: https://huggingface.co/meta-llama/Llama-3.1-8B (tokenizer.json, added_tokens)
_NUM_SPECIAL = 256
_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)


def bare_vocabulary(root: Path) -> Path | None:
    """The tokenizer.model of Meta's layout in a folder, where nothing else there describes the tokenizer."""
    described = any((root / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    path = root / VOCABULARY_NAME
    return path if not described and (root / PARAMS_NAME).is_file() and path.is_file() else None


def tokenizer_metadata(path: Path) -> dict[str, Any]:
    """Read a tokenizer.model.

    Args:
        path: the file.

    Returns:
        The keys `tokenizer.ggml.*` that a GGUF header of this model would have.

    Raises:
        InvalidHeader: it is in neither format.
    """
    with open_regular(path) as file:
        if file.nbytes > _MAX_BYTES:
            raise InvalidHeader(f"{path}: expected at most {_MAX_BYTES:,} bytes of vocabulary, found {file.nbytes:,}.")
        content = file.read(0, file.nbytes)
    said = _tiktoken(path, content) if _TIKTOKEN_LINE.match(content) else _sentencepiece(path, content)
    return {f"tokenizer.ggml.{key}": value for key, value in said.items()}


def _sentencepiece(path: Path, content: bytes) -> dict[str, Any]:
    from sentencepiece import SentencePieceProcessor

    try:
        found = SentencePieceProcessor(model_proto=content)
        size = found.get_piece_size()
    except (RuntimeError, TypeError) as error:
        raise InvalidHeader(
            f"{path}: expected a vocabulary of SentencePiece or tiktoken, found neither; download it again."
        ) from error
    kinds = (
        (_UNKNOWN, found.is_unknown),
        (_CONTROL, found.is_control),
        (_UNUSED, found.is_unused),
        (_BYTE, found.is_byte),
    )
    ids = {"bos_token_id": found.bos_id(), "eos_token_id": found.eos_id(), "unknown_token_id": found.unk_id()}
    return {
        "model": "llama",
        "tokens": [found.id_to_piece(index) for index in range(size)],
        "scores": [found.get_score(index) for index in range(size)],
        "token_type": [next((kind for kind, is_kind in kinds if is_kind(index)), _NORMAL) for index in range(size)],
        **{key: index for key, index in ids.items() if index >= 0},
    }


def _tiktoken(path: Path, content: bytes) -> dict[str, Any]:
    alphabet = byte_alphabet()
    tokens = []
    for number, line in enumerate(content.splitlines()):
        match = _TIKTOKEN_LINE.fullmatch(line)
        if match is None or int(match[2]) != number:
            raise InvalidHeader(
                f"{path}: expected a token in base64 and the rank {number} in line {number + 1}, found {line[:60]!r}; "
                "download it again."
            )
        tokens.append("".join(alphabet[byte] for byte in base64.b64decode(match[1])))
    vocab = {token: rank for rank, token in enumerate(tokens)}
    reserved = (f"<|reserved_special_token_{index}|>" for index in range(3, _NUM_SPECIAL))
    special = [*_SPECIAL, *reserved][:_NUM_SPECIAL]
    return {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": [*tokens, *special],
        "merges": implied_merges(vocab, range(0, -len(tokens), -1)),
        "token_type": [_NORMAL] * len(tokens) + [_CONTROL] * len(special),
        "bos_token_id": len(tokens),
        "eos_token_id": len(tokens) + 1,
    }
