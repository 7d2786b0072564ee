"""`loadstone plan` as a user runs it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import loadstone
from loadstone.cli.app import main
from loadstone.errors import InvalidPlan
from loadstone.hardware.machine_file import save_machine
from loadstone.hardware.spec import ComputeRate, Cpu, Device, Machine, Rates
from loadstone.plan.plan_file import from_json

Outcome = tuple[int, str, str]
_COMMANDS = {"inspect", "load", "plan", "run", "convert", "machine", "verify"}
Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["loadstone", "plan", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


@pytest.fixture
def two_gpus(tmp_path: Path) -> Path:
    """A machine that is not this one."""
    path = tmp_path / "machine.json"
    gpu = {"kind": "cuda", "name": "GPU", "total_bytes": 10**9, "free_bytes": 10**9, "link_bytes_per_s": 1e10}
    rate = ComputeRate(weight_bytes_per_s=1e11, flops_per_s=1e13)
    devices = (
        Device(**gpu, id="cuda:0", compute={"bfloat16": rate}),
        Device(**gpu, id="cuda:1"),
        Device(id="cpu", kind="cpu", name="CPU", total_bytes=8 * 10**9, free_bytes=8 * 10**9),
    )
    machine = Machine(name="two", devices=devices, cpu=Cpu(name="CPU", num_cores=8), rates=Rates(disk_bytes_per_s=2e9))
    save_machine(machine, path)
    return path


def test_the_table_shows_units_devices_and_times(run: Run, chatty_folder: Path) -> None:
    code, out, _ = run(chatty_folder, "--context", 256, "--max-memory", "2GB")
    assert code == 0
    for words in (
        "LlamaForCausalLM from",
        "context 256 tokens, batch 1, prompt 256 tokens",
        "resident, mapped from files",
        "KV cache",
        "first token",
        "tokens/s",
        "predicted: load",
    ):
        assert words in out


def test_the_page_holds_every_tensor_and_what_fits_is_drawn(run: Run, chatty_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    code, _, _ = run(chatty_folder, "--machine", "laptop-rtx4060-8gb", "--html", page)
    assert code == 0
    assert "mlp.down_proj.weight" in page.read_text()
    code, _, err = run(chatty_folder, "--max-memory", "360MB", "--context", 2_000_000)
    assert code == 2
    assert "tokens/s" in err


def test_json_is_the_plan_and_save_and_diff_agree(
    run: Run, chatty_folder: Path, two_gpus: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "plan.json"
    code, out, _ = run(chatty_folder, "--machine", two_gpus, "--json", "--save", saved)
    assert code == 0
    plan = from_json(json.loads(out))
    assert from_json(json.loads(saved.read_text())) == plan
    assert {one.home for one in plan.placements} == {"cuda:0"}
    assert run(chatty_folder, "--machine", two_gpus, "--diff", saved)[1] == "no difference\n"
    _, out, _ = run(chatty_folder, "--machine", two_gpus, "--diff", saved, "--device", "cpu")
    assert "model.layers.0: on cuda:0 in float32 -> on cpu in float32" in out
    _, out, _ = run(chatty_folder, "--machine", two_gpus, "--diff", saved, "--batch", 2, "--json")
    assert any(line.startswith("run: ") for line in json.loads(out))
    assert [path.name for path in tmp_path.iterdir() if "plan" in path.name] == ["plan.json"]


def test_a_device_map_comes_from_a_file_or_is_a_word(
    run: Run, chatty_folder: Path, two_gpus: Path, tmp_path: Path
) -> None:
    path = tmp_path / "map.json"
    path.write_text('{"": 1, "lm_head": "cpu"}')
    _, out, _ = run(chatty_folder, "--machine", two_gpus, "--json", "--device-map", path)
    assert {one.unit: one.home for one in from_json(json.loads(out)).placements}["lm_head"] == "cpu"
    exported = tmp_path / "exported.json"
    run(chatty_folder, "--machine", two_gpus, "--device-map", path, "--save-device-map", exported)
    assert json.loads(exported.read_text())["lm_head"] == "cpu"
    _, out, _ = run(chatty_folder, "--machine", two_gpus, "--json", "--device-map", "cpu")
    assert {one.home for one in from_json(json.loads(out)).placements} == {"cpu"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-memory", "lots"], "max_memory of cpu: expected a size such as 5GB, 500MB or 2GiB, found 'lots'"),
        (["--max-memory", "-1GB"], "found '-1GB'"),
        (["--max-memory", "cpu=0"], "max_memory of cpu: expected a size such as 5GB, 500MB or 2GiB, found '0'"),
        (["--max-memory", "cuda:9=1GB"], 'device "cuda:9" is not on this machine, which has:'),
        (["--device", "cuda:9"], 'device "cuda:9" is not on this machine'),
        (["--device-map", "cuda:9"], 'device_map: device "cuda:9" is not on this machine'),
        (["--device-map", "auto", "--device", "cpu"], None),
        (["--device-map", "cpu", "--device", "cpu"], "device and device_map both say"),
        (["--context", "0"], "context is 0; expected a whole number above zero"),
        (["--context", "10", "--prompt-tokens", "20"], "prompt_tokens is 20 but the context"),
        (["--dtype", "bf17"], "dtype='bf17'"),
        (["--max-memory", "1MB"], "the model does not fit on cpu"),
        (["--max-memory", "1MB", "--no-offload"], "does not fit without streaming"),
        (["--machine", "nowhere.json"], "nowhere.json"),
        (["--diff", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    run: Run, chatty_folder: Path, tmp_path: Path, arguments: list[str], words: str | None
) -> None:
    saved = tmp_path / "plan.json"
    code, out, err = run(chatty_folder, *arguments, "--save", saved)
    if words is None:  # "auto" leaves the choice to the planner, so that a device may be named beside it
        assert code == 0
        return
    assert (code, out) == (2, "")
    # What does fit instead is drawn before the sentence.
    assert err.splitlines()[-1].startswith("loadstone: ")
    assert err.count("\n") == 1 or "fit" in words
    assert words in err.splitlines()[-1]
    assert not saved.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "machine.json"),
        ("{}", 'with the key "loadstone_machine"'),
        ('{"devices": []}', 'with the key "loadstone_machine"'),
        ('{"loadstone_machine": 1, "devices": []}', "machine.json"),
    ],
)
def test_a_machine_that_is_none_is_refused(
    run: Run, chatty_folder: Path, tmp_path: Path, content: str, words: str
) -> None:
    (tmp_path / "machine.json").write_text(content)
    code, _, err = run(chatty_folder, "--machine", tmp_path / "machine.json")
    assert code == 2
    assert words in err
    assert err.count("\n") == 1


def test_a_plan_file_that_is_none_is_refused_before_anything_is_planned(run: Run, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"loadstone_plan": 4}')
    code, _, err = run(tmp_path / "no-model", "--diff", tmp_path / "plan.json")
    assert code == 2
    assert "lacks identity" in err


def test_planning_imports_neither_torch_nor_transformers(chatty_folder: Path) -> None:
    code = f"""
