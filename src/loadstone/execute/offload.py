"""A module that is already built: what stays goes to where it computes, the rest is streamed; and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from loadstone.architecture.keymap import Target
from loadstone.execute.attach import Attachment, attach_to
from loadstone.execute.divide import Part
from loadstone.execute.placeholder import StreamedParameter
from loadstone.execute.residency import Residency
from loadstone.execute.streamed import Streamed
from loadstone.stream.sources import Source

Place = tuple[dict[str, Any], str]
MakeSource = Callable[[Mapping[str, nn.Parameter], Mapping[str, Target]], Source]


@dataclass(slots=True)
class _Original:
    """What a parameter was before.

    Attributes:
        tensor: the parameter; None where it was given up, because it can be read.
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
        residency: what keeps it running; None where all of it stays.
    """

    residency: Residency | None = None
    _originals: dict[str, _Original] = field(default_factory=dict)
    _buffers: list[tuple[dict[str, Any], str, torch.device]] = field(default_factory=list)
    _on_close: list[Callable[[], None]] = field(default_factory=list)

    def restore(self) -> None:
        """Have everything as it was: in memory, on its device, in its dtype, without hooks; but rounded, if it was."""
        found = {
            fqn: self._read(fqn) if original.tensor is None else original.tensor
            for fqn, original in self._originals.items()
        }
        for fqn, original in self._originals.items():
            parameter = found[fqn]
            parameter.data = parameter.data.to(original.device, original.dtype)
            for owner, name in original.places:
                owner[name] = parameter
        for owner, name, device in self._buffers:
            owner[name] = owner[name].to(device)
        if self.residency is not None:
            self.residency.take_off_hooks()
            self.residency.close()
        for close in self._on_close:
            close()
        self._on_close.clear()

    @torch.no_grad()
    def _read(self, fqn: str) -> nn.Parameter:
        """A streamed parameter with its elements."""
        original = self._originals[fqn]
        owner, name = original.places[0]
        placeholder: StreamedParameter = owner[name]
        if placeholder.lookup is not None:
            elements = placeholder.lookup(torch.arange(placeholder.shape[0]), torch.Tensor.clone)
        elif placeholder.lender is not None:
            elements = placeholder.lender.lend(
                placeholder.group, lambda: owner[name].detach().to(original.device, copy=True)
            )
        else:
            raise KeyError(fqn)
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
    num_slots: int = 2
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


def arranged(
    module: nn.Module, arrangement: Arrangement, make_source: MakeSource, *on_close: Callable[[], None]
) -> Offloaded:
    """Arrange a module anew.

    Args:
        module: complete, in memory.
        arrangement: what goes where.
        make_source: gives the source of the parameters that do not stay, from them and from what they must be.
        on_close: called when nothing is read any more.

    Returns:
        What undoes it.
    """
    done = Offloaded(_on_close=list(on_close))
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
        _move(module, done, arrangement, make_source)
    except BaseException:
        done.restore()
        raise
    if arrangement.gives_up:
        for fqn in arrangement.units:
            done._originals[fqn].tensor = None
    return done


def _move(module: nn.Module, done: Offloaded, arrangement: Arrangement, make_source: MakeSource) -> None:
    """Carry an arrangement out; what was done can be restored at any point."""
    parameters, away = dict(module.named_parameters()), arrangement.units
    targets = {fqn: arrangement.target(parameter) for fqn, parameter in parameters.items()}
    source = make_source({fqn: parameters[fqn] for fqn in away}, targets) if away else None
    for fqn, parameter in parameters.items():
        if fqn not in away:
            parameter.data = parameter.data.to(arrangement.device, getattr(torch, targets[fqn].dtype))
    done._buffers += _move_buffers(module, arrangement.device)
    if source is None:
        return
    streamed = Streamed(device=arrangement.device)
    for fqn, unit in away.items():
        original = done._originals[fqn]
        stand_in = streamed.stand_in(unit, fqn, targets[fqn])
        standing = nn.Parameter(stand_in, requires_grad=original.requires_grad)
        for owner, name in original.places:
            owner[name] = standing
    done.residency = attach_to(module, streamed, source, Attachment(arrangement.num_slots))
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
