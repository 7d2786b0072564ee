"""Which groups a process is in and what they allow it, read from folders that look like the kernel's."""

from pathlib import Path

import pytest

import control_groups
from loadstone.hardware import cgroup

V1 = "35 31 0:32 {root} @/memory rw - cgroup cgroup rw,memory\n"
V2 = "41 31 0:38 {root} @/v2 rw - cgroup2 cgroup2 rw\n"
NO_LIMIT = "9223372036854771712"


def v1(limit: object, usage: int, stat: str = "", **more: str) -> dict[str, str]:
    files = {f"memory.{name}": text for name, text in more.items()}
    return {
        "memory.limit_in_bytes": str(limit),
        "memory.usage_in_bytes": str(usage),
        "memory.stat": stat,
        "memory.use_hierarchy": "1",
        **files,
    }


def v2(limit: object, usage: int, stat: str = "", high: object = "max") -> dict[str, str]:
    return {
        "memory.max": str(limit),
        "memory.high": str(high),
        "memory.current": str(usage),
        "memory.stat": stat,
    }


def found() -> list[tuple[str, int, int]]:
    return [(limit.what, limit.limit_bytes, limit.used_bytes) for limit in cgroup.memory_limits()]


def test_v1_counts_hierarchical_use_less_clean_file_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = (
        "cache 5\ninactive_file 9\nactive_file 9\ndirty 7\ntotal_cache 450\ntotal_shmem 99\ntotal_unevictable 50\n"
        "total_inactive_file 300\ntotal_active_file 100\ntotal_dirty 40\ntotal_writeback 10\n"
    )
    control_groups.pretend(
        monkeypatch,
        tmp_path,
        lines="5:cpu,memory:/box/inner\n",
        mounted=V1.format(root="/"),
        files={"memory/box/inner": v1(NO_LIMIT, 600), "memory/box": v1(1000, 700, stat), "memory": v1(NO_LIMIT, 9000)},
    )
    assert found() == [("cgroup v1 /box memory.limit_in_bytes", 1000, 700 - 400 + 50)]


def test_v1_memory_with_swap_is_a_limit_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swap = {"memsw.limit_in_bytes": "1500", "memsw.usage_in_bytes": "1400"}
    control_groups.pretend(
        monkeypatch,
        tmp_path,
        lines="5:memory:/\n",
        mounted=V1.format(root="/"),
        files={"memory": v1(1000, 500, "total_inactive_file 100", **swap)},
    )
    assert found() == [
        ("cgroup v1 / memory.limit_in_bytes", 1000, 400),
        ("cgroup v1 / memory.memsw.limit_in_bytes", 1500, 1300),
    ]


def test_v1_without_hierarchy_limits_only_the_group_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outer = {**v1(1000, 900), "memory.use_hierarchy": "0"}
    control_groups.pretend(
        monkeypatch,
        tmp_path,
        lines="5:memory:/a/b\n",
        mounted=V1.format(root="/"),
        files={"memory/a/b": v1(5000, 100), "memory/a": outer},
    )
    assert found() == [("cgroup v1 /a/b memory.limit_in_bytes", 5000, 100)]


def test_v2_counts_max_and_high_of_every_group_less_what_can_be_reclaimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = (
        "anon 100\nfile 900\nshmem 50\ninactive_file 300\nactive_file 200\nslab_reclaimable 60\nslab_unreclaimable 9\n"
        "file_dirty 30\nfile_writeback 10\n"
    )
    control_groups.pretend(
        monkeypatch,
        tmp_path,
        lines="0::/a/b\n",
        mounted=V2.format(root="/"),
        files={"v2/a/b": v2("max", 400, high=800), "v2/a": v2(1000, 900, stat), "v2": {"memory.stat": stat}},
    )
    assert found() == [
        ("cgroup v2 /a/b memory.high", 800, 400),
        ("cgroup v2 /a memory.max", 1000, 900 - 560 + 40),
    ]


def test_in_a_namespace_the_limits_are_at_the_mount_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control_groups.pretend(
        monkeypatch, tmp_path, lines="0::/\n", mounted=V2.format(root="/"), files={"v2": v2(1000, 300)}
    )
    assert found() == [("cgroup v2 / memory.max", 1000, 300)]


