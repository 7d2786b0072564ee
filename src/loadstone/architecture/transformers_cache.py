"""What transformers keeps between the passes of one text, and whether the last tokens can be taken back."""

from __future__ import annotations

from typing import Any


def keeps_every_token(cache: Any) -> bool:
    """Whether every layer of a cache holds the keys and values of all tokens: no windows, no states, no fixed size.

    Args:
        cache: what a model returned as `past_key_values`.
    """
    from transformers.cache_utils import DynamicLayer

    layers = getattr(cache, "layers", None) or ()
    return len(layers) > 0 and all(type(layer) is DynamicLayer for layer in layers)


def take_back(cache: Any, num_tokens: int) -> bool:
    """Forget the last tokens.

    Args:
        cache: what a model returned as `past_key_values`.
        num_tokens: how many.

    Returns:
        Whether that could be done.
    """
    if not keeps_every_token(cache):
        return False
    cache.crop(-num_tokens)
    return True


def cut(cache: Any, num_tokens: int) -> None:
    """Have every layer keep its first tokens only, also where a pass that failed has left some longer than others.

    Args:
        cache: one that keeps every token.
        num_tokens: how many are kept.
    """
    for layer in cache.layers:
        layer.crop(min(0, num_tokens - layer.get_seq_length()))
