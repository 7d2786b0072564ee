"""Whether parameters in memory are still what the files hold that they came from, told byte by byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from loadstone.checkpoint.values import Checkpoint
from loadstone.stream.from_files import FromFiles
from loadstone.stream.refill import Refill, Wanted, can_refill


def are_in_files(parameters: Mapping[str, torch.Tensor], wanted: Mapping[str, Wanted], checkpoint: Checkpoint) -> bool:
    """Read each parameter once, and compare.

    A version counter would be cheaper and does not see what is written through `.data`.

    Args:
        parameters: by fqn.
        wanted: what they were loaded from, by fqn.
        checkpoint: where that lies.
    """
    as_they_are = {
        fqn: replace(
            one,
            target=replace(
                one.target,
                dtype=str(parameters[fqn].dtype).removeprefix("torch."),
                shape=tuple(parameters[fqn].shape),
            ),
        )
        for fqn, one in wanted.items()
    }
    if any(as_they_are[fqn].target.shape != one.target.shape for fqn, one in wanted.items()):
        return False
    if not all(can_refill(one, checkpoint.tensors) for one in as_they_are.values()):
        return False
    files = FromFiles(Refill({fqn: [one] for fqn, one in as_they_are.items()}, checkpoint))
    try:
        memory = files.slot(max((files.layout(fqn).nbytes for fqn in wanted), default=1))
        for fqn, parameter in parameters.items():
            files.fill(fqn, memory).wait()
            files.check(fqn)
            (read,) = files.layout(fqn).views(memory)
            if not torch.equal(_bytes(read), _bytes(parameter)):
                return False
    finally:
        files.close()
    return True


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
