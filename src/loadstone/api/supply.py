"""Where `offload` has parameters come from: host memory, the files they were loaded from, or a file of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from loadstone.architecture.keymap import Target
from loadstone.checkpoint.cache import cache_folder
from loadstone.checkpoint.values import Checkpoint, Format
from loadstone.execute.adopt import Origin, adopting, shelving, spilling
from loadstone.execute.kept import Home
from loadstone.execute.residency import Adopt
from loadstone.stream.memory_source import MemorySource
from loadstone.stream.refill import can_refill
from loadstone.stream.sources import FileSource, Source
from loadstone.stream.spill import Spill, wanted_from
from loadstone.stream.unchanged import are_in_files
from loadstone.stream.way import Way

Parameters = Mapping[str, nn.Parameter]
Targets = Mapping[str, Target]


class MemorySupply:
    """Host memory, where parameters remain the master copy.

    Args:
        way: how they travel.
    """

    def __init__(self, way: Way) -> None:
        self._way = way
        self._source: MemorySource | None = None

    def source(self, parameters: Parameters, targets: Targets) -> Source:
        """The parameters themselves."""

        def moved(fqn: str, tensor: torch.Tensor) -> None:
            parameters[fqn].data = tensor

        self._source = MemorySource(tensors=parameters, targets=targets, way=self._way, moved=moved)
        return self._source

    def adopt(self, module: nn.Module) -> Adopt | None:
        """What stays goes to host memory, unless it is there."""
        if self._source is None or self._way.destination.is_host:
            return None
        return shelving(module, self._source)

    def close(self) -> None:
        """Memory need not be closed."""


class DiskSupply:
    """The files that parameters were loaded from, if they are still the same; else a file without a name.

    Args:
        way: how they travel.
        origin: where the module was loaded from, if it was.
        is_fresh: nobody can have changed it since.
    """

    def __init__(self, way: Way, origin: Origin | None, *, is_fresh: bool) -> None:
        self._way = way
        self._origin = origin
        self._is_fresh = is_fresh
        self._staying: dict[str, Home] = {}
        self._unchanged: list[str] = []
        self._source: FileSource | None = None
        self._spills: list[Spill] = []

    def source(self, parameters: Parameters, targets: Targets) -> Source:
        """The files of all of them, or a file of their own."""
        origin = self._origin = self._still_true(parameters, targets)
        if origin is None:
            checkpoint = self._spilled(parameters)
            self._source = FileSource(wanted_from(checkpoint, targets), checkpoint, self._way)
        else:
            # What has another name by now, as adapters give it, is wanted by none and cannot leave.
            homes = origin.homes.items()
            self._staying = {fqn: home for fqn, home in homes if fqn in origin.wanted and fqn not in parameters}
            # They may be moved from now on, which is no change of what they hold.
            self._unchanged = [fqn for fqn, home in self._staying.items() if home.is_unchanged(home.parameter())]
            self._source = FileSource({fqn: origin.wanted[fqn] for fqn in parameters}, origin.checkpoint, self._way)
        return self._source

    def adopt(self, module: nn.Module) -> Adopt | None:
        """What stays can be read from the same files too, or is written to one of its own when it goes."""
        if self._source is None:
            return None
        if self._origin is None:
            return spilling(module, self._source, self._spilled)
        there = {fqn: self._staying[fqn].parameter() for fqn in self._unchanged}
        moved = {fqn: Home.of(parameter) for fqn, parameter in there.items() if parameter is not None}
        return adopting(module, replace(self._origin, homes={**self._staying, **moved}), self._source)

    def close(self) -> None:
        """A file without a name ends with this."""
        for spill in self._spills:
            spill.close()

    def _still_true(self, parameters: Parameters, targets: Targets) -> Origin | None:
        """Where the module was loaded from, if that is where these parameters can be read."""
        origin = self._origin
        if origin is None or not set(parameters) <= set(origin.wanted):
            return None
        found = {fqn: origin.wanted[fqn] for fqn in parameters}
        if self._is_fresh:
            is_same = all(can_refill(one, origin.checkpoint.tensors) for one in found.values())
        else:
            is_same = are_in_files(parameters, found, origin.checkpoint)
        if not is_same:
            return None
        wanted = {fqn: replace(one, target=targets[fqn]) for fqn, one in origin.wanted.items() if fqn in targets}
        return replace(origin, wanted=wanted)

    def _spilled(self, parameters: Mapping[str, torch.Tensor]) -> Checkpoint:
        """A file of their own; none for none."""
        folder = cache_folder() / "offload"
        if not parameters:
            return Checkpoint(format=Format.SAFETENSORS, root=folder, files=(), tensors={})
        self._spills.append(Spill(folder))
        for fqn, parameter in parameters.items():
            self._spills[-1].add(fqn, parameter)
        return self._spills[-1].finish()
