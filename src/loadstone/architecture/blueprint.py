"""What a load needs to know of a module class, whoever wrote it: one Protocol, met by each kind of class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from loadstone.architecture.keymap import KeyMap
from loadstone.architecture.skeleton import Slot
from loadstone.checkpoint.values import Checkpoint

Source = Callable[[str], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a key map is made between.

    Attributes:
        checkpoint: the tensors there are.
        slots: the module's places, by fqn.
        dtypes: torch's name of the dtype each place is loaded in, by fqn; None for "as stored".
        source: gives a checkpoint tensor, as a view of the file where possible.
    """

    checkpoint: Checkpoint
    slots: Mapping[str, Slot]
    dtypes: Mapping[str, str | None]
    source: Source


class Blueprint(Protocol):
    """A module class: how it is built, what fills it, and what must happen once it is filled."""

    @property
    def name(self) -> str:
        """The name of the class."""

    @property
    def chosen_by(self) -> str:
        """Where the class came from, for the report."""

    @property
    def tolerates_unexpected(self) -> bool:
        """Whether tensors that nothing takes are left over by intent."""

    def build(self, dtype: torch.dtype) -> nn.Module:
        """The module, its parameters on meta."""

    def dtypes(self, module: nn.Module, slots: Mapping[str, Slot], dtype: str | None) -> dict[str, str | None]:
        """The dtype each place is loaded in, by fqn; None for "as stored"."""

    def map_keys(self, module: nn.Module, around: Surroundings) -> KeyMap:
        """Which tensors fill which places."""

    def expected_missing(self, module: nn.Module, missing: set[str]) -> set[str]:
        """Those of `missing` that are no fault."""

    def expected_unexpected(self, module: nn.Module, unexpected: set[str]) -> set[str]:
        """Those of `unexpected` that are no fault."""

    def place(self, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put loaded tensors into the module."""

    def finish(self, module: nn.Module, missing: set[str], device: torch.device) -> str:
        """Ties, buffers, missing tensors, eval mode; returns what was done, in a line."""
