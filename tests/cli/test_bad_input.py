"""Bad input: one clear sentence on standard error that says what to do, exit code 2, no traceback, no code run."""

import json
import os
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("load x --bananas", "No such option: --bananas; see `loadstone load --help`."),
        ("bananas", "No such command 'bananas'; see `loadstone --help`."),
        ("plan x --context 2.5", "'--context': expected a whole number, found '2.5'; see `loadstone plan --help`."),
        ("load x --batch many", "'--batch': expected a whole number, found 'many'; see `loadstone load --help`."),
        ("plan x --context", "Option '--context' requires an argument; see `loadstone --help`."),
        ("inspect x y z", "unexpected extra argument"),
        ("convert", "Missing argument"),
    ],
)
def test_a_command_line_that_is_wrong_itself(run: Run, arguments: str, words: str) -> None:
    one_sentence(run(*arguments.split()), words)


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


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Files that are no plans, no machines and no device maps."""
    folder = tmp_path / "foreign"
    (folder / "folder.json").mkdir(parents=True)
    (folder / "binary.json").write_bytes(bytes(range(128, 256)))
    (folder / "list.json").write_text("[1, 2]")
    (folder / "other.json").write_text('{"gpus": 2}')
    (folder / "empty.json").write_text("")
    with (folder / "large.json").open("wb") as file:
        file.truncate(10**9)
    os.mkfifo(folder / "pipe.json")
    return folder


FOREIGN = {
    "folder.json": "expected a regular file, found a folder; pass the file itself",
    "binary.json": "expected UTF-8, found an invalid byte at 0",
    "list.json": "expected a JSON object, found a list",
    "other.json": "gpus",
    "empty.json": "expected JSON, found what does not parse",
    "large.json": "found 1.00 GB; this is not the file its name says",
    "pipe.json": "found a pipe, socket or device",
    "missing.json": "missing.json",
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize(
    "command", ["machine", "plan --machine", "plan --diff", "plan --device-map", "load --plan", "load --device-map"]
)
def test_a_file_of_something_else(run: Run, chatty_folder: Path, foreign: Path, command: str, name: str) -> None:
    first, *option = command.split()
    source = [chatty_folder] if option else []
    words = "has no loadstone_plan" if name == "other.json" and option in (["--diff"], ["--plan"]) else FOREIGN[name]
    outcome = run(first, *source, *option, foreign / name)
    one_sentence(outcome, words)
    assert "download" not in outcome[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--max-memory lots", "max_memory of cpu: expected a size such as 5GB, 500MB or 2GiB, found 'lots'"),
        ("--max-memory 0", "found '0'"),
        ("--max-memory -1GB", "found '-1GB'"),
        ("--max-memory nan", "found 'nan'"),
        ("--max-memory cpu=1GB,cpu=2GB", "cpu is named twice"),
        ("--max-memory cpu=", "expected device=size pairs"),
        ("--max-memory cuda:9=1GB", 'device "cuda:9" is not on this machine'),
        ("--max-memory 1kB", "the model does not fit on cpu"),
        ("--context 0", "context is 0; expected a whole number above zero"),
        ("--context -1", "context is -1; expected a whole number above zero"),
        ("--batch 0", "batch is 0; expected a whole number above zero"),
        ("--device cpu --device-map cpu", "device and device_map both say where the model goes"),
        ("--device-map disk --no-offload", 'device_map puts modules on "disk", which offload=False forbids'),
        ("--device-map tpu", 'device_map: device "tpu" is not on this machine'),
    ],
)
@pytest.mark.parametrize("command", ["plan", "load"])
def test_what_means_nothing_or_contradicts_itself(
    run: Run, chatty_folder: Path, command: str, arguments: str, words: str
) -> None:
    code, _, err = run(command, chatty_folder, *arguments.split())
    assert code == 2, err
    # What fits instead is drawn before the sentence.
    assert err.count("\n") == 1 or "fit" in words
    assert err.splitlines()[-1].startswith("loadstone: ")
    assert words in err.splitlines()[-1]


@pytest.mark.parametrize(
    "option", ["--dtype float32", "--max-memory 1GB", "--no-offload", "--context 9", "--device cpu"]
)
def test_a_plan_and_what_it_says_already(run: Run, chatty_folder: Path, tmp_path: Path, option: str) -> None:
    assert run("plan", chatty_folder, "--save", tmp_path / "plan.json")[0] == 0
    outcome = run("load", chatty_folder, "--plan", tmp_path / "plan.json", *option.split())
    one_sentence(outcome, "plan= says everything already")


def test_a_file_that_cannot_be_written(run: Run, chatty_folder: Path, foreign: Path) -> None:
    for option in ("--save", "--html", "--save-device-map"):
        one_sentence(run("plan", chatty_folder, option, foreign / "folder.json"), "folder.json: Is a directory; check")
    one_sentence(run("machine", "--save", foreign / "other.json" / "x.json"), "other.json: File exists; check the path")
    assert {path.name for path in foreign.iterdir()} == {*FOREIGN} - {"missing.json"}


@pytest.mark.parametrize("command", ["machine", "plan --machine"])
def test_a_machine_without_a_name(run: Run, chatty_folder: Path, command: str) -> None:
    first, *option = command.split()
    source = [chatty_folder] if option else []
    one_sentence(run(first, *source, *option, ""), "expected a machine that was saved or one of the gallery")
