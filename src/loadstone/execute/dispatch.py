"""A model that lies on several devices: what a module is given follows it to where its parameters are.

Blocks hand on what they computed where they computed it. Every other module gives it to the main device, on which the
code between modules works; only the scores of a head, which are large, stay until the whole model gives its output back
to where its inputs came from. A tensor that many blocks are given (a mask, positions) travels once to each device.

The rule is accelerate's `dispatch_model`, but for modules that are no blocks, and for what travels once:
https://huggingface.co/docs/accelerate/concept_guides/big_model_inference
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from loadstone.execute.outside_graphs import outside_graphs
from loadstone.execute.placeholder import StreamedParameter

_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)

# The path and name of a parameter in a module.
_Place = tuple[str, str]

# What tensors are on other devices, as (their version, how to get it) by device, for as long as they live. A copy knows
# its original as well, so that what goes there and back is not copied twice.
_ELSEWHERE: WeakIdKeyDictionary = WeakIdKeyDictionary()
_Known = dict[torch.device, tuple[int, Callable[[], torch.Tensor | None]]]


@dataclass(frozen=True, slots=True)
class _Way:
    """Where the inputs of a module go.

    Attributes:
        device: where; not asked for where there is a parameter.
        parameter: the path and name, in the module, of a parameter whose device it is.
    """

    device: torch.device
    parameter: _Place | None = None

    def inputs(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Before a forward: what it is given, on its device."""
        # Looked up each time: whoever owns the model may have moved all of it.
        device = self.device if self.parameter is None else _found(module, self.parameter).device
        return moved(args, device), moved(kwargs, device)


class _Origins(threading.local):
    """Where the inputs of models came from whose forward this thread is in, by the identity of their module."""

    def __init__(self) -> None:
        self.of: dict[int, torch.device] = {}


_ORIGINS = _Origins()


def dispatch(module: nn.Module) -> torch.device | None:
    """Have the inputs of modules follow them to their devices.

    Buffers follow their modules, and so do parameters that one module has on several devices.

    Args:
        module: a model that is complete, its parameters where they are to compute.

    Returns:
        The main device; None where all of it lies on one, so that nothing was done.
    """
    if len(_devices(module)) < 2:
        return None
    main = _main_device(module)
    # What the model itself holds may be added to the scores of its head.
    holds = any(one is not None for one in (*module._parameters.values(), *module._buffers.values()))
    head = None if holds else getattr(module, "get_output_embeddings", lambda: None)()
    walk = _Walk(module, main, None if isinstance(head, nn.Embedding) else head)
    walk.around_blocks(module)
    module.register_forward_pre_hook(outside_graphs(partial(_begin, main)), prepend=True, with_kwargs=True)
    module.register_forward_hook(outside_graphs(_end))
    return main


