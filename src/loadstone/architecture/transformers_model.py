"""A transformers model class as a blueprint: how it is built, filled and finished."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from loadstone.architecture import transformers as bridge
from loadstone.architecture.blueprint import Surroundings
from loadstone.architecture.gguf import assignments_of, tensor_targets
from loadstone.architecture.keymap import KeyMap
from loadstone.architecture.meta_llama import map_meta_keys
from loadstone.architecture.skeleton import Slot, replace_tensors
from loadstone.architecture.transformers_keymap import map_keys
from loadstone.checkpoint.values import Checkpoint, Format


@dataclass(slots=True)
class TransformersModel:
    """The blueprint of a model that transformers knows.

    Attributes:
        described: its class and config.
        tolerates_unexpected: the caller named another class than the checkpoint's own, so that tensors of the
            checkpoint's head are left over by intent.
    """

    described: bridge.Described
    tolerates_unexpected: bool = False

    @property
    def name(self) -> str:
        """The name of the class."""
        return str(self.described.model_class.__name__)

    @property
    def chosen_by(self) -> str:
        """Where the class came from."""
        return self.described.chosen_by

    def build(self, dtype: torch.dtype) -> nn.Module:
        """The model on meta."""
        return bridge.build(self.described, dtype)

    def dtypes(self, module: nn.Module, slots: Mapping[str, Slot], dtype: str | None) -> dict[str, str | None]:
        """The dtype transformers loads each place in; some classes keep routers, `A_log` or sinks in float32.

        What the class built in another dtype stays in that.
        """
        kept = bridge.kept_dtypes(module, getattr(torch, dtype or "float32"), slots)
        return {fqn: kept.get(fqn, slot.dtype) for fqn, slot in slots.items()}

    def map_keys(self, module: nn.Module, around: Surroundings) -> KeyMap:
        """transformers' conversion mapping, or the names of GGUF or of Meta's layout."""
        if around.checkpoint.format is Format.GGUF:
            return _gguf_keys(around.checkpoint, around.slots)
        if around.checkpoint.params is not None:
            return map_meta_keys(around.checkpoint, {name: slot.shape for name, slot in around.slots.items()})
        return map_keys(module, around)

    def expected_missing(self, module: nn.Module, missing: set[str]) -> set[str]:
        """Tied to what is there, or computed by the class."""
        return bridge.expected_missing(module, missing)

    def expected_unexpected(self, module: nn.Module, unexpected: set[str]) -> set[str]:
        """Leftovers of older versions that the class knows."""
        return bridge.expected_unexpected(module, unexpected)

    def place(self, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put the tensors in; ties are made by `finish`."""
        replace_tensors(module, tensors)

    def finish(self, module: nn.Module, missing: set[str], device: torch.device) -> str:
        """Buffers, ties, missing tensors, eval mode, as the class does it."""
        bridge.finish(module, missing, device)
        ties: Mapping[str, str] = getattr(module, "all_tied_weights_keys", {})
        tied = ", ".join(f"{target} = {source}" for target, source in list(ties.items())[:3])
        return f"tied: {tied}" + (f" and {len(ties) - 3} more" if len(ties) > 3 else "") if ties else "no ties"


def _gguf_keys(checkpoint: Checkpoint, slots: Mapping[str, Slot]) -> KeyMap:
    targets = tensor_targets(checkpoint, checkpoint.config or {})
    known = {name: target for name, target in targets.items() if target.name in slots}
    left_out = [name for name in checkpoint.tensors if name not in targets]
    return KeyMap(
        assignments=assignments_of(checkpoint, known),
        unexpected=tuple(name for name in targets if name not in known),
        notes=(f"{len(left_out)} tensors are in the config instead: {', '.join(left_out[:3])}",) if left_out else (),
    )
