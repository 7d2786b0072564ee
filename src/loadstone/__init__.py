"""Loadstone loads any PyTorch model onto the machine you have.

import loadstone
model = loadstone.load("path/or/hub-id")
print(loadstone.of(model).report)
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loadstone.api.convert import convert
    from loadstone.api.inspect import inspect
    from loadstone.api.load import load
    from loadstone.api.machine import machine
    from loadstone.api.offload import offload
    from loadstone.api.plan import plan
    from loadstone.api.registry import of
    from loadstone.api.tokenizer import load_tokenizer
    from loadstone.api.verify import verify
    from loadstone.errors import LoadstoneError
    from loadstone.execute.values import States

__version__ = "0.1.0"

__all__ = [
    "LoadstoneError",
    "States",
    "convert",
    "inspect",
    "load",
    "load_tokenizer",
    "machine",
    "of",
    "offload",
    "plan",
    "verify",
]

# Names are looked up when they are used (PEP 562), so that importing loadstone imports nothing heavy.
_HOMES = {
    "LoadstoneError": "loadstone.errors",
    "States": "loadstone.execute.values",
    "convert": "loadstone.api.convert",
    "inspect": "loadstone.api.inspect",
    "load": "loadstone.api.load",
    "load_tokenizer": "loadstone.api.tokenizer",
    "machine": "loadstone.api.machine",
    "of": "loadstone.api.registry",
    "offload": "loadstone.api.offload",
    "verify": "loadstone.api.verify",
    "plan": "loadstone.api.plan",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loadstone' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Package(ModuleType):
    """`loadstone.plan` is the function, also after the room of that name was imported, which sets the attribute."""

    @property
    def plan(self) -> Any:
        return __getattr__("plan")

    @plan.setter
    def plan(self, room: Any) -> None:
        """The room is found in `sys.modules`, as every `from loadstone.plan... import` does."""


sys.modules[__name__].__class__ = _Package
