"""Units that are read to where they are kept: host memory that a device fetches from, or the device's own."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import torch

from loadstone.stream.destination import Destination
from loadstone.stream.filler import Filler, Filling
from loadstone.stream.from_memory import Home, packed
from loadstone.stream.way import Keep

# How many are on their way at a time: many units are smaller than what a disk is best asked for.
_NUM_AHEAD = 8


def brought_home(inner: Filler, kept: Mapping[str, Keep], destination: Destination) -> dict[str, Home]:
    """Read units.

    Args:
        inner: fills host memory with them.
        kept: where each of them is to be kept, none of them on the disk.
        destination: the device that computes.

    Returns:
        Their homes by name; none where one of them cannot be read.
    """
    near = [name for name, keep in kept.items() if keep is Keep.NEAR]
    homes = _on_host(inner, [name for name, keep in kept.items() if keep is Keep.HOST], destination)
    # One after another through the same memory.
    memory = inner.slot(max((inner.layout(name).nbytes for name in near), default=1))
    try:
        for name in near:
            inner.fill(name, memory).wait()
            inner.check(name)
            layout = inner.layout(name)
            homes[name] = packed(layout.tensors(memory), layout, destination.slot(layout.nbytes), is_near=True)
    except BaseException:
        for home in homes.values():
            if home.whole is not None and not home.is_near:
                destination.link.unlock(home.whole.numpy())
        raise
    finally:
        inner.forget(memory)
    return {name: homes[name] for name in kept}


def _on_host(inner: Filler, names: list[str], destination: Destination) -> dict[str, Home]:
    """Straight into memory that is locked for the device."""
    homes: dict[str, Home] = {}
    coming: deque[tuple[str, Filling]] = deque()
    memories: dict[str, torch.Tensor] = {}

    def arrive() -> None:
        name, filling = coming[0]
        filling.wait()
        inner.check(name)
        coming.popleft()
        inner.forget(memories[name])
        layout = inner.layout(name)
        homes[name] = Home(tensors=layout.tensors(memories[name]), whole=memories[name], places=layout.places)

    try:
        for name in names:
            memories[name] = torch.from_numpy(destination.link.locked(inner.layout(name).nbytes))
            coming.append((name, inner.fill(name, memories[name])))
            if len(coming) == _NUM_AHEAD:
                arrive()
        while coming:
            arrive()
    except BaseException:
        for name, filling in coming:
            filling.cancel()
            inner.forget(memories[name])
        for memory in memories.values():
            destination.link.unlock(memory.numpy())
        raise
    return homes
