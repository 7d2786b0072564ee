"""The control groups this process is in, and what they allow it.

A group's limit holds for all groups inside it, so every one from the process's own to the outermost that can be seen
counts. Where they lie is asked of mountinfo: a container may see its own group as the root, by a cgroup namespace (its
path is "/") or by a bind mount (its path is the host's, and so is the root of the mount).

Source: https://docs.kernel.org/admin-guide/cgroup-v1/memory.html,
https://docs.kernel.org/admin-guide/cgroup-v2.html (memory interface files), https://man7.org/linux/man-pages/man7/cgroups.7.html
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from loadstone.hardware.mounts import Mount, mounts
from loadstone.hardware.spec import Limit

CGROUP_FILE = Path("/proc/self/cgroup")

# cgroup v1 writes "no limit" as the largest multiple of a page, which is near 2^63.
_UNLIMITED = 1 << 62

# What is limited, and what counts against it. Beyond `memory.high` a process is not killed but slowed down until it
# hardly moves. Not here: v1's `soft_limit_in_bytes`, which nothing enforces.
_LIMITS = {
    1: (
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes"),
    ),
    2: (("memory.max", "memory.current"), ("memory.high", "memory.current")),
}

# Page cache counts as use, but goes when memory is needed. Pages that are locked or in tmpfs are in none of these
# lists; pages that are dirty or being written are, and go only when the disk has them. On a fast disk the kernel waits
# for that rather than kill (measured with 60 MB), so counting them as used errs on the safe side. v1's own figures
# leave out the groups inside, those that begin with `total_` do not.
_FILES = {
    1: ("total_inactive_file", "total_active_file"),
    2: ("inactive_file", "active_file", "slab_reclaimable"),
}
_PENDING = {1: ("total_dirty", "total_writeback"), 2: ("file_dirty", "file_writeback")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One control group.

    Attributes:
        version: of the interface, 1 or 2.
        path: its name, as this process sees it.
        folder: where its files are.
    """

    version: int
    path: str
    folder: Path

    def read(self, name: str) -> str | None:
        """One of its files; None where there is none."""
        try:
            return (self.folder / name).read_text().strip()
        except OSError:
            return None


def groups(controller: str) -> tuple[Group, ...]:
    """The groups in which `controller` may limit this process, innermost first.

    Args:
        controller: `memory` or `cpu`.
    """
    try:
        own = CGROUP_FILE.read_text()
    except OSError:
        return ()
    return _groups(controller, own, mounts())


@lru_cache(maxsize=2)  # one for each controller: a process seldom moves to another group
def _groups(controller: str, own: str, visible: tuple[Mount, ...]) -> tuple[Group, ...]:
    """The same, as `/proc/self/cgroup` and the mounts have it."""
    mounted = [mount for mount in visible if mount.kind in {"cgroup", "cgroup2"}]
    found: list[Group] = []
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            version, hierarchy = 2, [mount for mount in mounted if mount.kind == "cgroup2"]
        elif controller in controllers.split(","):
            version, hierarchy = 1, [mount for mount in mounted if controller in mount.options]
        else:
            continue
        if hierarchy:
            found.extend(_from_own_to_outermost(version, PurePosixPath(path), hierarchy))
    return tuple(found)


def _from_own_to_outermost(version: int, path: PurePosixPath, hierarchy: Sequence[Mount]) -> Iterator[Group]:
    showing = [mount for mount in hierarchy if path.is_relative_to(mount.root)]
    # The mount that shows the most; where none shows this group, what is mounted is all that can be known.
    mount = min(showing, key=lambda mount: len(mount.root)) if showing else hierarchy[0]
    inner = path.relative_to(mount.root) if showing else PurePosixPath()
    if ".." in inner.parts:  # outside of the namespace's root
        inner = PurePosixPath()
    for part in (inner, *inner.parents):
        yield Group(version=version, path=str(PurePosixPath(mount.root) / part), folder=mount.point / part)


def memory_limits() -> list[Limit]:
    """Every limit that a group sets to this process's memory, with the use of it that cannot be reclaimed."""
    chain = groups("memory")
    found: list[Limit] = []
    for index, group in enumerate(chain):
        # "0" on kernels before 5.11: the groups inside are not counted.
        if index == 0 or group.read("memory.use_hierarchy") != "0":
            found.extend(_limits_of(group))
    least = min((limit.limit_bytes for limit in found), default=_UNLIMITED)
    outermost = next((group for group in reversed(chain) if group.version == 1), None)
    hidden = None if outermost is None else _hidden_limit(outermost)
    return found if hidden is None or hidden.limit_bytes >= least else [*found, hidden]


def _limits_of(group: Group) -> Iterator[Limit]:
    cache = _reclaimable_bytes(_stat(group), group.version)
    for limit_name, usage_name in _LIMITS[group.version]:
        limit, usage = _number(group.read(limit_name)), _number(group.read(usage_name))
        if limit is not None and usage is not None:
            what = f"cgroup v{group.version} {group.path} {limit_name}"
            yield Limit(what=what, limit_bytes=limit, used_bytes=max(0, usage - cache))


def _hidden_limit(group: Group) -> Limit | None:
    """v1 tells the least limit of a group and all groups around it, those included that a container does not see."""
    stat = _stat(group)
    limit, usage = _number(stat.get("hierarchical_memory_limit")), _number(group.read("memory.usage_in_bytes"))
    if limit is None or usage is None:
        return None
    used = max(0, usage - _reclaimable_bytes(stat, group.version))
    return Limit(what="cgroup v1 of a group around this container", limit_bytes=limit, used_bytes=used)


def _reclaimable_bytes(stat: Mapping[str, str], version: int) -> int:
    lists, pending = (sum(_number(stat.get(name)) or 0 for name in names[version]) for names in (_FILES, _PENDING))
    return max(0, lists - pending)


def cpu_quota() -> float | None:
    """How many cores' time the groups allow this process; None where they do not limit it."""
    shares = []
    for group in groups("cpu"):
        if group.version == 2:
            quota, _, period = (group.read("cpu.max") or "max").partition(" ")
        else:
            quota, period = group.read("cpu.cfs_quota_us") or "-1", group.read("cpu.cfs_period_us") or ""
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            shares.append(int(quota) / int(period))
    return min(shares, default=None)


def _stat(group: Group) -> dict[str, str]:
    lines = (group.read("memory.stat") or "").splitlines()
    return {name: value for name, _, value in (line.partition(" ") for line in lines)}


def _number(text: str | None) -> int | None:
    """A number of bytes; None for "max", v1's way of saying so, and what is not there."""
    return int(text) if text is not None and text.isdigit() and int(text) < _UNLIMITED else None