class _Walk:
    """Puts hooks on the modules of one model.

    Args:
        module: all of it.
        main: the main device.
        head: the module whose output stays where it is computed.
    """

    def __init__(self, module: nn.Module, main: torch.device, head: nn.Module | None) -> None:
        self._main = main
        self._head = head
        self._seen: set[int] = set()
        self._owners: dict[int, list[tuple[dict[str, nn.Parameter | None], str]]] = {}
        for one in module.modules():
            for name, parameter in one._parameters.items():
                self._owners.setdefault(id(parameter), []).append((one._parameters, name))

    def around_blocks(self, module: nn.Module) -> None:
        """A module that is no block, nor in one: it computes where it is, and gives its output to the main device."""
        if self._knows(module):
            return
        devices = _devices(module)
        if isinstance(module, _NEVER_CALLED):
            self._below(module)
        elif len(devices) > 1 and not _is_one(module):
            self._gather(module, self._main)
            self._hook(module, _Way(self._main), self._main)
            self._below(module)
        elif devices:
            way = _way_to(module)
            self._gather_all(module, way.device)
            stays = way.device == self._main or module is self._head
            self._hook(module, way, None if stays else self._main)
        else:
            self._gather_all(module, self._main)

    def _below(self, module: nn.Module) -> None:
        """What a module is made of that lies on several devices."""
        # Lists of one length take turns (attention, norm, attention, ...): what is around their items adds them up.
        lengths = Counter(len(child) for child in module.children() if isinstance(child, _NEVER_CALLED))
        for child in module.children():
            if isinstance(child, _NEVER_CALLED):
                visit = self._block if lengths[len(child)] == 1 else self.around_blocks
                for one in child.children():
                    visit(one)
            elif isinstance(module, nn.Sequential):
                self._block(child)
            else:
                self.around_blocks(child)

    def _block(self, block: nn.Module) -> None:
        """A block: it hands on what it computed where it computed it."""
        if isinstance(block, _NEVER_CALLED) or not _devices(block):
            self.around_blocks(block)
        elif not self._knows(block):
            way = _way_to(block)
            self._hook(block, way, None)
            self._inside(block, way.device)

    def _inside(self, module: nn.Module, around: torch.device) -> None:
        """What is inside a block: parts that lie elsewhere give their output to where what is around them computes."""
        self._gather(module, around)
        for child in module.children():
            devices = _devices(child)
            if devices <= {around} or (_is_one(child) and len(devices) > 1):
                self._gather_all(child, around)
            elif len(devices) == 1 and not isinstance(child, _NEVER_CALLED):
                way = _way_to(child)
                self._gather_all(child, way.device)
                self._hook(child, way, around)
            else:
                self._inside(child, around)

    def _knows(self, module: nn.Module) -> bool:
        """Whether a module was met before, under another name."""
        was_met = id(module) in self._seen
        self._seen.add(id(module))
        return was_met

    def _gather(self, module: nn.Module, device: torch.device) -> None:
        """Have what a module itself holds on a device."""
        for parameter in tuple(module._parameters.values()):
            if parameter is not None and parameter.device != device and not isinstance(parameter, StreamedParameter):
                made = nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad)
                for owner, name in self._owners[id(parameter)]:
                    owner[name] = made
                self._owners[id(made)] = self._owners.pop(id(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)

    def _gather_all(self, module: nn.Module, device: torch.device) -> None:
        """Have all of a module on a device."""
        for one in module.modules():
            self._gather(one, device)

    @staticmethod
    def _hook(module: nn.Module, way: _Way, output: torch.device | None) -> None:
        module.register_forward_pre_hook(outside_graphs(way.inputs), prepend=True, with_kwargs=True)
        if output is not None:
            module.register_forward_hook(outside_graphs(partial(_give, output)))


def _is_one(module: nn.Module) -> bool:
    """Whether a module computes with all that it holds by itself: torch's attention uses its projection's weight."""
    return isinstance(module, nn.MultiheadAttention) or next(module.children(), None) is None


def _main_device(module: nn.Module) -> torch.device:
    """Where the first block computes; where there is none, the first parameter."""
    lists = (one for one in module.modules() if isinstance(one, (*_NEVER_CALLED, nn.Sequential)))
    first = next((block for one in lists for block in one.children() if _devices(block)), module)
    return _way_to(first).device


def _devices(module: nn.Module) -> set[torch.device]:
    return {parameter.device for parameter in module.parameters()}


def _way_to(module: nn.Module) -> _Way:
    """The way to a module that has parameters: to the first of them."""
    place = next(
        (path, name)
        for path, owner in module.named_modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None
    )
    return _Way(_found(module, place).device, place)


def _found(module: nn.Module, place: _Place) -> torch.Tensor:
    path, name = place
    found = module.get_submodule(path)._parameters[name]
    if found is None:
        raise AttributeError(f"{path}.{name} is gone")
    return found


def _begin(main: torch.device, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Before the forward of the whole model: remember where its inputs came from, and bring them to the main device."""
    _ORIGINS.of[id(module)] = _device_of((args, kwargs)) or main
    return moved(args, main), moved(kwargs, main)


def _end(module: nn.Module, args: Any, output: Any) -> Any:
    """After it."""
    del args
    origin = _ORIGINS.of.pop(id(module), None)
    return output if origin is None else moved(output, origin)


def _give(device: torch.device, module: nn.Module, args: Any, output: Any) -> Any:
    """After the forward of a module: its output, on the device."""
    del module, args
    return moved(output, device)


def _device_of(value: Any) -> torch.device | None:
    """The device of the first tensor in arguments."""
    if isinstance(value, torch.Tensor):
        return value.device
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return next((device for one in value if (device := _device_of(one)) is not None), None)
    return None


def moved(value: Any, device: torch.device) -> Any:
    """The same on another device: tensors, and lists, tuples and dicts of them; the very same where all are there.

    Caches are none of these: what a layer keeps in one lies where that layer computes.

    Args:
        value: arguments or outputs of a module.
        device: where they go.
    """
    if isinstance(value, torch.Tensor):
        return value if value.device == device else _tensor_on(value, device)
    if isinstance(value, dict):
        changed = {key: new for key, old in value.items() if (new := moved(old, device)) is not old}
        if not changed:
            return value
        value = copy.copy(value)
        for key, new in changed.items():
            value[key] = new
        return value
    if isinstance(value, list | tuple):
        items = [moved(one, device) for one in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _tensor_on(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on another device; the same one as long as the tensor is unchanged."""
    # Inference tensors do not tell whether they were changed, and gradients flow back through one copy each.
    if tensor.requires_grad or torch.is_inference_mode_enabled() or tensor.is_inference():
        return tensor.to(device)
    if tensor not in _ELSEWHERE:
        _ELSEWHERE[tensor] = {}
    known: _Known = _ELSEWHERE[tensor]
    version, get = known.get(device, (-1, _nothing))
    found = get() if version == tensor._version else None
    if found is None:
        found = tensor.to(device)
        known[device] = tensor._version, partial(_unchanged, _held(found), found._version)
        original = partial(_unchanged, TensorWeakRef(tensor), tensor._version)
        _ELSEWHERE[found] = {tensor.device: (found._version, original)}
    return found


def _held(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor


def _nothing() -> None:
    """Of what is not known."""


def _unchanged(get: Callable[[], torch.Tensor | None], version: int) -> torch.Tensor | None:
    """A tensor, if it lives and is the same still."""
    tensor = get()
    return tensor if tensor is not None and tensor._version == version else None
