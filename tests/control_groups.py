"""Control groups for tests: folders of files that look like them, and real ones where they can be made."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from loadstone.hardware import cgroup, mounts


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    *,
    lines: str,
    mounted: str,
    files: Mapping[str, Mapping[str, str]],
) -> None:
    """Make this process believe that it is in other groups.

    Args:
        monkeypatch: takes the belief away again.
        folder: an empty one.
        lines: of /proc/self/cgroup.
        mounted: of /proc/self/mountinfo; `@` stands for the folder.
        files: by folder below `folder`, the files in it.
    """
    for name, contents in files.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file, text in contents.items():
            (folder / name / file).write_text(text + "\n")
    (folder / "self-cgroup").write_text(lines)
    (folder / "mountinfo").write_text(mounted.replace("@", str(folder)))
    monkeypatch.setattr(cgroup, "CGROUP_FILE", folder / "self-cgroup")
    monkeypatch.setattr(mounts, "MOUNTINFO", folder / "mountinfo")


@contextmanager
def real_group(*limits: int) -> Iterator[Path]:
    """A cgroup v1 memory group for each limit, each inside the one before; a child process can join the innermost.

    The test is skipped where none can be made.
    """
    own = next((group for group in cgroup.groups("memory") if group.version == 1), None)
    if own is None:
        pytest.skip("no cgroup v1 memory controller here")
    made: list[Path] = []
    try:
        try:
            for depth, limit in enumerate(limits):
                made.append((made[-1] if made else own.folder) / f"loadstone-test-{os.getpid()}-{depth}")
                made[-1].mkdir()
                (made[-1] / "memory.limit_in_bytes").write_text(str(limit))
        except OSError as error:
            pytest.skip(f"no control group can be made here: {error}")
        yield made[-1]
    finally:
        for group in reversed(made):
            if group.is_dir():
                for process in (group / "cgroup.procs").read_text().split():
                    os.kill(int(process), signal.SIGKILL)
                    os.waitpid(int(process), 0)
                group.rmdir()
