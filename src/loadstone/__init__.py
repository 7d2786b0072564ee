"""Loadstone loads any PyTorch model onto the machine you have.

import loadstone
model = loadstone.load("path/or/hub-id")
print(loadstone.of(model).report)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loadstone.api.convert import convert
    from loadstone.api.inspect import inspect
    from loadstone.api.load import load
    from loadstone.api.machine import machine
    from loadstone.api.registry import of
    from loadstone.api.tokenizer import load_tokenizer
    from loadstone.errors import LoadstoneError

__version__ = "0.1.0"

__all__ = ["LoadstoneError", "convert", "inspect", "load", "load_tokenizer", "machine", "of"]

# Names are looked up when they are used (PEP 562), so that importing loadstone imports nothing heavy.
_HOMES = {
    "LoadstoneError": "loadstone.errors",
    "convert": "loadstone.api.convert",
    "inspect": "loadstone.api.inspect",
    "load": "loadstone.api.load",
    "load_tokenizer": "loadstone.api.tokenizer",
    "machine": "loadstone.api.machine",
    "of": "loadstone.api.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loadstone' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
