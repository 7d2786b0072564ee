"""Meta's own layout, and Mistral's, become folders in Hugging Face layout with the same numbers and the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import loadstone
from loadstone.errors import CheckpointMismatch, InvalidHeader, MissingShard, UnsupportedFormat
from meta_builders import (
    TEXTS,
    interleaved,
    llama3_reference,
    meta_state,
    reference,
    sentencepiece_file,
    tiktoken_file,
    write,
    write_mistral,
)


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def same_everywhere(source: Path, made: Path, dtype: str | None) -> None:
    """Whoever loads the result has what loading the source in that dtype gives, bit for bit."""
    direct = loadstone.load(source, dtype=dtype)
    tokens = torch.arange(12)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made, dtype="auto")
    for model in (theirs, loadstone.load(made)):
        assert type(model) is type(direct)
        assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == {
            name: tensor.dtype for name, tensor in direct.state_dict().items()
        }
        with torch.inference_mode():
            assert torch.equal(model(tokens).logits, direct(tokens).logits)
        told = model.generation_config.to_diff_dict(), direct.generation_config.to_diff_dict()
        assert told[0] == told[1]


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
@pytest.mark.parametrize(("ranks", "embedding_dim"), [(1, 0), (2, 0), (2, 1)])
def test_the_result_gives_the_logits_of_the_source(
    source: Path, tmp_path: Path, ranks: int, embedding_dim: int, dtype: str | None
) -> None:
    write(source, meta_state(reference()), ranks, embedding_dim)
    report = loadstone.convert(source, tmp_path / "made", dtype=dtype, max_shard_size="30kB")
    same_everywhere(source, tmp_path / "made", dtype)
    assert len(report.files) > 3
    assert report.peak_bytes <= report.bound_bytes
    assert report.notes == ("rope.freqs is computed from the config instead",)
    assert report.side_files == ("config.json", "generation_config.json", "model.safetensors.index.json")
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], dtype or "bfloat16")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_mistrals_consolidated_safetensors(source: Path, tmp_path: Path, dtype: str | None) -> None:
    write_mistral(source)
    loadstone.convert(source, tmp_path / "made", dtype=dtype)
    same_everywhere(source, tmp_path / "made", dtype)


def test_a_tied_head_is_not_written(source: Path, tmp_path: Path) -> None:
    state = meta_state(reference(tie_word_embeddings=True))
    del state["output.weight"]
    write(source, state, 2, vocab_size=-1)
    loadstone.convert(source, tmp_path / "made")
    assert "lm_head.weight" not in load_file(tmp_path / "made" / "model.safetensors")
    same_everywhere(source, tmp_path / "made", None)


def test_views_in_the_pickle_are_gathered(source: Path, tmp_path: Path) -> None:
    """Heads that are rearranged, columns and rows of matrices whose elements lie apart in the file."""
    state = meta_state(reference())
    for name, tensor in state.items():
        if tensor.ndim == 2:
            state[name] = tensor.t().contiguous().t()
    torch.save(state, source / "consolidated.00.pth")
    (source / "params.json").write_text((write(tmp_path, state) / "params.json").read_text())
    loadstone.convert(source, tmp_path / "made", dtype="float32")
    same_everywhere(source, tmp_path / "made", "float32")


def test_no_torch_is_needed(source: Path, tmp_path: Path) -> None:
    write(source, meta_state(reference()), 2)
    code = (
        "import sys; from loadstone.api.convert import convert; convert(*sys.argv[1:]); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, source, tmp_path / "made"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_what_lies_beside_comes_along_and_params_do_not(source: Path, tmp_path: Path) -> None:
    write(source, meta_state(reference()))
    (source / "LICENSE").write_text("mine")
    (source / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    report = loadstone.convert(source, tmp_path / "made")
    assert report.side_files == ("LICENSE", "config.json", "generation_config.json")
    assert (tmp_path / "made" / "generation_config.json").read_bytes() == (
        source / "generation_config.json"
    ).read_bytes()
    same_everywhere(source, tmp_path / "made", None)


def test_a_config_json_beside_is_what_describes_the_result(source: Path, tmp_path: Path) -> None:
    """Mistral's repositories hold both layouts; the file of one is named."""
    model = write_mistral(source)
    model.config.update({"max_position_embeddings": 77, "architectures": ["MistralForCausalLM"]})
    model.config.save_pretrained(source)
    loadstone.convert(source / "consolidated.safetensors", tmp_path / "made")
    assert (tmp_path / "made" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    same_everywhere(source / "consolidated.safetensors", tmp_path / "made", None)


@pytest.mark.parametrize("name", ["sentencepiece", "tiktoken"])
def test_a_bare_vocabulary_gives_the_same_tokens(source: Path, tmp_path: Path, name: str) -> None:
    write(source, meta_state(reference()))
    content = sentencepiece_file() if name == "sentencepiece" else tiktoken_file(llama3_reference().get_vocab())
    (source / "tokenizer.model").write_bytes(content)
    report = loadstone.convert(source, tmp_path / "made")
    assert {"tokenizer.json", "tokenizer_config.json"} < set(report.side_files)
    assert "tokenizer.model" not in report.side_files
    direct = loadstone.load_tokenizer(source)
    for found in (
        loadstone.load_tokenizer(tmp_path / "made"),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "made"),
    ):
        assert found.special_tokens_map == direct.special_tokens_map
        assert found.get_vocab() == direct.get_vocab()
        for text in (*TEXTS, "a<|eot_id|>"):
            ids = direct(text)["input_ids"]
            assert found(text)["input_ids"] == ids, text
            assert found.decode(ids) == direct.decode(ids)


