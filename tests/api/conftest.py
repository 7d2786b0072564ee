"""A tiny Llama on disk, written once."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_llama import tiny_llama

    folder = tmp_path_factory.mktemp("llama")
    model = tiny_llama(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def llama_copy(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may damage."""
    import shutil

    folder = tmp_path / "llama"
    shutil.copytree(llama_folder, folder)
    return folder
