"""What memory this process has and may have; in real control groups, against what the kernel then lets it take."""

import json
import mmap
import os
import resource
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

import control_groups
from loadstone.hardware import memory
from loadstone.hardware.memory import PeakWatch, host_limits, host_memory, num_bound_cores, num_cores, resident

MB = 1 << 20


def test_the_peak_sees_memory_that_is_gone_again() -> None:
    with (
        PeakWatch() as watch,
        mmap.mmap(-1, 200 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held_pages,
    ):
        before = resident().anonymous_bytes
        np.frombuffer(held_pages, np.uint8).fill(1)
        held = resident().anonymous_bytes
        deadline = time.monotonic() + 30
        while watch.peak.anonymous_bytes < held and time.monotonic() < deadline:
            time.sleep(0.01)
    assert watch.peak.anonymous_bytes >= before + 150 * MB


@pytest.fixture
def no_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control_groups.pretend(monkeypatch, tmp_path, lines="", mounted="", files={})


def test_the_least_limit_decides_the_total_and_the_least_rest_the_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = {"memory.max": str(4 * MB), "memory.current": str(1 * MB), "memory.stat": ""}
    outer = {"memory.max": str(8 * MB), "memory.current": str(6 * MB), "memory.stat": f"inactive_file {1 * MB}"}
    control_groups.pretend(
        monkeypatch,
        tmp_path,
        lines="0::/a/b\n",
        mounted="41 31 0:38 / @/v2 rw - cgroup2 cgroup2 rw\n",
        files={"v2/a/b": group, "v2/a": outer},
    )
    assert host_memory() == (4 * MB, 3 * MB)
    assert [limit.what for limit in host_limits()] == ["cgroup v2 /a/b memory.max", "cgroup v2 /a memory.max"]


@pytest.mark.usefixtures("no_groups")
def test_without_limits_it_is_the_memory_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  1000 kB\nMemFree: 10 kB\nMemAvailable:  400 kB\nHugePages_Total:  0\n")
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    assert host_limits() == ()
    assert host_memory() == (1000 * 1024, 400 * 1024)


@pytest.mark.usefixtures("no_groups")
def test_a_limit_beyond_the_machine_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 50, 1 << 50))
    assert host_limits() == ()


@pytest.mark.usefixtures("no_groups")
def test_where_proc_is_missing_the_system_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_MEMINFO", "_STATM", "_STATUS", "_OVERCOMMIT"):
        monkeypatch.setattr(memory, name, tmp_path / "none")
    total, free = host_memory()
    assert 0 < free <= total
    assert resident().anonymous_bytes > 0
    assert host_limits() == ()


@pytest.mark.usefixtures("no_groups")
def test_strict_overcommit_is_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text(
        "MemTotal: 1000 kB\nMemAvailable: 900 kB\nCommitLimit: 500 kB\nCommitted_AS: 300 kB\n"
    )
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    (tmp_path / "overcommit").write_text("2\n")
    monkeypatch.setattr(memory, "_OVERCOMMIT", tmp_path / "overcommit")
    assert host_memory() == (500 * 1024, 200 * 1024)
    (tmp_path / "overcommit").write_text("0\n")
    assert host_memory() == (1000 * 1024, 900 * 1024)


def test_a_quota_is_rounded_up_to_whole_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.os, "sched_getaffinity", lambda _: set(range(64)))
    for quota, cores in (("150000", 2), ("1000", 1), ("9900000", 64)):
        control_groups.pretend(
            monkeypatch,
            tmp_path,
            lines="0::/\n",
            mounted="41 31 0:38 / @/v2 rw - cgroup2 cgroup2 rw\n",
            files={"v2": {"cpu.max": f"{quota} 100000"}},
        )
        assert num_cores() == cores
        assert num_bound_cores() == 64


def child(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python in a fresh process that has imported what tells its memory."""
    script = "import mmap, json, os, resource, sys\nfrom loadstone.hardware.memory import host_limits, host_memory\n"
    return subprocess.run(
        [sys.executable, "-c", script + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
@pytest.mark.skipif(sys.platform != "linux", reason="other kernels do not enforce it")
def test_ulimit_leaves_what_can_truly_be_allocated(kind: str) -> None:
    done = child(
        """
        limit = 400 << 20
        resource.setrlimit(getattr(resource, sys.argv[1]), (limit, limit))
        total, free = host_memory()
        kept = []
        try:
            while True:
                kept.append(mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE))
        except OSError:
            print(json.dumps([total, free, len(kept) << 20, [limit.what for limit in host_limits()]]))
        """,
        kind,
    )
    total, free, taken, names = json.loads(done.stdout)
    assert total == 400 * MB
    assert abs(free - taken) <= 2 * MB
    assert names[-1] == {"RLIMIT_AS": "ulimit -v", "RLIMIT_DATA": "ulimit -d"}[kind]


TAKE_ALL = """
os.write(os.open(sys.argv[1] + "/cgroup.procs", os.O_WRONLY), b"0")
with open(sys.argv[2], "rb", buffering=0) as file:  # into the page cache, which then counts as this group's
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    while file.read(1 << 20):
        pass
usage = int(open(sys.argv[1] + "/memory.usage_in_bytes").read())
print(json.dumps([*host_memory(), usage, [limit.what for limit in host_limits()]]), flush=True)
while True:
    taken = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE)
    for page in range(0, 1 << 20, mmap.PAGESIZE):
        taken[page] = 1
    kept = [*globals().get("kept", ()), taken]
    os.write(1, b".")
"""


@pytest.mark.parametrize(
    "limits", [(160 * MB,), (160 * MB, 400 * MB), (400 * MB, 160 * MB)], ids=["alone", "outer", "inner"]
)
@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_a_group_kills_what_takes_more_than_is_said_to_be_free(tmp_path: Path, limits: tuple[int, ...]) -> None:
    cached = tmp_path / "cached"
    with cached.open("wb") as file:
        file.write(bytes(60 * MB))
        file.flush()
        os.fsync(file.fileno())  # clean pages can be dropped and read again, as the child's
    with control_groups.real_group(*limits) as group:
        done = child(TAKE_ALL, group, cached)
    said, _, dots = done.stdout.partition("\n")
    total, free, usage, names = json.loads(said)
    assert done.returncode == -9, done.stderr
    assert total == 160 * MB
    assert usage >= 60 * MB  # the page cache counts as use
    assert free >= 160 * MB - usage + 40 * MB  # but not as memory that is gone
    assert 0.9 * free <= dots.count(".") * MB <= 1.02 * free
    assert any("memory.limit_in_bytes" in name for name in names)
