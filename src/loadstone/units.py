"""Sizes, rates and durations as people read them. Sizes are decimal (1 GB = 10^9 bytes), as disks are sold."""

from __future__ import annotations

_DECIMAL = ("B", "kB", "MB", "GB", "TB", "PB")
_COUNT = ("", "K", "M", "B", "T")


def format_bytes(nbytes: float) -> str:
    """Three significant figures and a unit: `98.1 MB`."""
    return _scaled(nbytes, _DECIMAL, " ")


def format_count(count: float) -> str:
    """A count of parameters as the field writes it: `134.5M`, `7.62B`."""
    return _scaled(count, _COUNT, "")


def format_rate(bytes_per_s: float) -> str:
    """A rate: `1.75 GB/s`."""
    return f"{format_bytes(bytes_per_s)}/s"


def format_seconds(seconds: float) -> str:
    """A duration in the unit that suits it: `310 µs`, `42 ms`, `3.71 s`, `2 min 05 s`."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 100:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def format_name(name: str, most: int = 100) -> str:
    """A name out of a file as a message shows it: quoted, control characters escaped, never a megabyte of it."""
    shown = repr(name[:most])
    # Escapes take up to ten characters each, so it is the quoted form that is cut.
    return shown if len(name) <= most and len(shown) <= most + 2 else f"{shown[: most - 3]}...{shown[-1]}"


def printable(text: str, most: int = 1000) -> str:
    """A text out of a file as it may stand on a terminal: what a terminal would obey is escaped, and it ends."""
    shown = text if len(text) <= most else f"{text[: most - 3]}..."
    if shown.isprintable():
        return shown
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in shown)


def _scaled(value: float, units: tuple[str, ...], gap: str) -> str:
    index = 0
    # 999.5 would be printed as 1e+03: step to the next unit as soon as rounding reaches it.
    while abs(value) >= 999.5 and index < len(units) - 1:
        value /= 1000
        index += 1
    if index == 0:
        return f"{value:.0f}{gap}{units[0]}"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}{gap}{units[index]}"
