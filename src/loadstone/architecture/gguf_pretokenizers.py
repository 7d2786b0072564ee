"""How each byte-level vocabulary splits text before merging, by its name in `tokenizer.ggml.pre`.

Source: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp (llm_tokenizer_bpe, and the table of
pre-tokenizer names), with the regular expressions in the original tokenizer.json spelling that it quotes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED_WORD = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{suffix}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{suffix}"
)
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_PUNCTUATION_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

_LLAMA3 = "|".join((_CONTRACTIONS, _WORD, r"\p{N}{1,3}", _PUNCTUATION, _TAIL))
_QWEN2 = "|".join((_CONTRACTIONS, _WORD, r"\p{N}", _PUNCTUATION, _TAIL))
_QWEN35 = "|".join(
    (_CONTRACTIONS, r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", _TAIL)
)
_TEKKEN = "|".join((_CASED_WORD.replace("{suffix}", ""), r"\p{N}", _PUNCTUATION_SLASH, _TAIL))
_GPT4O = "|".join((_CASED_WORD.replace("{suffix}", f"{_CONTRACTIONS}?"), r"\p{N}{1,3}", _PUNCTUATION_SLASH, _TAIL))
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    rf"|{_TAIL}",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")
_SEED_CODER = "|".join((_CONTRACTIONS, _WORD, r"\p{N}", r" ?[^\s\p{L}\p{N}\r\n]+", _TAIL))
_BAILING = "|".join((r"'(?i:[sdmt]|ll|ve|re)", _WORD, r"\p{N}", _PUNCTUATION, r"\s*[\r\n]|\s+(?!\S)|\s+"))
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """One way of splitting.

    Attributes:
        splits: regular expressions, one applied to the pieces of the other; matches become pieces of their own.
        digits: whether every digit is a piece of its own, before anything else.
        gpt2: whether GPT-2's own expression follows.
        ignore_merges: whether a piece that is a token is taken whole, whatever the merges say.
        add_bos: whether text begins with the BOS token where the file does not say.
    """

    splits: tuple[str, ...] = ()
    digits: bool = False
    gpt2: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def to_json(self) -> dict[str, Any]:
        """The `pre_tokenizer` of a tokenizer.json."""
        steps: list[dict[str, Any]] = []
        if self.digits:
            steps.append({"type": "Digits", "individual_digits": True})
        steps.extend(
            {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
            for split in self.splits
        )
        steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": self.gpt2})
        return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


_GPT2_KIND = PreTokenizer(gpt2=True)
_STARCODER_KIND = PreTokenizer(digits=True, gpt2=True)
_QWEN2_KIND = PreTokenizer(splits=(_QWEN2,))
_LLAMA3_KIND = PreTokenizer(splits=(_LLAMA3,), ignore_merges=True, add_bos=True)
_GPT4O_KIND = PreTokenizer(splits=(_GPT4O,))
_DEEPSEEK3_KIND = PreTokenizer(splits=_DEEPSEEK3)
_BAILING_KIND = PreTokenizer(splits=(_BAILING,))
_GLM_KIND = PreTokenizer(splits=(_LLAMA3,), ignore_merges=True)

_KINDS: tuple[tuple[PreTokenizer, str], ...] = (
    (
        _GPT2_KIND,
        "default gpt-2 gpt2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum modern-bert mpt olmo "
        "jais trillion granite-docling exaone4 jina-v1-en jina-v2-code roberta-bpe",
    ),
    (_STARCODER_KIND, "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    (_QWEN2_KIND, "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2"),
    (PreTokenizer(splits=(_QWEN35,)), "qwen35"),
    (_LLAMA3_KIND, "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"),
    (PreTokenizer(splits=(_LLAMA3,)), "dbrx smaug-bpe chatglm-bpe"),
    (_GLM_KIND, "glm4 glm5"),
    (PreTokenizer(splits=(_TEKKEN,), ignore_merges=True, add_bos=True), "tekken"),
    (_GPT4O_KIND, "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (_DEEPSEEK3_KIND, "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    (PreTokenizer(splits=_DEEPSEEK_CODER), "deepseek-coder"),
    (_BAILING_KIND, "bailingmoe bailingmoe2 llada-moe"),
    (PreTokenizer(splits=(_SEED_CODER,)), "seed-coder"),
    (PreTokenizer(splits=(_BLOOM,)), "bloom poro-chat gpt3-finnish"),
    (PreTokenizer(splits=(_BLOOM, r"\p{N}")), "viking"),
    (PreTokenizer(splits=(r"\p{N}+", r"(?=(\d{3})+(?!\d))")), "superbpe"),
    (PreTokenizer(splits=(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")), "falcon"),
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: kind for kind, names in _KINDS for name in names.split()}
