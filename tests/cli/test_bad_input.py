"""Bad input: one clear sentence on standard error that says what to do, exit code 2, no traceback, no code run."""

import json
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loadstone.cli.app import main

Outcome = tuple[int, str, str]
Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["loadstone", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def header(tensors: dict[str, object], payload: int = 0) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + bytes(payload)


def one_sentence(outcome: Outcome, *words: str) -> None:
    code, _, err = outcome
    assert code == 2, err
    assert "Traceback" not in err
    assert err.startswith("loadstone: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


COMMANDS = ["inspect", "load"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_that_does_not_exist(run: Run, tmp_path: Path, command: str) -> None:
    one_sentence(run(command, tmp_path / "nowhere"), "nowhere", "expected a file, a folder or a hub id")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_without_weights(run: Run, tmp_path: Path, command: str) -> None:
    (tmp_path / "README.md").write_text("hello")
    one_sentence(run(command, tmp_path), "expected model.safetensors", "README.md")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_text_file(run: Run, tmp_path: Path, command: str) -> None:
    (tmp_path / "notes.txt").write_text("these are no weights " * 10)
    one_sentence(run(command, tmp_path / "notes.txt"), "notes.txt")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_truncated_file(run: Run, tmp_path: Path, command: str) -> None:
    content = header({"a": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}, payload=3000)
    (tmp_path / "model.safetensors").write_bytes(content)
    one_sentence(run(command, tmp_path), "model.safetensors", "ownload it again")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_header_that_lies_about_sizes(run: Run, tmp_path: Path, command: str) -> None:
    content = header({"a": {"dtype": "F32", "shape": [7], "data_offsets": [0, 4]}}, payload=4)
    (tmp_path / "model.safetensors").write_bytes(content)
    one_sentence(run(command, tmp_path), "model.safetensors", "28", "4")


@pytest.mark.parametrize("command", COMMANDS)
def test_an_index_that_names_a_missing_shard(run: Run, tmp_path: Path, command: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    )
    one_sentence(run(command, tmp_path), "model-00001-of-00002.safetensors")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd"])
def test_an_index_that_points_outside_the_folder(run: Run, tmp_path: Path, shard: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    one_sentence(run("inspect", tmp_path), "model.safetensors.index.json", shard)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path(self.path),))  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_code_in_a_pickle_is_named_and_not_run(run: Run, tmp_path: Path, command: str) -> None:
    import torch

    evil = Evil()
    evil.path = str(tmp_path / "was-run")  # type: ignore[attr-defined]
    torch.save({"weight": torch.ones(2), "evil": evil}, tmp_path / "pytorch_model.bin")
    one_sentence(run(command, tmp_path), "pytorch_model.bin", "getattr")
    assert not (tmp_path / "was-run").exists()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(evil))
    one_sentence(run(command, tmp_path), "pytorch_model.bin")
    assert not (tmp_path / "was-run").exists()


def test_an_empty_prompt(run: Run, tmp_path: Path) -> None:
    one_sentence(run("run", tmp_path, "  "), "the prompt is empty")


def test_an_unknown_model_type(run: Run, tmp_path: Path) -> None:
    content = header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, payload=4)
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "config.json").write_text('{"model_type": "qwen22"}')
    one_sentence(run("load", tmp_path), 'model_type "qwen22"', "qwen2", "into=")


def test_no_config(run: Run, tmp_path: Path) -> None:
    content = header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, payload=4)
    (tmp_path / "model.safetensors").write_bytes(content)
    one_sentence(run("load", tmp_path), "there is no config.json beside the weights")


def test_an_unknown_option_is_explained_by_the_command_line_itself(run: Run, tmp_path: Path) -> None:
    code, _, err = run("load", tmp_path, "--bananas")
    assert code == 2
    assert "bananas" in err


def test_a_dtype_that_does_not_exist(run: Run, tmp_path: Path) -> None:
    content = header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, payload=4)
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    one_sentence(run("load", tmp_path, "--dtype", "bf17"), "dtype='bf17'", "bfloat16")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_variant_that_is_not_there(run: Run, tmp_path: Path, command: str) -> None:
    content = header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, payload=4)
    (tmp_path / "model.bf16.safetensors").write_bytes(content)
    one_sentence(run(command, tmp_path, "--variant", "fp16"), 'variant "fp16"', "found bf16")
    one_sentence(run(command, tmp_path), 'pass variant="bf16"')


@pytest.mark.parametrize("command", COMMANDS)
def test_a_prefix_and_a_selection_that_match_nothing(run: Run, tmp_path: Path, command: str) -> None:
    content = header({"net.a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, payload=4)
    (tmp_path / "model.safetensors").write_bytes(content)
    one_sentence(run(command, tmp_path, "--prefix", "unet."), "begin with 'unet.'", "net. (1)")
    one_sentence(run(command, tmp_path, "--select", "b*"), "select='b*'", "net.a")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_subfolder_outside_the_source(run: Run, tmp_path: Path, command: str) -> None:
    one_sentence(run(command, tmp_path, "--subfolder", "../x"), "subfolder='../x'", "inside the source")
