"""Any `nn.Module` class: built on meta, its keys renamed and converted by what the caller gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loadstone.architecture.blueprint import Source, Surroundings
from loadstone.architecture.keymap import Assignment, Conversion, KeyMap, Part, RenameRules, compile_rename
from loadstone.architecture.skeleton import ModuleFactory, Slot, build, find_owner, replace_tensors
from loadstone.errors import CheckpointMismatch

Converter = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


class LazyState(Mapping[str, torch.Tensor]):
    """The checkpoint as a state dict whose tensors are made when they are asked for.

    A plain tensor is a view of the file, of which the disk is read only where it is touched; what a converter hands
    through untouched is recognised by identity and loaded like any other tensor.
    """

    def __init__(self, names: Mapping[str, str], source: Source) -> None:
        self._names = names
        self._source = source
        self._given: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._given:
            self._given[name] = self._source(self._names[name])
        return self._given[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def origins(self) -> dict[int, str]:
        """The checkpoint name of every tensor that was given out, by identity."""
        return {id(tensor): self._names[name] for name, tensor in self._given.items()}


@dataclass(slots=True)
class PlainModule:
    """The blueprint of a module class of the caller's.

    Attributes:
        factory: the class, or a function that returns a module.
        config: its keyword arguments.
        rename: rules from checkpoint names to the module's.
        convert: takes the (renamed) checkpoint lazily, gives the state dict.
    """

    factory: ModuleFactory
    config: Mapping[str, Any] | None = None
    rename: RenameRules | None = None
    convert: Converter | None = None

    @property
    def name(self) -> str:
        """The name of the class or function."""
        return getattr(self.factory, "__qualname__", repr(self.factory))

    @property
    def chosen_by(self) -> str:
        """Where the class came from."""
        return "into="

    @property
    def tolerates_unexpected(self) -> bool:
        """Left-over tensors are a fault: a rule or a converter can drop them."""
        return False

    def build(self, dtype: torch.dtype) -> nn.Module:
        """The module on meta; `dtype` does not matter to it, parameters take theirs from what is loaded."""
        return build(self.factory, self.config)

    def dtypes(self, module: nn.Module, slots: Mapping[str, Slot], dtype: str | None) -> dict[str, str | None]:
        """Buffers keep the class's dtype; floating-point parameters become `dtype`, or stay as stored (None)."""
        return {
            fqn: slot.dtype if slot.is_buffer or not getattr(torch, slot.dtype).is_floating_point else dtype
            for fqn, slot in slots.items()
        }

    def map_keys(self, module: nn.Module, around: Surroundings) -> KeyMap:
        """Rename, convert and match the checkpoint's names."""
        rename = compile_rename(self.rename)
        names: dict[str, str] = {}
        for name in around.checkpoint.tensors:
            renamed = rename(name)
            if renamed in names:
                raise CheckpointMismatch(
                    f"rename= gives {renamed} to both {names[renamed]} and {name}; each name must stay one."
                )
            names[renamed] = name
        if self.convert is None:
            return _matched({fqn: Part(source=name) for fqn, name in names.items()}, {}, around.slots)
        state = LazyState(names, around.source)
        made = self.convert(state)
        origins = state.origins()
        parts, computed = {}, {}
        for fqn, tensor in made.items():
            if id(tensor) in origins:
                parts[fqn] = Part(source=origins[id(tensor)])
            else:
                computed[fqn] = tensor
        return _matched(parts, computed, around.slots)

    def expected_missing(self, module: nn.Module, missing: set[str]) -> set[str]:
        """Names tied to one that is there."""
        groups: dict[int, set[str]] = {}
        for fqn, tensor in module.state_dict(keep_vars=True).items():
            groups.setdefault(id(tensor), set()).add(fqn)
        return {fqn for group in groups.values() if group - missing for fqn in group & missing}

    def expected_unexpected(self, module: nn.Module, unexpected: set[str]) -> set[str]:
        """None: nothing is known of the class."""
        return set()

    def place(self, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put the tensors in, each tied place once with one and the same parameter."""
        groups: dict[int, list[str]] = {}
        placed: dict[str, torch.Tensor] = {}
        state = module.state_dict(keep_vars=True)
        for fqn, tensor in state.items():
            groups.setdefault(id(tensor), []).append(fqn)
        for group in groups.values():
            found = next((tensors[fqn] for fqn in group if fqn in tensors), None)
            if found is None:
                continue
            old = state[group[0]]
            if isinstance(old, nn.Parameter):
                found = nn.Parameter(found, requires_grad=old.requires_grad and found.is_floating_point())
            placed.update(dict.fromkeys(group, found))
        replace_tensors(module, placed)

    def finish(self, module: nn.Module, missing: set[str], device: torch.device) -> str:
        """Give missing tensors the value the constructor gives them, move buffers, set eval mode."""
        drawn: nn.Module | None = None
        placed: dict[str, torch.Tensor] = {}
        for fqn in sorted(missing - self.expected_missing(module, missing)):
            owner, name = find_owner(module, fqn)
            if getattr(owner, name).is_meta:
                drawn = drawn or self.factory(**dict(self.config or {}))
                placed[fqn] = drawn.state_dict(keep_vars=True)[fqn].detach().to(device)
        replace_tensors(module, placed)
        buffers = dict(module.named_buffers(remove_duplicate=False))
        for fqn, buffer in buffers.items():
            if buffer.is_meta:
                raise CheckpointMismatch(
                    f"{self.name}: the buffer {fqn} is drawn at random in the constructor and is not in the "
                    "checkpoint, so its value cannot be known; make it persistent, or compute it from the config."
                )
        replace_tensors(module, {fqn: buffer.to(device) for fqn, buffer in buffers.items() if buffer.device != device})
        module.eval()
        return "eval mode"


def _matched(parts: Mapping[str, Part], computed: Mapping[str, torch.Tensor], slots: Mapping[str, Slot]) -> KeyMap:
    return KeyMap(
        assignments=tuple(Assignment(target=fqn, parts=(part,)) for fqn, part in parts.items() if fqn in slots),
        conversions=tuple(
            Conversion(name=fqn, sources=(), dtypes=(), run=_constant(fqn, tensor))
            for fqn, tensor in computed.items()
            if fqn in slots
        ),
        unexpected=tuple(fqn for fqn in (*parts, *computed) if fqn not in slots),
    )


def _constant(fqn: str, tensor: torch.Tensor) -> Callable[[Any], dict[str, torch.Tensor]]:
    return lambda _: {fqn: tensor}
