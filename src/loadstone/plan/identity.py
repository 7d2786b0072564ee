"""What tells a checkpoint and a machine from others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

from loadstone.checkpoint.values import Checkpoint, TensorInfo
from loadstone.hardware.spec import Machine
from loadstone.plan.values import Identity


def identity(checkpoint: Checkpoint, machine: Machine, source: str) -> Identity:
    """What tells later whether a plan still belongs to a checkpoint and a machine."""
    lines = "\n".join(_lines(checkpoint.tensors.values()))
    names = (checkpoint.config or {}).get("architectures")
    return Identity(
        source=source,
        architecture=str(names[0]) if isinstance(names, list) and names else "",
        num_tensors=len(checkpoint.tensors),
        stored_bytes=checkpoint.nbytes,
        digest=blake2b(lines.encode(), digest_size=16).hexdigest(),
        machine={device.id: device.total_bytes for device in machine.devices},
    )


def _lines(infos: Iterable[TensorInfo]) -> Iterator[str]:
    file, name = Path(), ""
    shapes: dict[tuple[int, ...], str] = {}
    for info in infos:
        if info.file is not file:  # a path works its name out each time
            file, name = info.file, info.file.name
        shape = shapes.get(info.shape) or shapes.setdefault(info.shape, str(info.shape))
        yield f"{info.name} {info.encoding or info.dtype} {shape} {name} {info.offset}"
