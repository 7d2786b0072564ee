"""Tokenizers from GGUF metadata, beside sentencepiece, transformers' own reading and the tokenizers library."""

from __future__ import annotations

import copy
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gguf_builders import Gguf
from loadstone.architecture.gguf_pretokenizers import PRE_TOKENIZERS
from loadstone.architecture.gguf_tokenizer import tokenizer_config, tokenizer_json
from loadstone.architecture.transformers_tokenizer import load_gguf_tokenizer, load_tokenizer
from loadstone.checkpoint.gguf import read_gguf
from loadstone.errors import InvalidHeader, NotACheckpoint, UnsupportedFormat

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
CORPUS = (
    "the quick brown fox jumps over the lazy dog and runs through the green forest while the sun is shining",
    "don't you think that we'll have to return 12 of the 345 books before 2024?",
    "def load(path):\n    return open(path).read()  # the whole file\n",
    "größer als das Haus, émoji und naïve Wörter; 日本語 и русский текст 🚀🦙",
)
TEXTS = (
    *CORPUS,
    "Hello world",
    "  two spaces first and last  ",
    "tabs\tand\nlines\n\n\n  indented",
    "1 22 333 4444 1,000,000.5 a 12 b  34",
    "I'LL shout, you'll whisper",
    "日本語と中文 한국어 العربية हिन्दी",
    "😶‍🌫️ 🦙🦙 ✅",
    "½ ² ① Ⅷ",
    "\u00a0no-break\u200bzero",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "a<think>b</think>c",
    "x" * 200,
    " ",
    "",
)


def byte_level(pre: str = "smollm", **more: Any) -> dict[str, Any]:
    """The metadata of a byte-level vocabulary, trained on the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    folder = io.StringIO(tokenizer.to_str())
    content = json.load(folder)["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    types = [CONTROL] * 3 + [USER_DEFINED] * 2 + [NORMAL] * (len(tokens) - 5)
    return {
        "general.architecture": "llama",
        "llama.context_length": 2048,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in content["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
        **more,
    }


def train(**options: Any) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in CORPUS * 4 for line in text.split("\n")]),
        model_writer=model,
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    return train(
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
    )


def from_sentencepiece(model: sentencepiece.SentencePieceProcessor, kind: str, **more: Any) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes for a SentencePiece model."""
    types = []
    for index in range(len(model)):
        flags = ((model.is_unknown, UNKNOWN), (model.is_control, CONTROL), (model.is_byte, BYTE))
        types.append(next((value for flag, value in flags if flag(index)), NORMAL))
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": [model.id_to_piece(index) for index in range(len(model))],
        "tokenizer.ggml.scores": [model.get_score(index) for index in range(len(model))],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **more,
    }


def by_transformers(metadata: dict[str, Any], folder: Path) -> Any:
    Gguf(metadata).write(folder / "m.gguf")
    return transformers.AutoTokenizer.from_pretrained(folder, gguf_file="m.gguf")


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text)["input_ids"]
    return found


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "qwen35", "llama-bpe", "tekken", "gpt-4o", "lfm2"])
def test_byte_level_tokens_are_those_of_transformers(pre: str, tmp_path: Path) -> None:
    metadata = byte_level(pre)
    # transformers does not know that Llama 3 and Tekken add BOS where the file does not say.
    metadata["tokenizer.ggml.add_bos_token"] = False
    ours, theirs = load_gguf_tokenizer(metadata), by_transformers(metadata, tmp_path)
    for text in TEXTS:
        if not PRE_TOKENIZERS[pre].ignore_merges:
            assert ids(ours, text) == ids(theirs, text), text
        assert ours.decode(ids(ours, text)) == text


def test_digits_stand_alone_as_the_model_learnt_them() -> None:
    metadata = byte_level("smollm")
    tokenizer = load_gguf_tokenizer(metadata)
    reference = Tokenizer(models.BPE(
        vocab={token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])},
        merges=[tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]],
    ))  # fmt: skip
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    reference.decoder = decoders.ByteLevel()
    for text in TEXTS:
        if "<" not in text:
            assert ids(tokenizer, text) == reference.encode(text).ids, text


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_way_of_splitting_compiles_and_keeps_the_text(pre: str) -> None:
    backend = Tokenizer(models.BPE())
    content = {**tokenizer_json(byte_level_once()), "pre_tokenizer": PRE_TOKENIZERS[pre].to_json()}
    backend = Tokenizer.from_str(json.dumps(content))
    for text in TEXTS:
        assert backend.decode(backend.encode(text).ids, skip_special_tokens=False) == text


