"""Fixtures of all tests: no test sees the caches of whoever runs it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadstone.hardware.spec import Machine


@pytest.fixture(autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for every cache; HF_HOME and LOADSTONE_CACHE point into it."""
    folder = tmp_path_factory.mktemp("caches")
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(folder / "huggingface"))
    monkeypatch.setenv("LOADSTONE_CACHE", str(folder / "loadstone"))
    return folder


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on the memory that other programs leave free: nobody looks at it."""
    from loadstone.execute import pressure

    monkeypatch.setattr(pressure, "PERIOD_S", 3600.0)


@pytest.fixture
def small_grains(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests compute with is a thousand times smaller than what is worth compressing; there, less is gained."""
    from loadstone import compression
    from loadstone.stream import compressed

    monkeypatch.setattr(compression, "GRAIN_BYTES", 512)
    monkeypatch.setattr(compression, "SHARE", 1.0)
    monkeypatch.setattr(compressed, "CHUNK_BYTES", 2048)


@pytest.fixture(scope="session")
def chatty_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model with a tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("chatty")
    words = ["<unk>", "<s>", "</s>", "user", "assistant", ":", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="</s>",
        chat_template="{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}assistant :",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=2,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` run where a CUDA device is."""
    marked = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture
def fake_gpus(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """This machine with three accelerators that compute on the host and refuse each other's tensors."""
    import fake_devices

    return fake_devices.pretend(monkeypatch)


@pytest.fixture
def quiet() -> Iterator[None]:
    """transformers neither talks nor draws, nor warns of missing kernels; for tests of something else."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
