"""What is mounted where, as the kernel tells this process."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")

_OCTAL = re.compile(r"\\(\d{3})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One line of mountinfo.

    Attributes:
        number: of the device, `8:17`.
        root: which folder of the file system is mounted.
        point: where.
        kind: the file system's type, `ext4`.
        options: the file system's own options, such as the controllers of a cgroup v1 hierarchy.
    """

    number: str
    root: str
    point: Path
    kind: str
    options: frozenset[str]


def mounts() -> tuple[Mount, ...]:
    """All mounts that can be seen, in the kernel's order; none where the kernel does not tell.

    Source: https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html
    """
    try:
        return _understood(MOUNTINFO.read_text(errors="surrogateescape"))
    except OSError:
        return ()


@lru_cache(maxsize=1)  # a load asks ten times, and the kernel nearly always says the same
def _understood(mountinfo: str) -> tuple[Mount, ...]:
    found: dict[Path, Mount] = {}
    for line in mountinfo.splitlines():
        fields, _, described = line.partition(" - ")
        _, _, number, root, point, *_ = fields.split(" ")
        kind, _, options = described.split(" ", 2)
        mount = Mount(
            number=number,
            root=_unescaped(root),
            point=Path(_unescaped(point)),
            kind=kind,
            options=frozenset(options.split(",")),
        )
        found.pop(mount.point, None)  # a later mount hides an earlier one at the same place
        found[mount.point] = mount
    return tuple(found.values())


def _unescaped(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text) if "\\" in text else text
