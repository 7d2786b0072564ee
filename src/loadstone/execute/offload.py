"""A module that is already built: what stays goes to where it computes, the rest is streamed; and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from loadstone.architecture.keymap import Target
from loadstone.execute.attach import Attachment, attach_to
from loadstone.execute.divide import Part
from loadstone.execute.placeholder import StreamedParameter
from loadstone.execute.residency import Adopt, Residency
from loadstone.execute.streamed import Streamed
from loadstone.execute.values import NUM_SLOTS
from loadstone.stream.sources import Source

Place = tuple[dict[str, Any], str]


class Supply(Protocol):
    """Where the parameters of one module come from that are not where they are computed."""

    def source(self, parameters: Mapping[str, nn.Parameter], targets: Mapping[str, Target]) -> Source:
        """The source of those that do not stay; called before anything is moved.

        Args:
            parameters: those that do not stay, by fqn.
            targets: what each parameter of the module must be where it is computed, by fqn.
        """

    def adopt(self, module: nn.Module) -> Adopt | None:
        """What has those that stay go too; None where they cannot. Called when they are where they stay.

        Args:
            module: whose parameters they are; not to be kept alive.
        """

    def close(self) -> None:
        """Nothing is read any more."""


@dataclass(slots=True)
class _Original:
    """What a parameter was before.

    Attributes:
        tensor: the parameter, while its memory is needed: as the master copy of what is streamed, or until the module
            is arranged; else None, and it is found in its places.
        places: the parameter dicts that hold it, with its name there.
        device: where it was.
        dtype: what it was in.
        requires_grad: whether it asked for gradients.
    """

    tensor: nn.Parameter | None
    places: tuple[Place, ...]
    device: torch.device
    dtype: torch.dtype
    requires_grad: bool


@dataclass(slots=True)
class Offloaded:
    """A module that was arranged anew, and how it was before.

    Attributes:
        residency: what keeps it running; it does nothing until it is asked where all of it stays.
    """

    _supply: Supply
    residency: Residency | None = None
    _originals: dict[str, _Original] = field(default_factory=dict)
    _buffers: list[tuple[dict[str, Any], str, torch.device]] = field(default_factory=list)

    def restore(self) -> None:
        """Have everything as it was: in memory, on its device, in its dtype, without hooks; but rounded, if it was."""
        if self.residency is not None and self.residency.is_parked:
            self.residency.change(lambda states: states.wake())
        found = [
            self._found(original) if original.tensor is None else original.tensor
            for original in self._originals.values()
        ]
        for original, parameter in zip(self._originals.values(), found, strict=True):
            if parameter is None:
                continue
            parameter.data = parameter.data.to(original.device, original.dtype)
            for owner, name in original.places:
                owner[name] = parameter
        for owner, name, device in self._buffers:
            owner[name] = owner[name].to(device)
        if self.residency is not None:
            self.residency.take_off_hooks()
            self.residency.close()
        self._supply.close()

    @torch.no_grad()
    def _found(self, original: _Original) -> nn.Parameter | None:
        """A parameter with its elements: where it stands, or read; None where somebody took it away."""
        owner, name = original.places[0]
        placeholder: nn.Parameter | None = owner.get(name)
        if not isinstance(placeholder, StreamedParameter):
            return placeholder
        if placeholder.lookup is not None:
            elements = placeholder.lookup(torch.arange(placeholder.shape[0]), torch.Tensor.clone)
        elif placeholder.lender is not None:
            elements = placeholder.lender.lend(
                placeholder.group, lambda: owner[name].detach().to(original.device, copy=True)
            )
        else:
            raise KeyError(placeholder.fqn)
        return nn.Parameter(elements, requires_grad=original.requires_grad)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """What goes where.

    Attributes:
        device: where the module computes.
        dtype: what floating-point parameters are computed in; None as they are.
        away: what does not stay.
        num_slots: how much of it is at hand at a time.
        gives_up: the parameters that do not stay are read from elsewhere, so that their memory is not needed.
    """

    device: torch.device
    dtype: str | None = None
    away: Sequence[Part] = ()
    num_slots: int = NUM_SLOTS
    gives_up: bool = False

    @property
    def units(self) -> dict[str, str]:
        """The unit of each parameter that does not stay, by fqn."""
        return {fqn: part.unit for part in self.away for fqn in part.fqns}

    def target(self, parameter: torch.Tensor) -> Target:
        """What a parameter must be where it is computed."""
        dtype = str(parameter.dtype).removeprefix("torch.")
        if self.dtype is not None and parameter.is_floating_point():
            dtype = self.dtype
        return Target(shape=tuple(parameter.shape), dtype=dtype)


def arranged(module: nn.Module, arrangement: Arrangement, supply: Supply) -> Offloaded:
    """Arrange a module anew.

    Args:
        module: complete, in memory.
        arrangement: what goes where.
        supply: where parameters come from.

    Returns:
        What undoes it.
    """
    done = Offloaded(supply)
    parameters = dict(module.named_parameters())
    places = _places(module)
    for fqn, parameter in parameters.items():
        done._originals[fqn] = _Original(
            tensor=parameter,
            places=tuple(places[id(parameter)]),
            device=parameter.device,
            dtype=parameter.dtype,
            requires_grad=parameter.requires_grad,
        )
    try:
        _move(module, done, arrangement, supply)
    except BaseException:
        done.restore()
        raise
    for fqn in parameters if arrangement.gives_up else parameters.keys() - arrangement.units.keys():
        done._originals[fqn].tensor = None
    return done


def _move(module: nn.Module, done: Offloaded, arrangement: Arrangement, supply: Supply) -> None:
    """Carry an arrangement out; what was done can be restored at any point."""
    parameters, away = dict(module.named_parameters()), arrangement.units
    targets = {fqn: arrangement.target(parameter) for fqn, parameter in parameters.items()}
    source = supply.source({fqn: parameters[fqn] for fqn in away}, targets)
    for fqn, parameter in parameters.items():
        if fqn not in away:
            parameter.data = parameter.data.to(arrangement.device, getattr(torch, targets[fqn].dtype))
    done._buffers += _move_buffers(module, arrangement.device)
    streamed = Streamed(device=arrangement.device)
    for fqn, unit in away.items():
        original = done._originals[fqn]
        stand_in = streamed.stand_in(unit, fqn, targets[fqn])
        standing = nn.Parameter(stand_in, requires_grad=original.requires_grad)
        for owner, name in original.places:
            owner[name] = standing
    done.residency = attach_to(module, streamed, source, Attachment(arrangement.num_slots, adopt=supply.adopt(module)))
    if away:
        done.residency.start()


def _places(module: nn.Module) -> dict[int, list[Place]]:
    """Where each parameter stands, by identity; a tied one stands in several places."""
    found: dict[int, list[Place]] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((owner._parameters, name))
    return found


def _move_buffers(module: nn.Module, device: torch.device) -> Iterator[tuple[dict[str, Any], str, torch.device]]:
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.device != device:
                owner._buffers[name] = buffer.to(device)
                yield owner._buffers, name, buffer.device
