"""A bare tokenizer.model beside params.json, in both formats, against the libraries that wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sentencepiece

import loadstone
from loadstone.errors import InvalidHeader, NotACheckpoint
from meta_builders import TEXTS, llama3_reference, sentencepiece_file, tiktoken_file


def folder_with(folder: Path, content: bytes) -> Path:
    (folder / "params.json").write_text("{}")
    (folder / "tokenizer.model").write_bytes(content)
    return folder


def test_a_sentencepiece_vocabulary_gives_the_tokens_of_sentencepiece(tmp_path: Path) -> None:
    written = sentencepiece_file()
    reference = sentencepiece.SentencePieceProcessor(model_proto=written)
    tokenizer = loadstone.load_tokenizer(folder_with(tmp_path, written))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    for text in TEXTS:
        if text:
            assert tokenizer(text).input_ids == [1, *reference.encode(text)], text
            assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_a_tiktoken_vocabulary_gives_the_tokens_it_was_made_from(tmp_path: Path) -> None:
    reference = llama3_reference()
    vocab = reference.get_vocab()
    tokenizer = loadstone.load_tokenizer(folder_with(tmp_path, tiktoken_file(vocab)))
    begin = len(vocab)
    assert tokenizer.convert_tokens_to_ids(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]) == [
        begin,
        begin + 1,
        begin + 9,
    ]
    assert len(tokenizer) == begin + 256
    for text in TEXTS:
        assert tokenizer(text).input_ids == [begin, *reference.encode(text).ids], text
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer("a<|eot_id|>").input_ids[-1] == begin + 9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a vocabulary", "expected a vocabulary of SentencePiece or tiktoken"),
        (b"YQ== 0\nYg== 2\n", r"expected a token in base64 and the rank 1 in line 2, found b'Yg== 2'"),
        (b"YQ== 0\n???\n", "the rank 1 in line 2"),
    ],
)
def test_a_damaged_vocabulary_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InvalidHeader, match=message) as caught:
        loadstone.load_tokenizer(folder_with(tmp_path, content))
    assert str(tmp_path / "tokenizer.model") in str(caught.value)


def test_without_params_it_is_left_to_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def refuse(root: Path, **_: object) -> None:
        asked.append(root)
        raise ValueError("no")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    (tmp_path / "tokenizer.model").write_bytes(b"YQ== 0\n")
    with pytest.raises(NotACheckpoint, match="no tokenizer could be loaded"):
        loadstone.load_tokenizer(tmp_path)
    assert asked == [tmp_path]
