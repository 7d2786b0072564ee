"""Hooks that `torch.compile` leaves alone: graphs end before them and begin anew after them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

Hook = Callable[..., Any]


def outside_graphs(hook: Hook) -> Hook:
    """The same hook, never traced: what it does (locks, threads, slots) is no part of a computation.

    `torch.compiler.disable` says so as well, and imports the compiler, which takes longer than building many a model.
    So it is asked only once somebody else has imported that.
    """
    left_alone: Hook | None = None

    def call(*args: Any) -> Any:
        nonlocal left_alone
        if left_alone is None and "torch._dynamo" in sys.modules:
            left_alone = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
        return (left_alone or hook)(*args)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call
