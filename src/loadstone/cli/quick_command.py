"""Commands that start without the library that converts arguments, as long as there is nothing to convert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


class QuickCommand(TyperCommand):
    """A command that has typer convert only what must be converted: numbers and paths that were typed.

    typer imports pydantic for the first conversion, be it of nothing or of a text to a text: a tenth of a second.
    """

    def get_params(self, ctx: Any) -> list[Any]:
        """Every parameter, that of `--help` included."""
        return _made_quick(super().get_params(ctx))


class QuickGroup(TyperGroup):
    """The command above them, likewise."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Every parameter, that of `--help` included."""
        return _made_quick(super().get_params(ctx))


def _made_quick(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        # Typer before 0.27 does without pydantic, and without a descriptor.
        if hasattr(parameter, "type_descriptor") and "process_value" not in vars(parameter):
            parameter.process_value = _quick(parameter, parameter.process_value)
    return parameters


def _quick(parameter: Any, convert: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`process_value` of a parameter, with the ways around conversion before it."""
    takes_text = parameter.type_descriptor.annotation is str

    def process_value(context: Any, value: Any) -> Any:
        if value is None and not parameter.required:
            ready = () if parameter.multiple else None
        elif takes_text if isinstance(value, str) else isinstance(value, int | float):
            ready = value  # what is no text is a default or a flag
        else:
            try:
                return convert(context, value)
            except typer.BadParameter as error:
                if not isinstance(value, str) or parameter.type_descriptor.annotation is not int:
                    raise
                error.message = f"expected a whole number, found {value!r}"
                raise
        return ready if parameter.callback is None else parameter.callback(context, parameter, ready)

    return process_value
