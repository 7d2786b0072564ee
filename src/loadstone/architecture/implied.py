"""Configs that no config.json states, those of GGUF headers and of Meta's params.json, and bare vocabularies."""

from __future__ import annotations

from dataclasses import replace

from loadstone.checkpoint.values import Checkpoint, Format


def with_config(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the config that its own headers imply, in the words of config.json.

    Raises:
        ConfigError: what they say makes no config.
        UnsupportedFormat: a variant that transformers' class has no room for.
    """
    # What reads the other formats brings numpy: a tenth of a second that a folder with a config.json need not wait.
    if checkpoint.format is Format.GGUF:
        from loadstone.architecture.gguf import config_from_metadata

        return replace(checkpoint, config=config_from_metadata(checkpoint))
    if checkpoint.config is None and checkpoint.params is not None:
        from loadstone.architecture.meta_llama import config_from_params

        return replace(checkpoint, config=config_from_params(checkpoint))
    return checkpoint


def with_vocabulary(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with what the bare tokenizer.model of Meta's layout says, as a GGUF header says it in metadata.

    Raises:
        InvalidHeader: that file cannot be read.
    """
    if checkpoint.params is None:
        return checkpoint
    from loadstone.architecture.meta_tokenizer import bare_vocabulary, tokenizer_metadata

    path = bare_vocabulary(checkpoint.root)
    if path is None:
        return checkpoint
    return replace(checkpoint, metadata={**checkpoint.metadata, **tokenizer_metadata(path)})
