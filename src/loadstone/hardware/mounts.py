"""What is mounted where, as the kernel tells this process."""

from __future__ import annotations

import re
from dataclasses import dataclass
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


def mounts() -> list[Mount]:
    """All mounts that can be seen, in the kernel's order; none where the kernel does not tell.

    Source: https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html
    """
    try:
        lines = MOUNTINFO.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    found: dict[Path, Mount] = {}
    for line in lines:
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
    return list(found.values())


def _unescaped(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text) if "\\" in text else text
