"""A tiny Llama on disk, written once."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def llama_copy(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may damage."""
    import shutil

    folder = tmp_path / "llama"
    shutil.copytree(llama_folder, folder)
    return folder
