"""HTML and SVG from values. What is not markup already is escaped: nothing that a checkpoint says becomes code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

_VOID = frozenset({"br", "rect", "line", "meta", "link"})


class Markup(str):
    """Text that is markup: only `element` and `join` make it."""

    __slots__ = ()


def element(tag: str, attributes: Mapping[str, object] | None = None, *children: str) -> Markup:
    """One element.

    Args:
        tag: its name.
        attributes: by name; those that are None are left out.
        children: markup as it is, any other text escaped.

    Returns:
        The element, self-closed where it can have no children.
    """
    written = "".join(
        f' {name}="{escape(str(value))}"' for name, value in (attributes or {}).items() if value is not None
    )
    if tag in _VOID:
        return Markup(f"<{tag}{written}/>")
    return Markup(f"<{tag}{written}>{join(children)}</{tag}>")


def join(children: Iterable[str]) -> Markup:
    """Markup one after the other; text that is none is escaped."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))