import sys
sys.argv = ["loadstone", "plan", {str(chatty_folder)!r}, "--max-memory", "2GB", "--device", "cpu"]
from loadstone.cli.app import main
from loadstone.hardware.machine_file import save_machine
from loadstone.hardware.spec import ComputeRate, Cpu, Device, Machine, Rates
try:
    main()
finally:
    print(sorted({{"torch", "transformers", "numpy", "pydantic"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_the_function_takes_what_torch_users_type(chatty_folder: Path) -> None:
    import torch

    plan = loadstone.plan(
        chatty_folder, dtype=torch.bfloat16, max_memory={"cpu": "2GB"}, device=torch.device("cpu"), context=32
    )
    assert plan.dtype == "bfloat16"
    assert plan.run.prompt_tokens == 32
    assert plan.devices[-1].level_bytes > 100_000_000


def test_a_part_of_a_source_is_planned_and_loaded_alike(run: Run, chatty_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    inner = tmp_path / "inner"
    inner.mkdir()
    state = {f"policy.{name}": tensor for name, tensor in load_file(chatty_folder / "model.safetensors").items()}
    critic = {name.replace("policy.", "critic."): tensor.clone() for name, tensor in state.items()}
    save_file(state | critic, inner / "model.fp16.safetensors")
    (inner / "config.json").write_bytes((chatty_folder / "config.json").read_bytes())
    part = {"subfolder": "inner", "variant": "fp16", "prefix": "policy.", "select": "*.weight"}
    saved, page = tmp_path / "plan.json", tmp_path / "plan.html"
    options = [text for name, value in part.items() for text in (f"--{name}", value)]
    code, _, err = run(tmp_path, *options, "--context", 64, "--save", saved, "--html", page)
    assert code == 0, err
    assert "mlp.down_proj.weight" in page.read_text()
    assert "critic" not in page.read_text()
    plan = from_json(json.loads(saved.read_text()))
    assert plan.identity.num_tensors == len(state)
    again = loadstone.plan(str(tmp_path), **part, context=64)
    assert (again.identity, again.placements) == (plan.identity, plan.placements)
    assert loadstone.of(loadstone.load(tmp_path, plan=plan, **part)).plan == plan
    with pytest.raises(InvalidPlan, match="the plan no longer fits what it was made for"):
        loadstone.load(tmp_path, plan=plan, **{**part, "prefix": "critic."})


@pytest.mark.parametrize("arguments", [["plan", "--help"], ["--help"], ["verify", "--help"]])
def test_only_the_command_that_is_named_is_imported(arguments: list[str]) -> None:
    from loadstone.cli.app import app_for

    names = {command.name for command in app_for(arguments).registered_commands}
    assert names == ({arguments[0]} if len(arguments) > 1 else _COMMANDS)


def test_text_numbers_and_what_is_left_out_reach_a_command_as_they_are_meant(run: Run, chatty_folder: Path) -> None:
    _, out, _ = run(chatty_folder, "--json", "--context", "100", "--select", "lm_head*", "--select", "*.weight")
    assert json.loads(out)["run"] == {"context": 100, "batch": 1, "prompt_tokens": 100}


@pytest.mark.parametrize(
    ("line", "found"), [("loadstone pl", "plan"), ("loadstone plan --save-d", "--save-device-map")]
)
def test_the_shell_completes_commands_and_options(line: str, found: str) -> None:
    code = "import sys; sys.argv[0] = 'loadstone'; from loadstone.cli.app import main; main()"
    asked = {"_LOADSTONE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, capture_output=True, check=True)
    assert done.stdout.decode().split() == [found]
