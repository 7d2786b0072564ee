"""A memory cgroup to run a command in, v1 or v2: what it may use, whether it was killed, and what it used at most.

A group of its own is made inside this process's own group (v1) or at the root of the hierarchy (v2), and removed at the
end. Making one takes root.

    with Cage(900_000_000) as cage:
        done = cage.run([sys.executable, "child.py"], timeout_s=60)
        print(done.returncode, done.num_killed, done.peak_bytes)

Source: https://docs.kernel.org/admin-guide/cgroup-v1/memory.html and
https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_MOUNTS = Path("/proc/self/mounts")
_OWN_GROUPS = Path("/proc/self/cgroup")
_SAMPLE_S = 0.05
_REMOVE_S = 10.0


class NoCage(Exception):
    """No memory cgroup can be made here; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Interface:
    """The files of one version."""

    limit: str
    peak: str
    swap: tuple[str, str]
    events: tuple[str, str]
    anonymous: str
    cached: str


_V1 = _Interface(
    limit="memory.limit_in_bytes",
    peak="memory.max_usage_in_bytes",
    swap=("memory.swappiness", "0"),
    events=("memory.oom_control", "oom_kill"),
    anonymous="total_rss",
    cached="total_cache",
)
_V2 = _Interface(
    limit="memory.max",
    peak="memory.peak",
    swap=("memory.swap.max", "0"),
    events=("memory.events", "oom_kill"),
    anonymous="anon",
    cached="file",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caged:
    """How a command ended.

    Attributes:
        returncode: of the process; negative for a signal; None where the time was over.
        num_killed: processes that the kernel killed for memory.
        seconds: from start to end.
        peak_bytes: the most the group used, page cache included.
        anonymous_bytes: the most anonymous memory, sampled.
        stdout: what it printed.
        stderr: what it complained of.
    """

    returncode: int | None
    num_killed: int
    seconds: float
    peak_bytes: int
    anonymous_bytes: int
    stdout: str
    stderr: str

    @property
    def outcome(self) -> str:
        """In a word."""
        if self.num_killed:
            return "killed"
        if self.returncode is None:
            return "out of time"
        return "finished" if self.returncode == 0 else f"failed ({self.returncode})"


class Cage:
    """A memory cgroup with a limit, for one command after another.

    Args:
        limit_bytes: what the group may use, page cache included; there is no swap.

    Raises:
        NoCage: none can be made, on entering.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._group: Path | None = None
        self._interface = _V1

    def __enter__(self) -> Cage:
        reasons = []
        for interface, parent in _parents():
            group = parent / f"cage-{os.getpid()}-{threading.get_ident()}"
            try:
                group.mkdir()
                try:
                    (group / interface.limit).write_text(str(self._limit_bytes))
                except OSError:
                    group.rmdir()
                    raise
            except OSError as error:
                reasons.append(f"{group}: {error.strerror}")
                continue
            with contextlib.suppress(OSError):  # where the kernel has no swap accounting
                (group / interface.swap[0]).write_text(interface.swap[1])
            self._group, self._interface = group, interface
            return self
        raise NoCage("; ".join(reasons) or "no memory cgroup is mounted")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._group is None:
            return
        end = time.monotonic() + _REMOVE_S
        while True:  # what has ended leaves its group a moment later
            try:
                self._group.rmdir()
                return
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    def run(self, command: Sequence[str], *, timeout_s: float, environment: Mapping[str, str] | None = None) -> Caged:
        """Run a command in the group.

        Args:
            command: the program and its arguments.
            timeout_s: it is killed after that.
            environment: its environment; by default this process's.
        """
        group = self._need_group()
        with contextlib.suppress(OSError):
            (group / self._interface.peak).write_text("0")
        before = self._num_killed()
        # The shell moves itself in before it becomes the command, so that nothing of it is counted elsewhere.
        moved = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs"), *command]
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            begin = time.monotonic()
            child = subprocess.Popen(moved, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environment)
            anonymous_bytes, returncode = 0, None
            try:
                while time.monotonic() - begin < timeout_s and (returncode := child.poll()) is None:
                    anonymous_bytes = max(anonymous_bytes, self.stat(self._interface.anonymous))
                    time.sleep(_SAMPLE_S)
            finally:
                if child.poll() is None:
                    child.kill()
                child.wait()
            seconds = time.monotonic() - begin
            out.seek(0), err.seek(0)
            return Caged(
                returncode=returncode,
                num_killed=self._num_killed() - before,
                seconds=seconds,
                peak_bytes=self._number(self._interface.peak),
                anonymous_bytes=anonymous_bytes,
                stdout=out.read().decode(errors="replace"),
                stderr=err.read().decode(errors="replace"),
            )

    def stat(self, name: str) -> int:
        """One line of memory.stat."""
        return _value((self._need_group() / "memory.stat").read_text(), name)

    @property
    def cached_bytes(self) -> int:
        """The page cache that is charged to the group now."""
        return self.stat(self._interface.cached)

    def _need_group(self) -> Path:
        if self._group is None:
            raise NoCage("the cage is used outside of its `with`")
        return self._group

    def _num_killed(self) -> int:
        file, name = self._interface.events
        return _value((self._need_group() / file).read_text(), name)

    def _number(self, file: str) -> int:
        try:
            return int((self._need_group() / file).read_text())
        except OSError:  # memory.peak is there since Linux 5.19
            return 0


def _value(text: str, name: str) -> int:
    return next((int(line.split()[1]) for line in text.splitlines() if line.split()[0] == name), 0)


def _parents() -> Iterator[tuple[_Interface, Path]]:
    """Groups in which one can perhaps be made."""
    for line in _MOUNTS.read_text().splitlines():
        _, point, kind, options, *_ = line.split()
        if kind == "cgroup" and "memory" in options.split(","):
            yield _V1, Path(point) / _own_path("memory").lstrip("/")
        if kind == "cgroup2" and "memory" in (Path(point) / "cgroup.controllers").read_text().split():
            with contextlib.suppress(OSError):
                (Path(point) / "cgroup.subtree_control").write_text("+memory")
            yield _V2, Path(point)


def _own_path(controller: str) -> str:
    for line in _OWN_GROUPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return "/"
