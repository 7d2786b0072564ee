"""GGUF metadata -> the content of a tokenizer.json and of a tokenizer_config.json, as plain data.

GGUF keeps the vocabulary, the merges and the special ids, but not how text is normalised and split: that follows from
`tokenizer.ggml.model`, `tokenizer.ggml.pre` and the architecture. Where transformers' own reading of GGUF and llama.cpp
disagree, llama.cpp, which agrees with the tokenizer the model was trained with, is followed.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (GGUF tokenizer),
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from loadstone.architecture.gguf_pretokenizers import PRE_TOKENIZERS
from loadstone.errors import InvalidHeader, UnsupportedFormat

Metadata = Mapping[str, Any]
Json = dict[str, Any]

# Token types. Source: https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h (enum llama_token_type)
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5

_SPACE = "\u2581"
_PADDING = re.compile(r"\[PAD\d+\]")
_NUM_T5_BLANKS = 100

# Cutting a token everywhere takes the square of its length; no trained vocabulary has pieces near this long.
_LONGEST_MERGED = 512

# Special tokens of tokenizer_config.json, and the metadata that holds their ids ("seperator" is GGUF's spelling).
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "sep_token": "seperator_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
_GEMMA = ("gemma", "gemma2", "gemma3")


def tokenizer_json(metadata: Metadata) -> Json:
    """Build what the `tokenizers` library reads from a tokenizer.json.

    Args:
        metadata: all key-value pairs of the GGUF header.

    Returns:
        A JSON object; ids are those of the file.

    Raises:
        UnsupportedFormat: a tokenizer model, or a way of splitting, that is not known.
        InvalidHeader: the metadata contradicts itself.
    """
    model = metadata.get("tokenizer.ggml.model")
    builder = _BUILDERS.get(model) if isinstance(model, str) else None
    if builder is None:
        raise UnsupportedFormat(
            f"tokenizer.ggml.model is {model!r}; expected one of {', '.join(_BUILDERS)}. Take the tokenizer from the "
            "safetensors checkpoint of this model."
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise InvalidHeader("tokenizer.ggml.tokens is missing or is not a list of strings; the file has no vocabulary.")
    pieces = builder(metadata, tokens)
    empty: Json = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None}
    pieces.setdefault("post_processor", _template(metadata, tokens))
    pieces.setdefault("added_tokens", _added_tokens(metadata, tokens))
    return {**empty, **pieces}


def tokenizer_config(metadata: Metadata) -> Json:
    """Build what a tokenizer_config.json holds beside the vocabulary.

    Args:
        metadata: all key-value pairs of the GGUF header.

    Returns:
        The special tokens, `add_bos_token`, `add_eos_token`, `chat_template` and `model_max_length`, where known.
    """
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    config: Json = {"clean_up_tokenization_spaces": False}
    for name, key in _SPECIAL.items():
        token = _token(metadata, tokens, key)
        if token is not None:
            config[name] = token
    if metadata.get("tokenizer.ggml.model") != "bert":
        config["add_bos_token"], config["add_eos_token"] = _adds(metadata)
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if context:
        config["model_max_length"] = context
    return config


def _token(metadata: Metadata, tokens: list[str], key: str) -> str | None:
    index = metadata.get(f"tokenizer.ggml.{key}")
    if index is None:
        return None
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise InvalidHeader(f"tokenizer.ggml.{key} is {index!r}, but the vocabulary has {len(tokens)} tokens.")
    return tokens[index]


def _adds(metadata: Metadata) -> tuple[bool, bool]:
    """Whether BOS and EOS are added, as the file says or as llama.cpp takes it."""
    model = metadata.get("tokenizer.ggml.model")
    pre = PRE_TOKENIZERS.get(metadata.get("tokenizer.ggml.pre", "default"))
    bos = model == "llama" or (model == "gpt2" and pre is not None and pre.add_bos)
    return (
        bool(metadata.get("tokenizer.ggml.add_bos_token", bos)),
        bool(metadata.get("tokenizer.ggml.add_eos_token", model == "t5")),
    )


def _template(metadata: Metadata, tokens: list[str]) -> Json | None:
    """The post-processor that puts BOS in front and EOS behind."""
    bos, eos = (
        _token(metadata, tokens, key) if wanted else None
        for key, wanted in zip(("bos_token_id", "eos_token_id"), _adds(metadata), strict=True)
    )
    return _template_of(bos, eos, eos, tokens) if bos or eos else None


def _template_of(first: str | None, middle: str | None, last: str | None, tokens: list[str]) -> Json:
    def special(token: str | None, kind: int) -> list[Json]:
        return [] if token is None else [{"SpecialToken": {"id": token, "type_id": kind}}]

    single = [*special(first, 0), {"Sequence": {"id": "A", "type_id": 0}}, *special(last, 0)]
    again = first if middle == last and first != "[CLS]" else None
    pair = [
        *special(first, 0),
        {"Sequence": {"id": "A", "type_id": 0}},
        *special(middle, 0),
        *special(again, 1),
        {"Sequence": {"id": "B", "type_id": 1}},
        *special(last, 1),
    ]
    used = {token for token in (first, middle, last) if token is not None}
    named = {token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]} for token in sorted(used)}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": named}


def _added_tokens(metadata: Metadata, tokens: list[str]) -> list[Json]:
    """Tokens that are found in text as they stand: control tokens and the named ones are special, others plain."""
    types = metadata.get("tokenizer.ggml.token_type") or []
    special = {index: kind == _CONTROL for index, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED)}
    for key in _SPECIAL.values():
        if _token(metadata, tokens, key) is not None:
            special[metadata[f"tokenizer.ggml.{key}"]] = True
    shared = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": index, "content": tokens[index], **shared, "special": special[index]}
        for index in sorted(special)
        if index < len(tokens) and tokens[index]
    ]


def byte_alphabet() -> dict[int, str]:
    """GPT-2's characters for bytes, by byte: printable ones are themselves, others are moved behind U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in alphabet]
    return alphabet | {byte: chr(256 + index) for index, byte in enumerate(others)}


