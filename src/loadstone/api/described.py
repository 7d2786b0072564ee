"""A checkpoint as plans and loads see it: its tensors as torch has them, its config checked against them."""

from __future__ import annotations

from loadstone.architecture.implied import with_config
from loadstone.checkpoint.packed import in_torch_pairs
from loadstone.checkpoint.values import Checkpoint
from loadstone.plan.choose import check_counts


def described(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the config that its own headers imply, and its four-bit tensors in pairs.

    Raises:
        ConfigError: what the headers say makes no config, or the config asks for more parts than there are tensors.
        UnsupportedFormat: a variant that transformers' class has no room for.
        UnsupportedDtype: four-bit elements that make no pairs.
    """
    checkpoint = with_config(in_torch_pairs(checkpoint))
    check_counts(checkpoint.config or {}, checkpoint)
    return checkpoint
