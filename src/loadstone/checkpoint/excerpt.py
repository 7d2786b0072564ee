"""What of a source is meant: one of its folders, one of its variants, and there the tensors that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from loadstone.checkpoint.sharded import Index
from loadstone.checkpoint.values import Checkpoint
from loadstone.errors import NotACheckpoint

Select = str | Sequence[str] | Callable[[str], bool]

_MAX_LISTED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Excerpt:
    """Which part of a source is opened; all of it by default.

    Attributes:
        subfolder: a folder inside the source, where the checkpoint lies; "" for the source itself.
        variant: the `fp16` of `model.fp16.safetensors`.
        prefix: only tensors whose names begin with it, without it.
        select: a shell pattern, several, or a function of a name: only tensors that one of them matches. The names are
            those without the prefix.
    """

    subfolder: str = ""
    variant: str | None = None
    prefix: str | None = None
    select: Select | None = None

    def __post_init__(self) -> None:
        parts = PurePosixPath(self.subfolder.replace("\\", "/")).parts
        if any(part in {"..", "/"} or ":" in part for part in parts):
            raise ValueError(f"subfolder={self.subfolder!r}: expected a folder inside the source, such as transformer.")

    @property
    def names_tensors(self) -> bool:
        """Whether only some of the tensors are meant."""
        return self.prefix is not None or self.select is not None


def excerpt_of(checkpoint: Checkpoint, excerpt: Excerpt, *, num_unread: int = 0) -> Checkpoint:
    """The checkpoint with the tensors that are asked for, and the files that hold them.

    Args:
        checkpoint: what was opened.
        excerpt: what is asked for.
        num_unread: the tensors in shards that were not opened, because none of them is asked for.

    Raises:
        NotACheckpoint: the prefix or the selection matches nothing.
    """
    if not excerpt.names_tensors:
        return checkpoint
    chosen = _chosen(checkpoint.tensors, excerpt, where=str(checkpoint.root))
    tensors = {name: replace(checkpoint.tensors[stored], name=name) for name, stored in chosen.items()}
    used = {info.file for info in tensors.values()}
    left_out = len(checkpoint.tensors) - len(tensors) + num_unread
    return replace(
        checkpoint,
        tensors=tensors,
        files=tuple(file for file in checkpoint.files if file.path in used),
        notes=(*checkpoint.notes, *([f"{left_out:,} tensors were not asked for and left out"] if left_out else ())),
    )


def index_of(index: Index, excerpt: Excerpt, *, where: str) -> Index:
    """The index with only those shards that hold a tensor that is asked for.

    Args:
        index: of the whole checkpoint.
        excerpt: what is asked for.
        where: what a message begins with.

    Raises:
        NotACheckpoint: the prefix or the selection matches nothing.
    """
    if not excerpt.names_tensors:
        return index
    everything = sorted(name for names in index.shards.values() for name in names)
    stored = set(_chosen(everything, excerpt, where=where).values())
    return replace(
        index, shards={shard: names for shard, names in index.shards.items() if not stored.isdisjoint(names)}
    )


def _chosen(names: Collection[str], excerpt: Excerpt, *, where: str) -> dict[str, str]:
    """The names of what is asked for, and what each is called in the files."""
    found = {name: name for name in names} if excerpt.prefix is None else _under(names, excerpt.prefix, where)
    return found if excerpt.select is None else _selected(found, excerpt.select, where)


def _under(names: Collection[str], prefix: str, where: str) -> dict[str, str]:
    if not prefix.endswith(".") and any(name.startswith(f"{prefix}.") for name in names):
        prefix += "."
    found = {name.removeprefix(prefix): name for name in names if name.startswith(prefix) and name != prefix}
    if not found:
        there = list(prefixes(names))
        more = f" and {len(there) - _MAX_LISTED} more" if len(there) > _MAX_LISTED else ""
        raise NotACheckpoint(
            f"{where}: expected tensors whose names begin with {prefix!r}, found none among {len(names):,}; "
            f"pass one of the prefixes that are there: {', '.join(there[:_MAX_LISTED])}{more}."
        )
    return found


def _selected(names: dict[str, str], select: Select, where: str) -> dict[str, str]:
    if callable(select):
        wanted = select
        asked = getattr(select, "__name__", "the function")
    else:
        patterns = [select] if isinstance(select, str) else list(select)
        asked = ", ".join(map(repr, patterns)) or "no pattern"

        def wanted(name: str) -> bool:
            return any(fnmatchcase(name, pattern) for pattern in patterns)

    found = {name: stored for name, stored in names.items() if wanted(name)}
    if not found:
        shown = ", ".join(list(names)[:3])
        raise NotACheckpoint(
            f"{where}: expected tensors that select={asked} matches, found none among {len(names):,} such "
            f"as {shown}; a pattern matches whole names, as in *.weight."
        )
    return found


def prefixes(names: Iterable[str]) -> Iterator[str]:
    """The prefixes that tell apart what a checkpoint holds, each with the number of its tensors, the most first."""
    groups: dict[str, list[str]] = {}
    for name in names:
        head, dot, _ = name.partition(".")
        groups.setdefault(head + dot, []).append(name)
    for head, members in sorted(groups.items(), key=lambda group: -len(group[1])):
        yield f"{_common(head, members)} ({len(members):,})"


def _common(prefix: str, names: Sequence[str]) -> str:
    """The longest dotted prefix that all these names share."""
    while True:
        head = names[0][len(prefix) :].partition(".")[0]
        longer = f"{prefix}{head}."
        if not all(name.startswith(longer) for name in names):
            return prefix
        prefix = longer
