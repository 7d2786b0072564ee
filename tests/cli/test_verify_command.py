"""`loadstone verify`, as a user runs it."""

import json
import sys
from pathlib import Path

import pytest

from loadstone.checkpoint.manifest import NAME, format_manifest
from loadstone.cli.app import main
from malformed_base import GOOD


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    import hashlib

    (tmp_path / "model.safetensors").write_bytes(GOOD)
    (tmp_path / NAME).write_text(format_manifest({"model.safetensors": hashlib.sha256(GOOD).hexdigest()}))
    return tmp_path


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["loadstone", "verify", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as caught:
        main()
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_all_well_is_a_table_and_exit_code_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    code, out, err = run(monkeypatch, capsys, folder)
    assert code == 0
    assert err == ""
    row = next(line for line in out.splitlines() if line.startswith("model.safetensors"))
    assert "ok         ok       SHA-256 from SHA256SUMS" in row
    assert "all well; 1 tensors in order; content of 1 of 1 files as it should be" in out


def test_a_fault_is_told_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "model.safetensors").write_bytes(GOOD[:-1] + b"x")
    code, out, _ = run(monkeypatch, capsys, folder)
    assert code == 2
    assert "fault  " in out
    assert "expected SHA-256" in out
    assert "1 fault; 1 tensors in order" in out


def test_json_has_every_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "model.safetensors").write_bytes(GOOD[:-1])
    code, out, _ = run(monkeypatch, capsys, folder, "--json")
    told = json.loads(out)
    assert code == 2
    assert told["ok"] is False
    assert len(told["faults"]) == 2
    assert told["files"][0]["structure"] == told["files"][0]["content"] == "fault"


def test_structure_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(GOOD[:-1] + b"x")
    code, out, _ = run(monkeypatch, capsys, folder, "--structure-only")
    assert code == 0
    assert "not checked" in out


def test_no_checkpoint_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = run(monkeypatch, capsys, tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert err.startswith("loadstone: ")
    assert err.count("\n") == 1


def test_the_demo_model_by_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    monkeypatch.setattr("loadstone.checkpoint.demo.demo_model", lambda _: folder)
    assert run(monkeypatch, capsys)[0] == 0
