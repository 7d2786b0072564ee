"""What tells a checkpoint and a machine from others."""

from __future__ import annotations

from hashlib import blake2b

from loadstone.checkpoint.values import Checkpoint
from loadstone.hardware.spec import Machine
from loadstone.plan.values import Identity


def identity(checkpoint: Checkpoint, machine: Machine, source: str) -> Identity:
    """What tells later whether a plan still belongs to a checkpoint and a machine."""
    lines = "\n".join(
        f"{info.name} {info.encoding or info.dtype} {info.shape} {info.file.name} {info.offset}"
        for info in checkpoint.tensors.values()
    )
    names = (checkpoint.config or {}).get("architectures")
    return Identity(
        source=source,
        architecture=str(names[0]) if isinstance(names, list) and names else "",
        num_tensors=len(checkpoint.tensors),
        stored_bytes=checkpoint.nbytes,
        digest=blake2b(lines.encode(), digest_size=16).hexdigest(),
        machine={device.id: device.total_bytes for device in machine.devices},
    )
