"""Hooks that `torch.compile` leaves alone: graphs end before them and begin anew after them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

Hook = Callable[..., Any]


def outside_graphs(hook: Hook) -> Hook:
    """The same hook, never traced: what it does (locks, threads, slots) is no part of a computation.

    `torch.compiler.disable` says so as well, and imports the compiler, which takes longer than building many a model.
    So it is asked only once somebody else has imported that. The hook remains in sight of whoever copies the module.
    """
    return partial(_untraced, hook)


def _untraced(hook: Hook, *args: Any) -> Any:
    run = _left_alone() if "torch._dynamo" in sys.modules else _run
    return run(hook, *args)


_untraced._torchdynamo_disable = True  # type: ignore[attr-defined]


def _run(hook: Hook, *args: Any) -> Any:
    return hook(*args)


@cache
def _left_alone() -> Hook:
    disabled: Hook = torch.compiler.disable(_run)  # type: ignore[no-untyped-call]
    return disabled
