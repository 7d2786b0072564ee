"""What happens to a source file while a streamed model runs: numbers that are right, or an error that names it."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loadstone
from loadstone.api.begun import Request
from loadstone.api.load import carry_out
from loadstone.errors import FileChanged, LoadstoneError
from loadstone.execute.values import Streaming

NUM_LAYERS = 6
PROMPT = torch.arange(3, 15)[None]
# Of float32 in memory, so that nothing is mapped: a mapped file that is cut short ends the process (see the README).
DTYPE = "float32"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in several files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("shards")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="100kB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> nn.Module:
    return loadstone.load(folder, dtype=DTYPE)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def streamed(path: Path, dtype: str | None = DTYPE, *units: str) -> Any:
    layers = (f"model.layers.{number}" for number in range(NUM_LAYERS))
    streaming = Streaming(units=units or ("model.embed_tokens", *layers, "lm_head"))
    return carry_out(Request(source=path, dtype=dtype, streaming=streaming))


def logits(model: Any, tokens: torch.Tensor = PROMPT) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(tokens).logits
    return found


def file_of(folder: Path, tensor: str) -> Path:
    import json

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / str(index["weight_map"][tensor])


LAST = f"model.layers.{NUM_LAYERS - 1}.mlp.down_proj.weight"
Undo = Callable[[], None]


def replace(path: Path) -> Undo:
    """Another file is renamed into its place; the old one is kept and can be renamed back."""
    kept, other = path.with_suffix(".kept"), path.with_suffix(".other")
    data = bytearray(path.read_bytes())
    data[-1000:] = bytes(1000)
    other.write_bytes(data)
    path.rename(kept)
    other.rename(path)

    def undo() -> None:
        kept.replace(path)

    return undo


def remove(path: Path) -> Undo:
    kept = path.with_suffix(".kept")
    path.rename(kept)

    def undo() -> None:
        kept.rename(path)

    return undo


def overwrite(path: Path) -> Undo:
    """Written to where it lies, as `cp` and `rsync --inplace` do."""
    status, data = path.stat(), path.read_bytes()
    with path.open("r+b") as file:
        file.seek(len(data) // 2)
        file.write(bytes(len(data) - len(data) // 2))

    def undo() -> None:
        with path.open("r+b") as file:
            file.write(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    return undo


def cut_short(path: Path) -> Undo:
    status, data = path.stat(), path.read_bytes()
    os.truncate(path, len(data) // 2)

    def undo() -> None:
        with path.open("r+b") as file:
            file.write(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    return undo


CHANGES = (replace, remove, overwrite, cut_short)


@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", LAST, "lm_head.weight"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("ran_before", [False, True])
def test_the_model_works_again_once_the_file_is_back(
    copied: Path, whole: nn.Module, change: Callable[[Path], Undo], tensor: str, ran_before: bool
) -> None:
    model, path, other = streamed(copied), file_of(copied, tensor), PROMPT + 60
    expected = logits(whole)
    if ran_before:
        assert torch.equal(logits(model), expected)
    undo = change(path)
    for _ in range(2):  # the same error again
        with pytest.raises(LoadstoneError, match=path.name):
            logits(model, other)
    undo()
    for tokens in (other, PROMPT, other):
        assert torch.equal(logits(model, tokens), logits(whole, tokens))
    loadstone.of(model).close()


@pytest.mark.parametrize("change", CHANGES)
def test_in_the_middle_of_a_pass_too(copied: Path, whole: nn.Module, change: Callable[[Path], Undo]) -> None:
    model, path = streamed(copied), file_of(copied, LAST)
    expected = logits(whole)
    undo: list[Undo] = []
    layer = model.model.layers[2]
    for hook in (layer.register_forward_pre_hook, layer.register_forward_hook):
        handle = hook(lambda *_: undo.append(change(path)))
        with pytest.raises(LoadstoneError, match=path.name):
            logits(model)
        handle.remove()
        undo.pop()()
        assert torch.equal(logits(model), expected)


def test_what_is_mapped_is_not_overwritten_unseen(copied: Path) -> None:
    """The head is mapped and computes last, after every unit was found unchanged."""
    model, path = streamed(copied, None, "model.layers.0"), file_of(copied, "lm_head.weight")
    expected = logits(model)
    undo: list[Undo] = []
    handle = model.lm_head.register_forward_pre_hook(lambda *_: undo.append(overwrite(path)))
    with pytest.raises(FileChanged, match=path.name):
        logits(model)
    handle.remove()
    undo.pop()()
    assert torch.equal(logits(model), expected)


def decode_for_ever(model: Any, expected: torch.Tensor) -> None:
    while True:
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("change", [overwrite, cut_short])
def test_a_decode_loop_beside_a_file_that_is_written_to(
    copied: Path, whole: nn.Module, change: Callable[[Path], Undo]
) -> None:
    for path in sorted(copied.glob("*.safetensors")):
        model, expected = streamed(copied), logits(whole)
        undo: list[Undo] = []
        thread = threading.Timer(0.02, lambda path=path, undo=undo: undo.append(change(path)))
        thread.start()
        with pytest.raises(LoadstoneError, match=path.name):
            decode_for_ever(model, expected)
        thread.join()
        with pytest.raises(LoadstoneError, match=path.name):
            logits(model)
        undo.pop()()
        loadstone.of(model).close()


@pytest.mark.parametrize("change", [replace, remove])
def test_a_decode_loop_beside_a_file_that_comes_and_goes(
    copied: Path, whole: nn.Module, change: Callable[[Path], Undo]
) -> None:
    model, paths = streamed(copied), sorted(copied.glob("*.safetensors"))
    prompts = [torch.randint(160, (1, 5), generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    expected = [logits(whole, prompt) for prompt in prompts]
    over = threading.Event()

    def interfere() -> None:
        number = 0
        while not over.is_set():
            undo = change(paths[number % len(paths)])
            time.sleep(0.003)
            undo()
            time.sleep(0.003)
            number += 1

    thread = threading.Thread(target=interfere)
    thread.start()
    errors = results = 0
    try:
        until = time.monotonic() + 0.8
        while time.monotonic() < until:
            number = (errors + results) % len(prompts)
            try:
                found = logits(model, prompts[number])
            except LoadstoneError as error:
                assert "safetensors: expected" in str(error)  # noqa: PT017
                errors += 1
            else:
                assert torch.equal(found, expected[number])
                results += 1
    finally:
        over.set()
        thread.join()
    assert errors > 0
    with contextlib.suppress(LoadstoneError):  # what was read ahead in the last bad moment
        logits(model)
    for prompt, right in zip(prompts, expected, strict=True):
        assert torch.equal(logits(model, prompt), right)
