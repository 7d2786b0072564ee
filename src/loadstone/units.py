"""Sizes, rates and durations as people read them. Sizes are decimal (1 GB = 10^9 bytes), as disks are sold."""

from __future__ import annotations

import re
from decimal import Decimal

_DECIMAL = ("B", "kB", "MB", "GB", "TB", "PB")
_COUNT = ("", "K", "M", "B", "T")
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kmgtp]?i?b?)", re.IGNORECASE | re.ASCII)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_FLOPS = ("FLOPS", "kFLOPS", "MFLOPS", "GFLOPS", "TFLOPS", "PFLOPS")


def round_up(number: int, unit: int) -> int:
    """The least multiple of a unit that is not below a number."""
    return -(-number // unit) * unit


def format_bytes(nbytes: float) -> str:
    """Three significant figures and a unit: `98.1 MB`."""
    return _scaled(nbytes, _DECIMAL, " ")


def parse_bytes(size: str | int, *, option: str) -> int:
    """A size as people type it, in bytes: `5GB`, `500 MB` and `1.5G` are decimal, `2GiB` is binary, `1000` is bytes.

    Args:
        size: the text, or bytes.
        option: what the size was given for, as the user calls it; begins the message.

    Raises:
        ValueError: it is no size, or less than a byte.
    """
    match = _SIZE.fullmatch(str(size).strip())
    if match is not None:
        unit = match["unit"].lower().removesuffix("b")
        base = 1024 if unit.endswith("i") else 1000
        nbytes = int(Decimal(match["number"]) * base ** _POWERS.get(unit.removesuffix("i"), 0))
        if nbytes > 0 and unit != "i":
            return nbytes
    raise ValueError(f"{option}: expected a size such as 5GB, 500MB or 2GiB, found {str(size)[:40]!r}.")


def format_count(count: float) -> str:
    """A count of parameters as the field writes it: `134.5M`, `7.62B`."""
    return _scaled(count, _COUNT, "")


def format_rate(bytes_per_s: float) -> str:
    """A rate: `1.75 GB/s`."""
    return f"{format_bytes(bytes_per_s)}/s"


def format_flops(flops_per_s: float) -> str:
    """Floating-point operations per second: `312 TFLOPS`."""
    return _scaled(flops_per_s, _FLOPS, " ")


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
