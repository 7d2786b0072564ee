"""GGUF models in several files: `name-00001-of-00003.gguf` and so on, each with a header of its own.

Source: https://github.com/ggml-org/llama.cpp/tree/master/tools/gguf-split
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadstone.checkpoint.values import Checkpoint, TensorInfo
from loadstone.errors import InvalidHeader, MissingShard

MAX_SPLITS = 9999
_SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf")


def part_paths(path: Path, num_parts: int) -> list[Path]:
    """The files of a split model, in order.

    Args:
        path: any part of it.
        num_parts: how many there are, as its header says.

    Raises:
        InvalidHeader: its name is not that of a part.
        MissingShard: a part is not there.
    """
    named = _SPLIT_NAME.fullmatch(path.name)
    if named is None or int(named["count"]) != num_parts or num_parts > MAX_SPLITS:
        raise InvalidHeader(
            f"{path}: the header says that it is one of {num_parts} parts, but its name does not end in "
            f"-00001-of-{num_parts:05d}.gguf; give the parts the names that they were published under."
        )
    parts = [
        path.with_name(f"{named['stem']}-{index:05d}-of-{num_parts:05d}.gguf") for index in range(1, num_parts + 1)
    ]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise MissingShard(
            f"{path.parent}: {len(missing)} of {num_parts} parts are missing, the first is {missing[0]}; download them."
        )
    return parts


def join_parts(parts: Sequence[Checkpoint]) -> Checkpoint:
    """One checkpoint of all parts, checked against what their headers say.

    Raises:
        InvalidHeader: the parts do not belong together.
    """
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, Any] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise InvalidHeader(
                    f"{tensor.file}: tensor {name!r} is in {tensors[name].file.name} too; the parts belong to "
                    "different models, download them again."
                )
            tensors[name] = tensor
        metadata = {**part.metadata, **metadata}
    joined = replace(parts[0], files=tuple(part.files[0] for part in parts), tensors=tensors, metadata=metadata)
    _check(parts, joined)
    return joined


def _check(parts: Sequence[Checkpoint], joined: Checkpoint) -> None:
    """Compare what the parts say of themselves with what they are.

    Source: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-model-loader.cpp (LLM_KV_SPLIT_NO, ...)
    """
    for number, part in enumerate(parts):
        said = (part.metadata.get("split.no", number), part.metadata.get("split.count"))
        if said != (number, len(parts)):
            raise InvalidHeader(
                f"{part.files[0].path}: expected part {number} of {len(parts)}, counted from 0, as its name says, "
                f"found part {said[0]} of {said[1]} in its header; give the parts the names that they were published "
                "under."
            )
    promised = joined.metadata.get("split.tensors.count", len(joined.tensors))
    if promised != len(joined.tensors):
        raise InvalidHeader(
            f"{joined.files[0].path}: expected {promised} tensors in its {len(parts)} parts, as the header says, found "
            f"{len(joined.tensors)}; the parts belong to different models, download them again."
        )
