"""Which checkpoint tensors fill which tensors of the module: pure data, made before a byte is read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadstone.units import printable

_SHOWN_NAME = 200

# What wrappers put in front of every name: DataParallel and DDP, torch.compile, Lightning and FSDP.
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "model.", "state_dict.", "_forward_module.")

RenameRules = Mapping[str, str] | Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a place in the module wants: its shape and the dtype (torch's name) it is loaded in."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One checkpoint tensor that fills a module tensor, or a contiguous stretch of it.

    Attributes:
        source: the name in the checkpoint.
        start: the first element of the stretch that is filled, counted in the flat target.
        shape: the shape that the source must have; None where it is the target's own.
        index: the slice of the target that is filled, where it is no contiguous stretch.
        layout: how the decoded source must be rearranged first (GGUF), or None.
    """

    source: str
    start: int = 0
    shape: tuple[int, ...] | None = None
    index: tuple[slice, ...] | None = None
    layout: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One module tensor and the parts that fill it, in order."""

    target: str
    parts: tuple[Part, ...]

    @property
    def is_plain(self) -> bool:
        """Whether its parts are contiguous stretches that are not rearranged."""
        return all(part.layout is None and part.index is None for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """Module tensors that are computed from checkpoint tensors.

    Attributes:
        name: the first target, for messages.
        sources: the checkpoint names it reads.
        dtypes: the dtype each source is cast to before it is converted, by checkpoint name (torch's names).
        run: takes the sources as tensors in that order, gives tensors by fqn.
    """

    name: str
    sources: tuple[str, ...]
    dtypes: tuple[str | None, ...]
    run: Callable[[Sequence[Any]], Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyMap:
    """The whole mapping.

    Attributes:
        assignments: tensors that are copied, by target.
        conversions: tensors that are computed.
        unexpected: checkpoint names that nothing in the module takes.
        notes: what was noticed, for the report.
    """

    assignments: tuple[Assignment, ...]
    conversions: tuple[Conversion, ...] = ()
    unexpected: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def compile_rename(rules: RenameRules | None) -> Callable[[str], str]:
    """Turn rename rules into a function of one name.

    Args:
        rules: a mapping of whole names or dotted prefixes to what replaces them, or (pattern, replacement) pairs that
            `re.sub` applies in order.

    Returns:
        A function from the checkpoint's name to the new one.

    Raises:
        ValueError: a pattern that is no regular expression.
    """
    if rules is None:
        return lambda name: name
    if isinstance(rules, Mapping):
        return _rename_by_prefix(dict(rules))
    try:
        compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    except re.error as error:
        raise ValueError(f"rename= holds {error.pattern!r}, which is no regular expression: {error}") from error

    def rename(name: str) -> str:
        for pattern, replacement in compiled:
            name = pattern.sub(replacement, name)
        return name

    return rename


def _rename_by_prefix(table: dict[str, str]) -> Callable[[str], str]:
    def rename(name: str) -> str:
        if name in table:
            return table[name]
        # The longest dotted prefix wins, so that {"a": ..., "a.b": ...} means what it says.
        end = name.rfind(".")
        while end > 0:
            replacement = table.get(name[:end], table.get(name[: end + 1]))
            if replacement is not None:
                return ".".join(piece for piece in (replacement.strip("."), name[end + 1 :]) if piece)
            end = name.rfind(".", 0, end)
        return name

    return rename


def unwrap_prefix(names: Collection[str], accepts: Callable[[str], bool]) -> tuple[str, int]:
    """Find the wrapper prefix (`module.`, `_orig_mod.`, also nested) without which most names are known.

    Args:
        names: the checkpoint's names.
        accepts: whether the module takes a name.

    Returns:
        The prefix to drop, and how many more names are accepted without it; ("", 0) where none helps.
    """
    known = sum(map(accepts, names))
    best, prefix = ("", 0), ""
    while True:
        step = next((p for p in WRAPPER_PREFIXES if all(n.startswith(prefix + p) for n in names)), None)
        if not names or step is None:
            return best
        prefix += step
        gain = sum(accepts(name.removeprefix(prefix)) for name in names) - known
        if gain > best[1]:
            best = (prefix, gain)


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `name`, if one is like it: same last component first, then the closest spelling."""
    leaf = name.rpartition(".")[2]
    pool = [candidate for candidate in candidates if candidate.rpartition(".")[2] == leaf][:2000]
    matches = difflib.get_close_matches(name, pool, n=1, cutoff=0.6)
    return matches[0] if matches else None


def list_names(names: Sequence[str], candidates: Collection[str] = (), limit: int = 8) -> str:
    """Names for a message, each with the nearest candidate, at most `limit` of them."""
    shown = []
    for name in names[:limit]:
        close = nearest(name, candidates)
        told = printable(name, _SHOWN_NAME)
        shown.append(f"{told} (nearest: {close})" if close else told)
    rest = len(names) - limit
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")
