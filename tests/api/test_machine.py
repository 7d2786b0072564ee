"""`loadstone.machine`: this machine, another one, and what cannot be asked of another one."""

import subprocess
import sys
from pathlib import Path

import pytest

import loadstone
from loadstone.errors import InvalidMachine
from loadstone.hardware import measure


def test_without_a_name_it_is_the_one_at_hand(caches: Path) -> None:
    found = loadstone.machine()
    assert found.name == ""
    assert [disk.path for disk in found.disks] == [caches / "loadstone"]


def test_with_a_name_it_is_that_of_the_gallery() -> None:
    assert loadstone.machine("mi300x").devices[0].name == "AMD Instinct MI300X (ROCm)"
    with pytest.raises(InvalidMachine, match='did you mean "mi300x"'):
        loadstone.machine("mi300")


def test_another_machine_is_read_without_torch_and_what_is_slow_to_import() -> None:
    code = "import sys, loadstone; loadstone.machine('server-8x-h100-80gb'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "numpy", "psutil", "rich", "typer", "transformers"}


def test_only_the_machine_at_hand_can_be_measured() -> None:
    with pytest.raises(ValueError, match="measure: expected no machine beside it, found mi300x"):
        loadstone.machine("mi300x", measure=True)
    with pytest.raises(ValueError, match="model: expected no machine beside it, found mi300x"):
        loadstone.machine("mi300x", model=".")


def test_a_model_that_is_not_there_is_no_disk(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model: expected a folder or a file, found nothing at .*gone"):
        loadstone.machine(model=tmp_path / "gone")


def test_the_disk_of_the_model_is_the_one_that_is_measured(
    tmp_path: Path, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(measure, "measure_machine", lambda *arguments: asked.append(arguments) or arguments[0])
    found = loadstone.machine(model=tmp_path, measure=True)
    assert asked == [(found, tmp_path, caches / "loadstone")]
    assert [disk.path for disk in found.disks] == [tmp_path, caches / "loadstone"]
