"""What GGUF headers and Meta's layout describe in their own words, as files: config, generation config, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from loadstone.architecture.gguf_tokenizer import tokenizer_config, tokenizer_json
from loadstone.architecture.meta_tokenizer import VOCABULARY_NAME
from loadstone.checkpoint.side_files import CONFIG, GENERATION_CONFIG, json_text, with_dtype
from loadstone.checkpoint.values import Checkpoint
from loadstone.errors import InvalidHeader, UnsupportedFormat

# The class that takes a tokenizer.json as it is; those of the model types put rules of their own in its place.
_TOKENIZER_CLASS = "PreTrainedTokenizerFast"
_GENERATING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
# Fields that a config and a generation config both have, at the values that classes have them by default.
_GENERATION_DEFAULTS = {"output_attentions": False, "output_hidden_states": False, "use_cache": True}
# What a token or a merge takes on its way into tokenizer.json, as Python objects and as text; and what a token takes
# whose merges are not in the file, so that each way to cut it is weighed.
_ENTRY_BYTES = 256
_CUT_TOKEN_BYTES = 4096


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether a GGUF header describes a tokenizer, or a bare vocabulary was read."""
    return "tokenizer.ggml.model" in checkpoint.metadata


def vocabulary_bytes(checkpoint: Checkpoint) -> int:
    """The most memory that making the files takes, by the vocabulary."""
    tokens, merges = (checkpoint.metadata.get(f"tokenizer.ggml.{name}") or () for name in ("tokens", "merges"))
    return _ENTRY_BYTES * (len(tokens) + len(merges)) + (0 if merges else _CUT_TOKEN_BYTES * len(tokens))


def config_files(checkpoint: Checkpoint, dtype: str) -> Iterator[tuple[str, bytes]]:
    """Make config.json and, for what generates, generation_config.json.

    Args:
        checkpoint: with the config that its headers imply.
        dtype: torch's name of the dtype that the weights are loaded in.

    Yields:
        Name and content.
    """
    config = checkpoint.config or {}
    yield CONFIG, json_text(with_dtype(config, dtype))
    if str(config["architectures"][0]).endswith(_GENERATING):
        yield GENERATION_CONFIG, json_text(checkpoint.generation_config or _generation_config(config))


def tokenizer_files(checkpoint: Checkpoint) -> Iterator[tuple[str, bytes]]:
    """Make the files of the tokenizer that a GGUF header describes, or a bare vocabulary; nothing where there is none.

    Args:
        checkpoint: with that in its metadata.

    Yields:
        Name and content.

    Raises:
        UnsupportedFormat: a tokenizer that is not known.
        InvalidHeader: a tokenizer that contradicts itself.
    """
    if not has_tokenizer(checkpoint):
        return
    try:
        content = json.dumps(tokenizer_json(checkpoint.metadata), ensure_ascii=False, separators=(",", ":"))
        described = tokenizer_config(checkpoint.metadata)
    except (InvalidHeader, UnsupportedFormat) as error:
        where = checkpoint.files[0].path if checkpoint.params is None else checkpoint.root / VOCABULARY_NAME
        raise type(error)(f"{where}: {error}") from error
    yield "tokenizer.json", content.encode()
    template = described.pop("chat_template", None)
    if isinstance(template, str):
        yield "chat_template.jinja", template.encode()
    yield "tokenizer_config.json", json_text({**described, "tokenizer_class": _TOKENIZER_CLASS})


def _generation_config(config: Any) -> dict[str, Any]:
    """What transformers makes of a config where a checkpoint has none, marked as such."""
    known = {name: config[name] for name in _TOKEN_IDS if config.get(name) is not None}
    return {"_from_model_config": True, **known, **_GENERATION_DEFAULTS}