def _byte_level(metadata: Metadata, tokens: list[str]) -> Json:
    """Byte-level BPE, as GPT-2 brought it up: `tokenizer.ggml.model` "gpt2"."""
    name = metadata.get("tokenizer.ggml.pre", "default")
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        raise UnsupportedFormat(
            f"tokenizer.ggml.pre is {name!r}: how it splits text is not known, and splitting it in another way would "
            f"give other tokens than the model was trained on. Known are {', '.join(sorted(PRE_TOKENIZERS))}. Take the "
            "tokenizer from the safetensors checkpoint of this model."
        )
    alphabet = byte_alphabet()
    spelled = frozenset(alphabet.values())
    types = metadata.get("tokenizer.ggml.token_type") or []
    vocab = {token: index for index, token in enumerate(tokens)}
    for index, token in enumerate(tokens):
        if (
            not (token.isascii() or spelled.issuperset(token))
            and types
            and types[index] not in (_CONTROL, _USER_DEFINED)
        ):
            del vocab[token]
            vocab["".join(alphabet[byte] for byte in token.encode("utf-8", "surrogateescape"))] = index
    merges = metadata.get("tokenizer.ggml.merges")
    if merges is None:
        raise InvalidHeader("tokenizer.ggml.merges is missing, which a byte-level vocabulary needs.")
    model = _bpe(vocab, merges, ignore_merges=pre.ignore_merges)
    return {"model": model, "pre_tokenizer": pre.to_json(), "decoder": _BYTE_LEVEL_DECODER}


_BYTE_LEVEL_DECODER = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def _bpe(vocab: Mapping[str, int], merges: Iterable[Any], **options: Any) -> Json:
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {**model, **options, "vocab": vocab, "merges": merges}


def _sentencepiece(metadata: Metadata, tokens: list[str]) -> Json:
    """SentencePiece BPE with byte fallback: `tokenizer.ggml.model` "llama"."""
    if metadata.get("general.architecture") in _GEMMA:
        return _gemma(metadata, tokens)
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise InvalidHeader(f"tokenizer.ggml.scores must have one score for each of the {len(tokens)} tokens.")
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = metadata.get("tokenizer.ggml.merges") or implied_merges(vocab, scores)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    strip: Json = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "model": _bpe(vocab, merges, fuse_unk=True, byte_fallback=True, unk_token=_unknown(metadata, tokens)),
        # SentencePiece puts its dummy prefix in front of every text, whether it begins with a space or not, and
        # llama.cpp behind every special token too; `Metaspace`, which transformers builds here, does neither.
        "normalizer": _PREPEND_AND_REPLACE if prefix else _REPLACE_SPACE,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [*_SPACE_DECODERS, strip] if prefix else _SPACE_DECODERS},
    }


