"""A bare tokenizer.model beside params.json, in both formats, against the libraries that wrote it."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import loadstone
from loadstone.architecture.gguf_pretokenizers import PRE_TOKENIZERS
from loadstone.architecture.gguf_tokenizer import byte_alphabet
from loadstone.errors import InvalidHeader, NotACheckpoint

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "What's 12345 + 678? It is 13023!",
    "naïve café, 日本語 too",
] * 20
TEXTS = [*CORPUS[:3], "  two  spaces\n\nand lines", "unseen: Żółć 🙂", ""]


def folder_with(folder: Path, content: bytes) -> Path:
    (folder / "params.json").write_text("{}")
    (folder / "tokenizer.model").write_bytes(content)
    return folder


def test_a_sentencepiece_vocabulary_gives_the_tokens_of_sentencepiece(tmp_path: Path) -> None:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=written,
        minloglevel=2,
        hard_vocab_limit=False,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    reference = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    tokenizer = loadstone.load_tokenizer(folder_with(tmp_path, written.getvalue()))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    for text in TEXTS:
        if text:
            assert tokenizer(text).input_ids == [1, *reference.encode(text)], text
            assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def llama3_reference() -> Tokenizer:
    """A byte-level tokenizer with Llama 3's way to split text, trained on the corpus."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRE_TOKENIZERS["llama-bpe"].splits[0]), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return tokenizer


def tiktoken_file(vocab: dict[str, int]) -> bytes:
    spelled = {char: byte for byte, char in byte_alphabet().items()}
    ordered = sorted(vocab, key=lambda token: vocab[token])
    lines = [base64.b64encode(bytes(spelled[char] for char in token)) for token in ordered]
    return b"".join(line + b" %d\n" % rank for rank, line in enumerate(lines))


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
