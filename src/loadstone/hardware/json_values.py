"""Values of `hardware.spec` as JSON, and back: what comes from a file is checked field by field."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from loadstone.checkpoint.files import write_whole
from loadstone.errors import InvalidMachine

ADVICE = "correct it, or have the file written by `loadstone machine --save`"

_Value = TypeVar("_Value")

# All numbers here are sizes, counts and rates, so they are above 0; of these there may be none left.
_MAY_BE_ZERO = frozenset({"free_bytes", "used_bytes"})
_MOST = 1e21  # no machine has a zettabyte, or does a zettaflop


def to_plain(value: Any) -> Any:
    """Dataclasses as objects, tuples as lists, paths as text."""
    if is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_plain(kind: type[_Value], value: Any, where: str) -> _Value:
    """A dataclass out of a JSON object that has its fields, no others, and all that have no default.

    Args:
        kind: the dataclass.
        value: what JSON gave.
        where: what a message begins with: the file, and the place in it.

    Raises:
        InvalidMachine: naming the first field that is not what it should be.
    """
    given = _expect(dict, value, where, "an object")
    hints = typing.get_type_hints(kind)
    required = [field.name for field in fields(kind) if field.default is field.default_factory is MISSING]  # type: ignore[arg-type]
    for name in given:
        if name not in hints:
            import difflib  # a file without faults is read sooner

            close = difflib.get_close_matches(name, hints, n=1)
            meant = f'; did you mean "{close[0]}"?' if close else f"; {ADVICE}."
            raise InvalidMachine(f'{where}: expected the fields {", ".join(hints)}, found "{name}"{meant}')
    for name in required:
        if name not in given:
            raise InvalidMachine(f'{where}: expected a field "{name}", found none; {ADVICE}.')
    return kind(**{name: _convert(hints[name], item, f"{where}.{name}") for name, item in given.items()})


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all, and its folders.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(path, json.dumps(value, indent=2) + "\n")


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # X | None
        return None if value is None else _convert(arguments[0], value, where)
    if origin is tuple:
        items = _expect(list, value, where, "a list")
        return tuple(_convert(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(items))
    if origin is Mapping:
        entries = _expect(dict, value, where, "an object")
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in entries.items()}
    if is_dataclass(hint):
        return from_plain(typing.cast("type[Any]", hint), value, where)
    return _SCALARS[hint](value, where)


def _expect(kind: type[_Value], value: Any, where: str, words: str) -> _Value:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InvalidMachine(f"{where}: expected {words}, found {_shown(value)}; {ADVICE}.")
    return value


def _number(value: Any, where: str) -> float:
    may_be_zero = where.rpartition(".")[2] in _MAY_BE_ZERO
    words = "0 or a number above" if may_be_zero else "a number above 0"
    number: float = _expect(int | float, value, where, words)  # type: ignore[arg-type]
    if not 0 <= number <= _MOST or (number == 0 and not may_be_zero):  # NaN is in no order with anything
        raise InvalidMachine(f"{where}: expected {words}, found {_shown(value)}; {ADVICE}.")
    return number


def _integer(value: Any, where: str) -> int:
    number = _number(value, where)
    if number != int(number):
        raise InvalidMachine(f"{where}: expected a whole number, found {_shown(value)}; {ADVICE}.")
    return int(number)


_SCALARS: dict[Any, Callable[[Any, str], Any]] = {
    int: _integer,
    float: lambda value, where: float(_number(value, where)),
    bool: lambda value, where: _expect(bool, value, where, "true or false"),
    str: lambda value, where: _expect(str, value, where, "text"),
    Path: lambda value, where: Path(_expect(str, value, where, "a path")),
}


def _shown(value: Any) -> str:
    """A value as JSON writes it, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
