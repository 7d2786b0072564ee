"""`loadstone machine` as a user runs it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loadstone.cli.app import main
from loadstone.hardware import measure, memory
from loadstone.hardware.machine_file import gallery, read_machine
from loadstone.hardware.measured import MeasuredDevice, with_measures
from loadstone.hardware.spec import ComputeRate, Limit

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object, width: int = 80) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["loadstone", "machine", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", str(width))
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), "\n".join(line.rstrip() for line in out.splitlines()), err

    return call


def test_this_machine_is_shown_with_its_memory_and_limits(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = Limit(what="cgroup v2 /box memory.max", limit_bytes=4 * 10**9, used_bytes=10**9)
    monkeypatch.setattr("loadstone.hardware.probe.host_limits", lambda: (limit,))
    monkeypatch.setattr("loadstone.hardware.probe.host_memory", lambda _: (4 * 10**9, 3 * 10**9))
    code, out, _ = run(width=120)
    assert code == 0
    assert "█████░░░░░░░░░░░░░░░ 3.00 GB of 4.00 GB" in out
    assert "cgroup v2 /box memory.max allows 4.00 GB, of which 1.00 GB is used and cannot be reclaimed: 3.00 GB" in out
    assert "not measured yet; --measure does it" in out
    assert "products" not in out


def test_a_machine_without_limits_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadstone.hardware.probe.host_limits", lambda: ())
    assert "limits     none: all of the machine's memory may be used" in run()[1]


def test_a_machine_of_the_gallery_fits_80_columns(run: Run) -> None:
    code, out, err = run("workstation-2x-rtx3090")
    assert (code, err) == (0, "")
    assert max(len(line) for line in out.splitlines()) <= 80
    assert out.splitlines()[:4] == [
        "device  name                free of total memory         capability  from host",
        "cuda:0  NVIDIA GeForce RTX  █░░░░░░░ 22.7 GB of 25.3 GB  8.6         25.2 GB/s",
        "        3090",
        "cuda:1  NVIDIA GeForce RTX  █░░░░░░░ 22.7 GB of 25.3 GB  8.6         25.2 GB/s",
    ]
    assert "cuda:0 … 1  float32             749 GB/s  21.4 TFLOPS" in out


def test_the_gallery_is_a_table_or_a_list(run: Run) -> None:
    _, out, _ = run("--gallery")
    assert [line.split()[0] for line in out.splitlines()[1:] if line[0] != " "] == gallery()
    assert "8 × NVIDIA H100 80GB HBM3" in out
    assert [machine["name"] for machine in json.loads(run("--gallery", "--json")[1])] == gallery()


def test_json_is_what_is_saved_and_can_be_given_back(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "gpu-box.json"
    code, out, err = run("desktop-rtx4090-24gb", "--save", file, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads(file.read_text())
    assert run(file, "--json")[1] == out


def test_this_machine_is_saved_under_the_name_of_the_file(run: Run, tmp_path: Path) -> None:
    code, _, err = run("--save", tmp_path / "gpu-box.json")
    assert code == 0
    assert "saved as" in err
    assert read_machine(tmp_path / "gpu-box.json").name == "gpu-box"
    assert "machine    gpu-box" in run(tmp_path / "gpu-box.json")[1]


def test_what_is_measured_is_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    rate = ComputeRate(weight_bytes_per_s=1.5e10, flops_per_s=9.9e10, step_s=0.0021)
    monkeypatch.setattr(
        measure,
        "measure_machine",
        lambda machine, *_: with_measures(machine, {"cpu": MeasuredDevice(compute={"float32": rate})}),
    )
    assert "cpu       float32           15.0 GB/s  99.0 GFLOPS            2 ms" in run("--measure")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("desktop-rtx",), "desktop-rtx: expected a machine that was saved or one of the gallery (arc-a770, "),
        (("box.json",), "box.json: machine.devices[0].total_bytes: expected a number above 0, found -1; correct it"),
        (("mi300x", "--measure"), "measure: expected no machine beside it, found mi300x"),
        (("--model", "gone"), "model: expected a folder or a file, found nothing at gone"),
        (("mi300x", "--gallery"), "--gallery: expected only --json beside it"),
        (("mi300x", "--save", "/proc/no/box.json"), "/proc/no"),
    ],
)
def test_a_fault_is_one_sentence(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    host = {"id": "cpu", "kind": "cpu", "name": "", "total_bytes": -1, "free_bytes": 0}
    machine = {"loadstone_machine": 1, "devices": [host], "cpu": {"name": "", "num_cores": 1}}
    (tmp_path / "box.json").write_text(json.dumps(machine))
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("loadstone: ")
    assert err.count("\n") == 1
    assert words in err
    assert [path.name for path in tmp_path.iterdir()] == ["box.json"]


def test_limits_of_a_real_process_are_sentences(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.cgroup, "memory_limits", list)
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 30, 1 << 30))
    assert "ulimit -v allows 1.07 GB" in run(width=120)[1]