_ONCE: dict[str, Any] = {}


def byte_level_once() -> dict[str, Any]:
    if not _ONCE:
        _ONCE.update(byte_level())
    return _ONCE


def test_control_tokens_are_special_and_user_defined_ones_are_whole() -> None:
    tokenizer = load_gguf_tokenizer(byte_level())
    assert ids(tokenizer, "<|im_start|><think>")[:2] == [1, 3]
    assert tokenizer.decode([1, 3, 2], skip_special_tokens=True) == "<think>"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", None)
    assert tokenizer.model_max_length == 2048


def test_control_token_in_other_letters_keeps_its_id() -> None:
    metadata = byte_level()
    metadata["tokenizer.ggml.tokens"] = ["<｜end▁of▁sentence｜>", *metadata["tokenizer.ggml.tokens"][1:]]
    tokenizer = load_gguf_tokenizer(metadata)
    assert ids(tokenizer, "<｜end▁of▁sentence｜>") == [0]
    assert len(tokenizer) == len(metadata["tokenizer.ggml.tokens"])


def test_chat_template_is_applied() -> None:
    tokenizer = load_gguf_tokenizer(byte_level())
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi<|im_end|>"


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (True, True)])
def test_bos_and_eos_are_added_as_the_file_says(bos: bool, eos: bool) -> None:
    metadata = byte_level(**{"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos})
    tokenizer = load_gguf_tokenizer(metadata)
    plain = ids(load_gguf_tokenizer(byte_level()), "fox")
    assert ids(tokenizer, "fox") == [1] * bos + plain + [2] * eos
    assert Tokenizer.from_str(json.dumps(tokenizer_json(metadata))).encode("fox").ids == ids(tokenizer, "fox")


def test_llama_3_adds_bos_where_the_file_does_not_say() -> None:
    assert ids(load_gguf_tokenizer(byte_level("llama-bpe")), "fox")[0] == 1


def test_copies_do_not_share_a_backend() -> None:
    tokenizer = load_gguf_tokenizer(byte_level())
    other = copy.deepcopy(tokenizer)
    assert other.backend_tokenizer is not tokenizer.backend_tokenizer
    assert ids(other, "fox 12") == ids(tokenizer, "fox 12")


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokens_are_those_of_transformers(
    pieces: sentencepiece.SentencePieceProcessor, architecture: str, prefix: bool, tmp_path: Path
) -> None:
    more = {"general.architecture": architecture, "tokenizer.ggml.add_space_prefix": prefix}
    metadata = from_sentencepiece(pieces, "llama", **more)
    ours = load_gguf_tokenizer(metadata)
    theirs = by_transformers(metadata, tmp_path)
    for text in TEXTS:
        assert ours.decode(ids(ours, text), skip_special_tokens=True) == text
        # transformers ignores the flag, and reads Llama's texts that begin with a space, or go on behind a special
        # token, otherwise than SentencePiece and llama.cpp.
        if prefix and (architecture == "phi3" or not text.startswith(" ")):
            assert ids(ours, text) == ids(theirs, text), text


def test_sentencepiece_tokens_are_those_of_sentencepiece(pieces: sentencepiece.SentencePieceProcessor) -> None:
    tokenizer = load_gguf_tokenizer(from_sentencepiece(pieces, "llama"))
    for text in TEXTS:
        if text.strip() and "<" not in text:
            assert ids(tokenizer, text) == [1, *pieces.encode(text)], text


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_gemma_tokens_are_those_of_transformers(
    pieces: sentencepiece.SentencePieceProcessor, architecture: str, tmp_path: Path
) -> None:
    metadata = from_sentencepiece(pieces, "llama", **{"general.architecture": architecture})
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "  ", "   "]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], USER_DEFINED, USER_DEFINED]
    metadata["tokenizer.ggml.scores"] = [*metadata["tokenizer.ggml.scores"], -1000.0, -1000.0]
    ours, theirs = load_gguf_tokenizer(metadata), by_transformers(metadata, tmp_path)
    for text in TEXTS:
        assert ours.decode(ids(ours, text), skip_special_tokens=True) == text
        if "  " not in text:  # transformers looks for runs of spaces after they have been replaced
            assert ids(ours, text) == ids(theirs, text), text