def test_a_bind_mount_shows_the_own_group_under_the_path_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control_groups.pretend(
        monkeypatch,
        tmp_path,
        lines="5:memory:/docker/abc/inner\n",
        mounted=V1.format(root="/docker/abc"),
        files={"memory/inner": v1(2000, 100), "memory": v1(1000, 300)},
    )
    assert found() == [
        ("cgroup v1 /docker/abc/inner memory.limit_in_bytes", 2000, 100),
        ("cgroup v1 /docker/abc memory.limit_in_bytes", 1000, 300),
    ]


@pytest.mark.parametrize("path", ["/elsewhere", "/../elsewhere"])
def test_a_group_that_no_mount_shows_leaves_what_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    root = "/docker/abc" if path == "/elsewhere" else "/"
    control_groups.pretend(
        monkeypatch, tmp_path, lines=f"0::{path}\n", mounted=V2.format(root=root), files={"v2": v2(1000, 300)}
    )
    assert found() == [(f"cgroup v2 {root} memory.max", 1000, 300)]


def test_of_two_mounts_the_one_that_shows_more_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control_groups.pretend(
        monkeypatch,
        tmp_path,
        lines="0::/a/b\n",
        mounted="50 31 0:38 /a/b @/part rw - cgroup2 cgroup2 rw\n" + V2.format(root="/"),
        files={"part": v2(900, 1), "v2/a/b": v2(900, 1), "v2/a": v2(500, 100)},
    )
    assert [limit for _, limit, _ in found()] == [900, 500]


def test_a_mount_hides_those_that_were_there_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control_groups.pretend(
        monkeypatch,
        tmp_path,
        lines="5:memory:/docker/abc/inner\n",
        mounted=V1.format(root="/") + V1.format(root="/docker/abc"),
        files={"memory/inner": v1(500, 100), "memory": v1(1000, 300)},
    )
    assert [limit for _, limit, _ in found()] == [500, 1000]


def test_hybrid_mounts_take_memory_from_v1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control_groups.pretend(
        monkeypatch,
        tmp_path,
        lines="4:memory:/a\n1:name=systemd:/a\n0::/a\n",
        mounted=V1.format(root="/") + V2.format(root="/"),
        files={"memory/a": v1(1000, 100), "v2/a": {"cgroup.procs": "1"}},
    )
    assert found() == [("cgroup v1 /a memory.limit_in_bytes", 1000, 100)]


def test_v1_tells_of_a_limit_around_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control_groups.pretend(
        monkeypatch,
        tmp_path,
        lines="5:memory:/\n",
        mounted=V1.format(root="/"),
        files={"memory": v1(NO_LIMIT, 300, "hierarchical_memory_limit 800\ntotal_active_file 100")},
    )
    assert found() == [("cgroup v1 of a group around this container", 800, 200)]


@pytest.mark.parametrize("missing", ["lines", "mounts"])
def test_a_kernel_that_tells_nothing_sets_no_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    control_groups.pretend(monkeypatch, tmp_path, lines="0::/\n", mounted=V2.format(root="/"), files={"v2": v2(9, 1)})
    (tmp_path / {"lines": "self-cgroup", "mounts": "mountinfo"}[missing]).unlink()
    assert cgroup.memory_limits() == []
    assert cgroup.cpu_quota() is None


@pytest.mark.parametrize(
    ("lines", "mounted", "files", "cores"),
    [
        ("0::/a\n", V2, {"v2/a": {"cpu.max": "max 100000"}, "v2": {"cpu.max": "250000 100000"}}, 2.5),
        ("0::/a\n", V2, {"v2/a": {"cpu.max": "50000 100000"}, "v2": {"cpu.max": "250000 100000"}}, 0.5),
        ("0::/a\n", V2, {"v2/a": {"cpu.max": "max 100000"}}, None),
        (
            "3:cpu:/\n",
            "35 31 0:32 {root} @/cpu rw - cgroup cgroup rw,cpu\n",
            {"cpu": {"cpu.cfs_quota_us": "300000", "cpu.cfs_period_us": "100000"}},
            3.0,
        ),
        (
            "3:cpu:/\n",
            "35 31 0:32 {root} @/cpu rw - cgroup cgroup rw,cpu\n",
            {"cpu": {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}},
            None,
        ),
    ],
)
def test_a_quota_of_time_is_a_number_of_cores(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: str,
    mounted: str,
    files: dict[str, dict[str, str]],
    cores: float | None,
) -> None:
    control_groups.pretend(monkeypatch, tmp_path, lines=lines, mounted=mounted.format(root="/"), files=files)
    assert cgroup.cpu_quota() == cores
