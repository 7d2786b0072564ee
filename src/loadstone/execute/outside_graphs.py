"""Hooks and forwards that `torch.compile` leaves alone: graphs end before them and begin anew after them."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from loadstone.errors import StreamedModel

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
        self._forward = outside_graphs(self._compute)
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

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        if self._before is not None:
            return self._before(*args, **kwargs)
        module = self._module()
        if module is None:
            raise ReferenceError("the module is gone, and its forward with it")
        return type(module).forward(module, *args, **kwargs)

    def __reduce__(self) -> NoReturn:
        """Refused: a copy of the module would compute with the original's weights."""
        raise StreamedModel(
            "expected a module to copy, found one whose weights are read from its files in parts; lift the limit with "
            "loadstone.of(model).limit(None) and copy the whole model."
        )


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