def test_unigram_tokens_are_those_of_sentencepiece() -> None:
    model = train(model_type="unigram", vocab_size=200, pad_id=3)
    metadata = from_sentencepiece(model, "t5", **{"tokenizer.ggml.bos_token_id": None})
    metadata = {key: value for key, value in metadata.items() if value is not None}
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], *(f"[PAD{index}]" for index in range(100))]
    metadata["tokenizer.ggml.scores"] = [*metadata["tokenizer.ggml.scores"], *[-10000.0] * 100]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], *[UNUSED] * 100]
    tokenizer = load_gguf_tokenizer(metadata)
    for text in CORPUS[:2]:
        assert ids(tokenizer, text) == [*model.encode(text), 2], text
    assert ids(tokenizer, "<extra_id_0>") == [len(model) + 99, 2]


def test_wordpiece_tokens_are_those_of_bert(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", "jump", "##s", "##ing", ",", "2", "##4"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    theirs = transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    phantom = [word[2:] if word.startswith("##") else word if word[0] == "[" else f"\u2581{word}" for word in words]
    metadata = {
        "general.architecture": "bert",
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": phantom,
        "tokenizer.ggml.token_type": [CONTROL] * 5 + [NORMAL] * 8,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.cls_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.mask_token_id": 4,
        "tokenizer.ggml.padding_token_id": 0,
    }
    ours = load_gguf_tokenizer(metadata)
    for text in ("The fox jumps, jumping 24", "[MASK] fox", "unknown"):
        assert ids(ours, text) == ids(theirs, text)
    assert ours("the", "fox")["input_ids"] == theirs("the", "fox")["input_ids"]


def test_unknown_model_is_refused() -> None:
    with pytest.raises(
        UnsupportedFormat, match=r"tokenizer\.ggml\.model is 'rwkv'; expected one of gpt2, llama, t5, bert"
    ):
        tokenizer_json({"tokenizer.ggml.model": "rwkv"})


def test_unknown_way_of_splitting_is_refused() -> None:
    with pytest.raises(UnsupportedFormat, match=r"tokenizer\.ggml\.pre is 'novel': how it splits text is not known"):
        tokenizer_json(byte_level("novel"))


@pytest.mark.parametrize("tokens", [None, [], [1, 2]])
def test_missing_vocabulary_is_refused(tokens: object) -> None:
    with pytest.raises(InvalidHeader, match=r"tokenizer\.ggml\.tokens is missing or is not a list of strings"):
        tokenizer_json({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens})


def test_missing_merges_are_refused() -> None:
    metadata = {key: value for key, value in byte_level().items() if not key.endswith("merges")}
    with pytest.raises(InvalidHeader, match=r"tokenizer\.ggml\.merges is missing, which a byte-level vocabulary needs"):
        tokenizer_json(metadata)


@pytest.mark.parametrize("model", ["llama", "t5"])
def test_missing_scores_are_refused(model: str) -> None:
    with pytest.raises(InvalidHeader, match=r"tokenizer\.ggml\.scores must have one score for each of the 1 tokens"):
        tokenizer_json({"tokenizer.ggml.model": model, "tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.scores": []})


def test_huge_token_takes_no_time(pieces: sentencepiece.SentencePieceProcessor) -> None:
    metadata = from_sentencepiece(pieces, "llama")
    metadata["tokenizer.ggml.tokens"][-1] = "x" * 4_000_000
    begin = time.perf_counter()
    tokenizer_json(metadata)
    assert time.perf_counter() - begin < 2  # cutting it everywhere would take hours


def test_special_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(InvalidHeader, match=r"tokenizer\.ggml\.eos_token_id is 99, but the vocabulary has 1 tokens"):
        tokenizer_config({"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.eos_token_id": 99})


def test_merge_of_unknown_tokens_is_refused() -> None:
    with pytest.raises(InvalidHeader, match="the tokenizer that the header describes is not consistent"):
        load_gguf_tokenizer(byte_level(**{"tokenizer.ggml.merges": ["not there"]}))


def test_tokenizer_of_a_folder_is_loaded(tmp_path: Path) -> None:
    ours = load_gguf_tokenizer(byte_level())
    ours.save_pretrained(tmp_path)
    assert ids(load_tokenizer(tmp_path), "fox 12") == ids(ours, "fox 12")


def test_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path)


def test_metadata_of_a_file_is_enough(tmp_path: Path) -> None:
    path = Gguf(byte_level()).write(tmp_path / "m.gguf")
    assert ids(load_gguf_tokenizer(read_gguf(path).metadata), "fox") == ids(load_gguf_tokenizer(byte_level()), "fox")
