"""Indexes of sharded checkpoints: model.safetensors.index.json and pytorch_model.bin.index.json.

Source: https://huggingface.co/docs/transformers/big_models#sharded-checkpoints
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadstone.checkpoint.files import read_json_object
from loadstone.checkpoint.values import TensorInfo
from loadstone.errors import InvalidIndex, MissingShard
from loadstone.units import format_name

# Half a million tensors; the largest published checkpoints have 200,000.
MAX_INDEX_BYTES = 64_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """What an index says.

    Attributes:
        path: of the index itself.
        shards: tensor names by shard, shards in the order of their names.
        metadata: as the index has it, `total_size` mostly.
    """

    path: Path
    shards: Mapping[str, frozenset[str]]
    metadata: Mapping[str, Any]

    @property
    def files(self) -> tuple[Path, ...]:
        """The paths of the shards."""
        return tuple(self.path.parent / shard for shard in self.shards)

    @property
    def num_tensors(self) -> int:
        """How many tensors it names."""
        return sum(map(len, self.shards.values()))

    def missing(self) -> tuple[str, ...]:
        """The shards that are not there."""
        folder = os.fspath(self.path.parent)
        return tuple(shard for shard in self.shards if not os.path.isfile(os.path.join(folder, shard)))  # noqa: PTH113, PTH118


def read_index(path: Path) -> Index:
    """Read and check an index; the shards themselves are not looked at.

    Raises:
        InvalidIndex: it is not an index, or names a file outside its folder.
    """
    content = read_json_object(path, max_bytes=MAX_INDEX_BYTES, fault=InvalidIndex)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidIndex(f"{path}: expected a weight_map from tensors to files, found none; download it again.")
    by_shard: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        try:
            by_shard[shard].add(name)
        except KeyError:
            by_shard[shard] = {name}
        except TypeError:
            raise InvalidIndex(
                f"{path}, tensor {format_name(name)}: expected the name of a file, found none."
            ) from None
    for shard in by_shard:
        _check_shard_name(path, shard)
    metadata = content.get("metadata")
    return Index(
        path=path,
        shards={shard: frozenset(by_shard[shard]) for shard in sorted(by_shard)},
        metadata=metadata if isinstance(metadata, dict) else {},
    )


def check_present(index: Index) -> None:
    """Check that every shard is there.

    Raises:
        MissingShard: one or several are not.
    """
    missing = index.missing()
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MissingShard(
            f"{index.path.parent}: expected the {len(index.shards)} files that {index.path.name} names, did not find "
            f"{missing[0][:200]}{more}; download what is missing."
        )


def honour(index: Index, shard: str, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Keep the tensors of a shard that the index assigns to it.

    Raises:
        InvalidIndex: the shard lacks one of them.
    """
    wanted = index.shards[shard]
    if len(wanted) == len(tensors) and wanted == tensors.keys():
        return dict(tensors)
    missing = sorted(wanted - tensors.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InvalidIndex(
            f"{index.path}: expected tensor {format_name(missing[0])}{more} in {shard[:100]}, found {len(tensors)} "
            "other tensors there; the index and its files are of different versions: download both again."
        )
    return {name: info for name, info in tensors.items() if name in wanted}


def _check_shard_name(path: Path, shard: Any) -> None:
    if not isinstance(shard, str):
        raise InvalidIndex(f"{path}: expected names of files in weight_map, found a {type(shard).__name__}.")
    # Both separators on every system: an index is written on one and read on another.
    parts = shard.replace("\\", "/").split("/")
    if not shard or "\0" in shard or any(part in {"", ".", ".."} for part in parts) or ":" in parts[0]:
        raise InvalidIndex(
            f"{path}: expected names of files in its own folder, found {format_name(shard)}; do not trust this "
            "checkpoint."
        )
