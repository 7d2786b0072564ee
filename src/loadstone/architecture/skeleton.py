"""Any module class, built on the meta device: parameters without memory, no initialiser run, buffers computed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

ModuleFactory = Callable[..., nn.Module]

# Factories whose values nobody can want to keep: what they fill is either loaded or drawn again.
_RANDOM_FACTORIES = {torch.rand, torch.randn, torch.randint, torch.rand_like, torch.randn_like, torch.normal}
_RANDOM_METHODS = {
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
    torch.Tensor.exponential_,
    torch.Tensor.geometric_,
    torch.Tensor.cauchy_,
    torch.Tensor.log_normal_,
    torch.Tensor.bernoulli_,
    torch.Tensor.random_,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A place in a module that a tensor can fill.

    Attributes:
        fqn: the fully qualified name.
        shape: of the tensor there.
        dtype: torch's name of the dtype the class gives it.
        is_buffer: a buffer rather than a parameter.
        requires_grad: whether the class asks for gradients there.
    """

    fqn: str
    shape: tuple[int, ...]
    dtype: str
    is_buffer: bool
    requires_grad: bool


class SkipMetaInitialisers(TorchFunctionMode):
    """Skips `nn.init` and random fills of meta tensors, which compute nothing and take a third of a skeleton's time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM_METHODS or getattr(func, "__module__", None) == "torch.nn.init":
            filled = args[0] if args else kwargs.get("tensor")
            if isinstance(filled, torch.Tensor) and filled.is_meta:
                return filled
        return func(*args, **kwargs)


class _NoRandomNumbers(TorchFunctionMode):
    """Skips what initialises: random factories give meta tensors, in-place random fills and `nn.init` do nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if func in _RANDOM_METHODS:
            return args[0]
        if func in _RANDOM_FACTORIES:
            kwargs = {**kwargs, "device": "meta"}
            kwargs.pop("generator", None)
        return func(*args, **kwargs)


# The hook is torch's and sees every thread; only threads that are building a skeleton are served. Each remembers
# what it moved, so that one parameter registered in two places stays one.
_BUILDING: dict[int, WeakIdKeyDictionary] = {}


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    moved = _BUILDING.get(threading.get_ident())
    if parameter is None or parameter.is_meta or moved is None:
        return None
    if parameter not in moved:
        moved[parameter] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    found: nn.Parameter = moved[parameter]
    return found


@contextmanager
def without_parameters() -> Iterator[None]:
    """Within, modules built by this thread get their parameters on meta; buffers are computed for real.

    A parameter is moved to meta the moment it is registered, through torch's own registration hook, so that
    `torch.empty` has only reserved addresses for it, and `reset_parameters` afterwards works on meta.
    """
    ident = threading.get_ident()
    handle = register_module_parameter_registration_hook(_to_meta)  # type: ignore[arg-type]
    _BUILDING[ident] = WeakIdKeyDictionary()
    try:
        with _NoRandomNumbers():
            yield
    finally:
        _BUILDING.pop(ident, None)
        handle.remove()


def build(factory: ModuleFactory, config: Mapping[str, Any] | None) -> nn.Module:
    """Build a module without memory for its parameters and without running an initialiser.

    Args:
        factory: an `nn.Module` class, or a function that returns a module.
        config: its keyword arguments.

    Returns:
        The module: parameters on meta, buffers real (random buffers on meta too).

    Raises:
        TypeError: the factory returned something else than a module.
    """
    with without_parameters():
        module = factory(**dict(config or {}))
    if not isinstance(module, nn.Module):
        raise TypeError(f"into= must be an nn.Module class or a function that returns a module, not {module!r}")
    return module


def slots_of(module: nn.Module) -> dict[str, Slot]:
    """Every place of the module's state dict, by fqn; tied places each appear."""
    slots = {}
    for fqn, tensor in module.state_dict(keep_vars=True).items():
        # Modules may put extra state of any kind into their state dict; only tensors are places.
        if isinstance(tensor, torch.Tensor):
            slots[fqn] = Slot(
                fqn=fqn,
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                is_buffer=not isinstance(tensor, nn.Parameter),
                requires_grad=tensor.requires_grad,
            )
    return slots


def tied_groups(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The fqns that name one and the same tensor, group by group."""
    groups: dict[int, list[str]] = {}
    for fqn, tensor in module.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(fqn)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def find_owner(module: nn.Module, fqn: str) -> tuple[nn.Module, str]:
    """The submodule that holds the tensor `fqn`, and the tensor's name in it."""
    path, _, name = fqn.rpartition(".")
    return (module.get_submodule(path) if path else module), name


def replace_tensors(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put tensors in their places, by fqn, past the module's own `__setattr__`: no copy, no hook."""
    owners = dict(module.named_modules(remove_duplicate=False))
    for fqn, tensor in tensors.items():
        path, _, name = fqn.rpartition(".")
        owner = owners[path]
        if name in owner._parameters:
            given = isinstance(tensor, nn.Parameter)
            learns = tensor.is_floating_point() or tensor.is_complex()
            owner._parameters[name] = tensor if given else nn.Parameter(tensor, requires_grad=learns)
        else:
            owner._buffers[name] = tensor
