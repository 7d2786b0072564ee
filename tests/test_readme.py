"""The Python examples of the README, run as they stand, on tiny models under the names that it uses."""

import re
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

README = Path(__file__).resolve().parent.parent / "README.md"


def example(words: str) -> str:
    """The indented block that contains `words`."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", README.read_text(), flags=re.MULTILINE)
    found = [textwrap.dedent(block) for block in blocks if words in block]
    assert len(found) == 1, f"{len(found)} blocks of the README contain {words!r}"
    return found[0]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def test_the_first_example_loads_and_reports(
    here: Path, chatty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(chatty_folder, here / "Qwen" / "Qwen2.5-7B-Instruct")
    exec(example("a folder, a file, a GGUF, a hub id"), {})
    assert "LlamaForCausalLM from Qwen/Qwen2.5-7B-Instruct" in capsys.readouterr().out


def test_the_example_of_a_budget_follows_a_plan(
    here: Path, chatty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import loadstone

    shutil.copytree(chatty_folder, here / "Qwen" / "Qwen2.5-7B-Instruct")
    exec(example("small = loadstone.load("), {"loadstone": loadstone})
    assert capsys.readouterr().out == "0 None\n"  # a model this small is kept whole


def test_the_example_of_states_parks_wakes_and_limits(chatty_folder: Path) -> None:
    import loadstone

    model = loadstone.load(chatty_folder)
    tokens = {"input_ids": torch.arange(3)[None]}
    with torch.inference_mode():
        exec(example("loaded.park()"), {"loadstone": loadstone, "model": model, "tokens": tokens})
    assert not loadstone.of(model).is_parked


def test_the_example_of_foretold_tokens_tells_of_passes(
    chatty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import loadstone

    tokens = loadstone.load_tokenizer(chatty_folder)("a b c a b c", return_tensors="pt", return_token_type_ids=False)
    names = {"loadstone": loadstone, "small": loadstone.load(chatty_folder), "tokens": tokens}
    exec(example("assist = loadstone.of(small).assist()"), names)
    assert capsys.readouterr().out.startswith("Assisted(num_tokens=")


def test_the_demo_in_python_answers(
    chatty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("loadstone.checkpoint.demo.demo_model", lambda: chatty_folder)
    exec(example("demo_model()"), {})
    assert capsys.readouterr().out.strip()


def test_the_example_of_any_module_loads_it_from_two_files(here: Path) -> None:
    class MyModel(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.unet = nn.Linear(width, 3)
            self.text = nn.Linear(3, 2)

    import loadstone

    weights = {"model.diffusion_model.weight": torch.randn(3, 320), "model.diffusion_model.bias": torch.randn(3)}
    save_file({**weights, "ema.decay": torch.ones(1)}, here / "unet.safetensors")
    save_file({"text.weight": torch.randn(2, 3), "text.bias": torch.randn(2)}, here / "text.safetensors")
    names = {"loadstone": loadstone, "MyModel": MyModel}
    exec(example("into=MyModel"), names)
    model = names["model"]
    assert isinstance(model, MyModel)
    assert torch.equal(model.unet.weight, weights["model.diffusion_model.weight"])