def _unknown(metadata: Metadata, tokens: list[str]) -> str | None:
    return _token(metadata, tokens, "unknown_token_id")


_SPACE_DECODERS: list[Json] = [
    {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_REPLACE_SPACE: Json = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPEND_AND_REPLACE: Json = {
    "type": "Sequence",
    "normalizers": [{"type": "Prepend", "prepend": _SPACE}, _REPLACE_SPACE],
}


def _gemma(metadata: Metadata, tokens: list[str]) -> Json:
    """Gemma's: runs of spaces are tokens, and the order of the vocabulary, not the scores, orders the merges."""
    spelled = [_SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]
    vocab = {token: index for index, token in enumerate(spelled)}
    merges = metadata.get("tokenizer.ggml.merges") or implied_merges(vocab, range(0, -len(tokens), -1))
    unknown = _unknown(metadata, tokens)
    added = _added_tokens(metadata, spelled)
    return {
        "model": _bpe(vocab, merges, fuse_unk=True, byte_fallback=True, unk_token=unknown),
        "normalizer": _REPLACE_SPACE,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": _SPACE_DECODERS},
        "added_tokens": added,
    }


def implied_merges(vocab: Mapping[str, int], scores: Iterable[float]) -> list[list[str]]:
    """The merges that a vocabulary implies: each token from every two tokens it can be cut into, best score first.

    Args:
        vocab: ids by token.
        scores: of the tokens, in their order.
    """
    found = []
    for token, score in zip(vocab, scores, strict=False):
        if len(token) > _LONGEST_MERGED:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                found.append((score, cut, len(right), left, right))
    found.sort(key=_by_score_and_lengths, reverse=True)
    return [[left, right] for _, _, _, left, right in found]


def _by_score_and_lengths(merge: tuple[float, int, int, str, str]) -> tuple[float, int, int]:
    return merge[:3]


def _unigram(metadata: Metadata, tokens: list[str]) -> Json:
    """SentencePiece unigram, as T5 has it: `tokenizer.ggml.model` "t5"."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise InvalidHeader(f"tokenizer.ggml.scores must have one score for each of the {len(tokens)} tokens.")
    names = list(tokens)
    # T5 writes blanks as <extra_id_0> to <extra_id_99>; the converter pads the vocabulary with [PAD...] there.
    blanks = [index for index, token in enumerate(names) if _PADDING.fullmatch(token)][:_NUM_T5_BLANKS]
    for offset, index in enumerate(blanks):
        names[index] = f"<extra_id_{_NUM_T5_BLANKS - 1 - offset}>"
    shared = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    extra = [{"id": index, "content": names[index], **shared} for index in blanks]
    charsmap = metadata.get("tokenizer.ggml.precompiled_charsmap")
    normalizer = None
    if charsmap:
        raw = bytes(value & 255 for value in charsmap)
        normalizer = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(raw).decode()}
    space = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "always", "split": True}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 2)
    pairs = [[token, score] for token, score in zip(names, scores, strict=True)]
    return {
        "model": {"type": "Unigram", "unk_id": unknown, "vocab": pairs, "byte_fallback": False},
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space]},
        "decoder": space,
        "added_tokens": sorted(_added_tokens(metadata, tokens) + extra, key=lambda token: int(token["id"])),
    }


def _wordpiece(metadata: Metadata, tokens: list[str]) -> Json:
    """WordPiece, as BERT has it; GGUF marks beginnings of words instead of continuations."""
    names = []
    for token in tokens:
        if token.startswith(_SPACE):
            names.append(token[1:])
        else:
            names.append(token if token.startswith("[") and token.endswith("]") else f"##{token}")
    unknown = _unknown(metadata, tokens) or "[UNK]"
    first = _token(metadata, tokens, "cls_token_id") or _token(metadata, tokens, "bos_token_id")
    last = _token(metadata, tokens, "seperator_token_id") or _token(metadata, tokens, "eos_token_id")
    return {
        "model": {
            "type": "WordPiece",
            "unk_token": unknown,
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {token: index for index, token in enumerate(names)},
        },
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "post_processor": _template_of(first, last, last, tokens),
        "added_tokens": _added_tokens(metadata, names),
    }


_BUILDERS: dict[str, Callable[[Metadata, list[str]], Json]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "t5": _unigram,
    "bert": _wordpiece,
}
