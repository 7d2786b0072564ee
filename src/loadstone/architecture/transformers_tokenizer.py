"""Tokenizers: those of a checkpoint's folder, and those that a GGUF header describes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loadstone.architecture.gguf_tokenizer import tokenizer_config, tokenizer_json
from loadstone.architecture.meta_tokenizer import bare_vocabulary, tokenizer_metadata
from loadstone.checkpoint.files import open_regular
from loadstone.errors import InvalidHeader, NotACheckpoint
from loadstone.units import format_bytes

# The files that tokenizers are read from, and twice the largest of them in use.
_SUFFIXES = {".json", ".jinja", ".model", ".tiktoken", ".txt"}
_MAX_BYTES = 64_000_000


def load_tokenizer(root: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a folder, without the network.

    Args:
        root: the folder that holds tokenizer.json or its older forms.
        trust_remote_code: whether code that the checkpoint brings may run.

    Returns:
        The tokenizer.

    Raises:
        NotACheckpoint: transformers finds no tokenizer there.
        InvalidHeader: the bare tokenizer.model of Meta's layout cannot be read.
    """
    _check_files(root)
    if (vocabulary := bare_vocabulary(root)) is not None:
        return load_gguf_tokenizer(tokenizer_metadata(vocabulary))
    try:
        return AutoTokenizer.from_pretrained(root, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # what a damaged file makes of transformers and tokenizers has no common base
        reason = " ".join(str(error).split())
        raise NotACheckpoint(
            f"{root}: no tokenizer could be loaded ({reason[:300]}); put tokenizer.json there."
        ) from error


def _check_files(root: Path) -> None:
    """Refuse what transformers would wait for (a pipe), or read whole although it cannot be what its name says."""
    for path in root.iterdir():
        if path.suffix in _SUFFIXES and not path.name.endswith(".index.json") and not path.is_dir():
            with open_regular(path) as file:
                if file.nbytes > _MAX_BYTES:
                    raise NotACheckpoint(
                        f"{path}: expected at most {format_bytes(_MAX_BYTES)} of a tokenizer, found "
                        f"{format_bytes(file.nbytes)}; this is not the file its name says."
                    )


def load_gguf_tokenizer(metadata: Mapping[str, Any]) -> Any:
    """Build the tokenizer that a GGUF header describes.

    Args:
        metadata: all key-value pairs of the header.

    Returns:
        A fast tokenizer of transformers.

    Raises:
        UnsupportedFormat: a tokenizer model, or a way of splitting, that is not known.
        InvalidHeader: the metadata contradicts itself.
    """
    try:
        content = json.dumps(tokenizer_json(metadata), ensure_ascii=False, separators=(",", ":"))
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InvalidHeader(
            f"the tokenizer that the header describes contradicts itself ({type(error).__name__}: {str(error)[:120]}); "
            "convert the model again with a current llama.cpp."
        ) from error
    try:
        backend = Tokenizer.from_str(content)
    except Exception as error:  # the library raises bare Exceptions
        raise InvalidHeader(f"the tokenizer that the header describes is not consistent: {str(error)[:200]}") from error
    # The wrapper copies what it is given, by way of JSON: as long again as building it. Nobody else holds this one.
    vars(backend)["__deepcopy__"] = lambda memo: backend
    try:
        return PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer_config(metadata))
    finally:
        del vars(backend)["__deepcopy__"]
