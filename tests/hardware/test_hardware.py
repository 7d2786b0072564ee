import json
from pathlib import Path

import numpy as np
import pytest

from loadstone.hardware import measure, memory
from loadstone.hardware.memory import PeakWatch, host_memory, resident
from loadstone.hardware.probe import machine


def test_the_peak_sees_memory_that_is_gone_again() -> None:
    with PeakWatch() as watch:
        before = resident().anonymous_bytes
        np.ones(200 << 20, np.uint8).sum()
    assert watch.peak.anonymous_bytes >= before + (150 << 20)


def test_the_cpu_is_always_the_last_device() -> None:
    found = machine()
    assert found.devices[-1].id == "cpu"
    assert 0 < found.devices[-1].free_bytes <= found.devices[-1].total_bytes


@pytest.mark.parametrize(
    ("line", "folder", "files", "stat"),
    [
        (
            "5:memory:/box/inner",
            "memory/box",
            {"memory.limit_in_bytes": "1000000", "memory.usage_in_bytes": "700000"},
            "cache 5\ninactive_file 9\ntotal_inactive_file 400000\ntotal_active_file 100000\n",
        ),
        (
            "0::/box/inner",
            "box",
            {"memory.max": "1000000", "memory.current": "700000"},
            "anon 5\ninactive_file 400000\nactive_file 100000\n",
        ),
    ],
    ids=["v1", "v2"],
)
def test_a_container_limit_counts_less_what_can_be_reclaimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, folder: str, files: dict[str, str], stat: str
) -> None:
    group = tmp_path / folder
    (group / "inner").mkdir(parents=True)
    for name, content in files.items():
        (group / name).write_text(content)
    (group / "memory.stat").write_text(stat)
    process = tmp_path / "cgroup"
    process.write_text(line + "\n")
    monkeypatch.setattr(memory, "_CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(memory, "_CGROUP_FILE", process)
    assert host_memory() == (1_000_000, 1_000_000 - 200_000)


def test_an_unlimited_group_is_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    process = tmp_path / "cgroup"
    process.write_text("0::/\n")
    monkeypatch.setattr(memory, "_CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(memory, "_CGROUP_FILE", process)
    assert host_memory()[0] > 1 << 20


def test_rates_are_measured_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(9 << 20))
    monkeypatch.setattr(measure, "_MEMORY_BYTES", 16 << 20)
    rates = measure.measure(weights, tmp_path / "cache")
    assert rates.copy_bytes_per_s
    assert rates.copy_bytes_per_s > 1e6
    monkeypatch.setattr(measure, "_memory_rate", lambda _: pytest.fail("measured again"))
    assert measure.measure(weights, tmp_path / "cache") == rates


def test_a_damaged_cache_is_as_none(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(10))
    assert measure.cached(weights, tmp_path) is None
    file = measure._cache_file(weights, tmp_path)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"bananas": 1}))
    assert measure.cached(weights, tmp_path) is None
