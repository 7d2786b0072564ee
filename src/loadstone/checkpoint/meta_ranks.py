"""Checkpoints that were saved by the ranks of model parallelism: each file holds a slice of every matrix.

Source: https://github.com/meta-llama/llama/blob/main/llama/generation.py (`build`: a file for each rank)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from loadstone.checkpoint.layout import META_NAME
from loadstone.checkpoint.values import TensorInfo
from loadstone.errors import InvalidHeader

_MARK = "#"


def are_ranks(paths: Sequence[Path]) -> bool:
    """Whether these files are the ranks of one model."""
    matches = [META_NAME.fullmatch(path.name) for path in paths]
    return len(paths) > 1 and all(match is not None and match["rank"] for match in matches)


def join_ranks(ranks: Sequence[Mapping[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """The tensors of all ranks: slices are told apart by their rank, what every rank has whole is taken once.

    Args:
        ranks: the tensors of each file, by name, in the order of the ranks.

    Returns:
        By name, `layers.0.attention.wq.weight#1` for the slice of rank 1.

    Raises:
        InvalidHeader: the files do not hold tensors of the same names.
    """
    first = ranks[0]
    for tensors in ranks[1:]:
        if differing := sorted(first.keys() ^ tensors.keys()):
            there = next(iter((tensors if differing[0] in tensors else first).values())).file
            raise InvalidHeader(
                f"{there.parent}: expected the same tensors in each of its {len(ranks)} files, found {differing[0]!r} "
                f"in {there.name} and not in all; the files belong to different models: download them again."
            )
    joined: dict[str, TensorInfo] = {}
    for rank, tensors in enumerate(ranks):
        for name, info in tensors.items():
            # Norms and rotary frequencies are vectors, and the same everywhere.
            if len(info.shape) > 1:
                sliced = f"{name}{_MARK}{rank}"
                joined[sliced] = replace(info, name=sliced)
            elif rank == 0:
                joined[name] = info
    return joined


def name_and_rank(name: str) -> tuple[str, int]:
    """The name of the whole tensor, and the rank whose slice this is."""
    whole, mark, rank = name.rpartition(_MARK)
    return (whole, int(rank)) if mark and rank.isdecimal() else (name, 0)