def test_a_described_tokenizer_is_copied(source: Path, tmp_path: Path, chatty_folder: Path) -> None:
    write(source, meta_state(reference()))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((chatty_folder / name).read_bytes())
    (source / "tokenizer.model").write_bytes(b"not read")
    loadstone.convert(source, tmp_path / "made")
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        assert (tmp_path / "made" / name).read_bytes() == (source / name).read_bytes()


def without(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "params", "fault", "message"),
    [
        (
            lambda state: without(state, "layers.1.attention.wq.weight"),
            {},
            CheckpointMismatch,
            r"found none for model\.layers\.1\.self_attn\.q_proj\.weight; this layout is read as a whole",
        ),
        (
            lambda state: {**state, "layers.0.attention.wz.weight": torch.ones(2, 2)},
            {},
            CheckpointMismatch,
            r"found others, which belong nowhere: layers\.0\.attention\.wz\.weight",
        ),
        (dict, {"n_layers": 10**7}, CheckpointMismatch, r"found none for model\.layers\.2\..* and \d+ more"),
        (dict, {"n_kv_heads": 1}, CheckpointMismatch, r"others for the parameter model\..*_proj\.weight \(expected"),
        (dict, {"moe": {"num_experts": 8}}, UnsupportedFormat, "found moe too"),
    ],
)
def test_what_makes_no_model_is_an_error_and_leaves_nothing(
    source: Path, tmp_path: Path, change: Any, params: dict[str, Any], fault: type[Exception], message: str
) -> None:
    write(source, change(meta_state(reference())), **params)
    with pytest.raises(fault, match=message):
        loadstone.convert(source, tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_rank_that_is_missing_is_named(source: Path, tmp_path: Path) -> None:
    write(source, meta_state(reference()), 2)
    (source / "consolidated.01.pth").unlink()
    with pytest.raises(MissingShard, match=r"expected 2 files, consolidated\.00\.pth to consolidated\.01\.pth"):
        loadstone.convert(source, tmp_path / "made")


def test_a_damaged_vocabulary_is_named(source: Path, tmp_path: Path) -> None:
    write(source, meta_state(reference()))
    (source / "tokenizer.model").write_bytes(b"not a vocabulary")
    with pytest.raises(InvalidHeader, match=r"source/tokenizer\.model: expected a vocabulary of SentencePiece"):
        loadstone.convert(source, tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_only_what_is_rearranged_or_cut_by_columns_is_held_as_a_whole(source: Path, tmp_path: Path) -> None:
    """Rows of several ranks are streamed: with only those large, the bound does not grow with them."""
    small = loadstone.convert(write(source, meta_state(reference()), 2), tmp_path / "made").bound_bytes
    state = meta_state(reference())
    for name in ("output.weight", "tok_embeddings.weight"):
        state[name] = torch.zeros(40 * 96, 64, dtype=torch.bfloat16)
    write(source, state, 2, embedding_dim=0, vocab_size=40 * 96)
    assert loadstone.convert(source, tmp_path / "large").bound_bytes == small


def test_the_writer_permutes_as_meta_does() -> None:
    """Pairs of a head in the order x0, y0, x1, y1, which is not how the result has them."""
    weight = torch.arange(8.0)[:, None]
    assert interleaved(weight, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
