"""The commands on a tiny model, as a user runs them."""

import io
import json
import sys
from pathlib import Path

import pytest

from loadstone.cli import run_command
from loadstone.cli.app import main
from loadstone.hardware.spec import Rates


@pytest.fixture(autouse=True)
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring this machine takes longer than the tests."""
    rates = Rates(disk_bytes_per_s=1e9, copy_bytes_per_s=1e10, touch_bytes_per_s=2e9)
    monkeypatch.setattr("loadstone.hardware.measure.measure", lambda *_: rates)


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["loadstone", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        main()
    captured = capsys.readouterr()
    assert not caught.value.code, captured.err
    return captured.out


def test_inspect_shows_blocks_and_explains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chatty_folder: Path
) -> None:
    out = run(monkeypatch, capsys, "inspect", chatty_folder)
    assert "model.layers.0 … 1" in out
    assert "num_key_value_heads" in out
    assert "(multi-head attention)" in out


def test_inspect_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chatty_folder: Path
) -> None:
    data = json.loads(run(monkeypatch, capsys, "inspect", chatty_folder, "--json"))
    assert data["totals"]["tensors"] == len(data["tensors"])
    assert {fact["field"] for fact in data["config"]} >= {"model_type", "vocab_size"}


def test_the_walk_tells_every_step_with_names_and_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chatty_folder: Path
) -> None:
    out = run(monkeypatch, capsys, "inspect", "--walk", chatty_folder)
    for words in (
        "1. headers",
        "model.safetensors",
        "LlamaConfig",
        "LlamaForCausalLM",
        "eval mode",
        "generation config",
    ):
        assert words in out
    steps = json.loads(run(monkeypatch, capsys, "inspect", "--walk", chatty_folder, "--json"))
    assert [step["step"] for step in steps][:4] == ["headers", "plan", "import", "class"]
    assert all(step["seconds"] >= 0 and step["purpose"] for step in steps)


def test_load_prints_the_report_beside_the_limits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chatty_folder: Path
) -> None:
    out = run(monkeypatch, capsys, "load", chatty_folder, "--dtype", "bf16")
    assert "bfloat16: asked for" in out
    assert "disk 1.00 GB/s" in out
    report = json.loads(run(monkeypatch, capsys, "load", chatty_folder, "--json"))
    assert report["rates"]["copy_bytes_per_s"] == 1e10
    assert report["phases"][0]["stage"] == "headers"


def test_run_answers_and_ends_with_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chatty_folder: Path
) -> None:
    told = run(monkeypatch, capsys, "run", chatty_folder, "a b", "--max-new-tokens", 5, "--temperature", 0)
    assert told.strip()
    data = json.loads(
        run(monkeypatch, capsys, "run", chatty_folder, "a b", "--max-new-tokens", 5, "--temperature", 0, "--json")
    )
    assert data["text"].strip() == told.strip()
    assert data["num_prompt_tokens"] == 6
    assert 1 <= data["num_new_tokens"] <= 5
    assert data["peak_bytes"] > 0


def test_run_reads_standard_input_and_skips_the_template_when_raw(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chatty_folder: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a b c\n"))
    data = json.loads(run(monkeypatch, capsys, "run", chatty_folder, "--raw", "--max-new-tokens", 1, "--json"))
    assert data["num_prompt_tokens"] == 3


def test_the_same_seed_gives_the_same_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chatty_folder: Path
) -> None:
    options = ("run", chatty_folder, "a", "--temperature", 1.0, "--seed", 7, "--max-new-tokens", 8)
    assert run(monkeypatch, capsys, *options) == run(monkeypatch, capsys, *options)


@pytest.mark.parametrize("command", ["inspect", "load", "run", "convert", "machine", "verify"])
def test_help_has_examples(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str) -> None:
    out = run(monkeypatch, capsys, command, "--help")
    assert "Examples" in out
    assert f"loadstone {command}" in out


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from loadstone import __version__

    assert run(monkeypatch, capsys, "--version").strip() == f"loadstone {__version__}"


def test_one_argument_that_is_no_source_is_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert run_command._source_and_prompt("hello", None) == (None, "hello")
    monkeypatch.setattr(sys, "stdin", io.StringIO("why?"))
    assert run_command._source_and_prompt("gpt2", None) == ("gpt2", "why?")
    assert run_command._source_and_prompt("why is it so?", None) == (None, "why is it so?")
    assert run_command._source_and_prompt("demo", "hello") == (None, "hello")
    assert run_command._source_and_prompt("org/name", "hello") == ("org/name", "hello")


def test_commands_without_a_source_use_the_demo_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chatty_folder: Path
) -> None:
    monkeypatch.setattr("loadstone.checkpoint.demo.demo_model", lambda _: chatty_folder)
    assert "LlamaForCausalLM" in run(monkeypatch, capsys, "load")


def test_a_variant_a_subfolder_and_a_prefix_are_named_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chatty_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    inner = tmp_path / "inner"
    inner.mkdir()
    state = load_file(chatty_folder / "model.safetensors")
    save_file({f"policy.{name}": tensor for name, tensor in state.items()}, inner / "model.fp16.safetensors")
    (inner / "config.json").write_bytes((chatty_folder / "config.json").read_bytes())
    where = (tmp_path, "--subfolder", "inner", "--variant", "fp16", "--prefix", "policy.")
    report = json.loads(run(monkeypatch, capsys, "load", *where, "--json"))
    assert report["files"] == [str(inner / "model.fp16.safetensors")]
    patterns = ("--select", "lm_head.*", "--select", "model.norm.*")
    found = json.loads(run(monkeypatch, capsys, "inspect", *where, *patterns, "--json"))
    assert sorted(tensor["name"] for tensor in found["tensors"]) == ["lm_head.weight", "model.norm.weight"]
    assert "LlamaForCausalLM is ready" in run(monkeypatch, capsys, "inspect", "--walk", *where)
