"""A forward over several tokens in which every module computes one token after the other.

A product of several rows is computed by other kernels than a product of one, so that the last bits of the logits, and
at a near tie the next token, depend on how many tokens a pass has. Here each block is called once for each token, with
the arguments that a pass over this token alone gives it: the same kernels see the same numbers in the same shapes, and
every bit is that of decoding token by token. The weights of a streamed block still come only once.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
# What computes each token by itself, whatever its neighbours are: looked-up rows, and nothing at all.
_BY_ELEMENT = (nn.Embedding, nn.Dropout, nn.Identity)


class CannotSplit(Exception):
    """The arguments of a module cannot be told apart by token; the message says which."""


@contextmanager
def token_by_token(model: nn.Module, num_tokens: int) -> Iterator[None]:
    """While entered, forwards of this thread over `num_tokens` tokens of one sequence compute one after the other.

    Args:
        model: a causal language model.
        num_tokens: of the pass, two or more.

    Raises:
        CannotSplit: within the forward, and before the blocks that cannot be split have computed.
    """
    thread = threading.get_ident()
    with _LOCKS.setdefault(model, threading.RLock()):
        changed: list[nn.Module] = []
        try:
            for stage in _stages(model):
                forward = stage.forward
                names = tuple(inspect.signature(forward).parameters)
                stage.forward = partial(_in_turn, thread, forward, names, num_tokens)
                changed.append(stage)
            yield
        finally:
            for stage in changed:
                del stage.forward


def _stages(model: nn.Module) -> list[nn.Module]:
    """The modules that one token passes through one after the other: blocks, norms, rotary positions, the head.

    Raises:
        CannotSplit: the model has no blocks that are known.
    """
    decoder = getattr(model, "get_decoder", lambda: None)()
    path = next((name for name, module in model.named_modules() if module is decoder), None)
    if decoder is None or not path:
        raise CannotSplit(f"{type(model).__name__} does not say what its decoder is")
    found: dict[int, nn.Module] = {}
    around: nn.Module = model
    for name in [*path.split("."), ""]:
        for child_name, child in around.named_children():
            if child_name != name:
                found |= {id(stage): stage for stage in _callable_parts(child)}
        around = getattr(around, name) if name else around
    stages = list(found.values())
    if not any(isinstance(child, nn.ModuleList) for child in decoder.children()):
        raise CannotSplit(f"{type(decoder).__name__} has no list of blocks")
    if any("forward" in vars(stage) for stage in stages):
        raise CannotSplit(f"a forward of {type(model).__name__} was replaced")
    return stages


def _callable_parts(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, _CONTAINERS):
        for child in module.children():
            yield from _callable_parts(child)
    elif not isinstance(module, _BY_ELEMENT):
        yield module


def _in_turn(
    thread: int, forward: Callable[..., Any], names: tuple[str, ...], num_tokens: int, *args: Any, **kwargs: Any
) -> Any:
    """Call a module's forward once for each token, and put together what comes out."""
    if threading.get_ident() != thread:
        return forward(*args, **kwargs)
    named = list(zip(names, args, strict=False))
    calls = [
        (
            [_of_token(name, value, index, num_tokens) for name, value in named],
            {name: _of_token(name, value, index, num_tokens) for name, value in kwargs.items()},
        )
        for index in range(num_tokens)
    ]
    return _joined([forward(*mine, **also) for mine, also in calls])


def _of_token(name: str, value: Any, index: int, num_tokens: int) -> Any:
    """One token's part of an argument, as a pass over this token alone has it."""
    if isinstance(value, tuple | list) and any(isinstance(one, torch.Tensor) for one in value):
        return type(value)(_of_token(name, one, index, num_tokens) for one in value)
    if not isinstance(value, torch.Tensor):
        if isinstance(value, dict) and value:
            raise CannotSplit(f"{name} is a {type(value).__name__}")
        return value
    if name.endswith("mask"):
        return _mask_of_token(name, value, index, num_tokens)
    dim = 1 if value.is_floating_point() else value.ndim - 1
    if value.ndim <= dim or value.shape[dim] != num_tokens:
        raise CannotSplit(f"{name} has the shape {tuple(value.shape)}")
    # A copy has the strides of a tensor of its own, which kernels may be chosen by.
    return value.narrow(dim, index, 1).clone(memory_format=torch.contiguous_format)


def _mask_of_token(name: str, mask: torch.Tensor, index: int, num_tokens: int) -> None:
    """A single token sees everything before it, for which no mask is made.

    Raises:
        CannotSplit: the token's row of the mask says something else.
    """
    if mask.ndim != 4 or mask.shape[-2] != num_tokens:
        raise CannotSplit(f"{name} has the shape {tuple(mask.shape)}")
    row = mask[..., index, :] if mask.dtype == torch.bool else mask[..., index, :] == 0
    seen = mask.shape[-1] - num_tokens + index + 1
    if not row[..., :seen].all() or row[..., seen:].any():
        raise CannotSplit(f"{name} hides tokens")


def _joined(outputs: list[Any]) -> Any:
    """The outputs for each token as one output for all of them."""
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        if first.ndim < 2 or first.shape[1] != 1:
            raise CannotSplit(f"an output has the shape {tuple(first.shape)}")
        return torch.cat(outputs, dim=1)
    if type(first) in (tuple, list):
        return type(first)(_joined(list(parts)) for parts in zip(*outputs, strict=True))
    if first is None:
        return None
    raise CannotSplit(f"an output is a {type(first).__name__}")
