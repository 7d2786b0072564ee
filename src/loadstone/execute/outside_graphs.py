"""Hooks and forwards that `torch.compile` leaves alone: graphs end before them and begin anew after them."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

Hook = Callable[..., Any]


def outside_graphs(hook: Hook) -> Hook:
    """The same hook, never traced: what it does (locks, threads, slots) is no part of a computation.

    `torch.compiler.disable` says so as well, and imports the compiler, which takes longer than building many a model.
    So it is asked only once somebody else has imported that. The hook remains in sight of whoever copies the module.
    """
    return partial(_untraced, hook)


class UntracedForward:
    """Has the forward of a module left alone, from now on until it is removed.

    Args:
        module: which one; it is not kept alive.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._before = vars(module).get("forward")
        self._forward = outside_graphs(partial(_forward, self._module, self._before))
        module.forward = self._forward

    def remove(self) -> None:
        """Have the forward that was there before, unless somebody has put another one there since."""
        module = self._module()
        if module is None or vars(module).get("forward") is not self._forward:
            return
        if self._before is None:
            del module.forward
        else:
            module.forward = self._before


def _forward(reference: weakref.ref[nn.Module], before: Hook | None, *args: Any, **kwargs: Any) -> Any:
    if before is not None:
        return before(*args, **kwargs)
    module = reference()
    if module is None:
        raise ReferenceError("the module is gone, and its forward with it")
    return type(module).forward(module, *args, **kwargs)


def _untraced(hook: Hook, *args: Any, **kwargs: Any) -> Any:
    if "torch._dynamo" in sys.modules and not _LEFT_ALONE:
        _LEFT_ALONE.append(torch.compiler.disable(_run))  # type: ignore[no-untyped-call]
    run = _LEFT_ALONE[0] if _LEFT_ALONE else _run
    return run(hook, *args, **kwargs)


_untraced._torchdynamo_disable = True  # type: ignore[attr-defined]


def _run(hook: Hook, *args: Any, **kwargs: Any) -> Any:
    return hook(*args, **kwargs)


# `_run` as the compiler leaves it alone, once there is a compiler. Not a cached function: those are warned of.
_LEFT_ALONE: list[Hook] = []
