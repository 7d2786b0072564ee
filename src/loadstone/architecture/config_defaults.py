"""The sizes that transformers' config classes fill in where config.json leaves them out, and how layers alternate.

A config.json holds what differs from the defaults of the class, so a field that is absent is not unknown. A test
compares this table with the installed transformers.

Source: https://github.com/huggingface/transformers/tree/main/src/transformers/models (configuration_*.py)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a config class fills in.

    Attributes:
        num_layers: blocks; the decoder's in encoder-decoder models.
        num_heads: query heads.
        num_kv_heads: key and value heads; None for as many as query heads.
        head_dim: the width of a head; None for width over heads.
        width: of the residual stream.
        window: the sliding window, or the chunk of chunked attention, in tokens.
        tied: whether embedding and output head are one tensor.
    """

    num_layers: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    width: int | None = None
    window: int | None = None
    tied: bool | None = None


# model_type, layers, heads, kv heads, head_dim, width, window, tied
_ROWS: tuple[tuple[str, int, int, int | None, int | None, int, int | None, bool | None], ...] = (
    ("llama", 32, 32, None, None, 4096, None, False),
    ("mistral", 32, 32, 8, None, 4096, 4096, False),
    ("mixtral", 32, 32, 8, None, 4096, None, False),
    ("qwen2", 32, 32, 32, None, 4096, 4096, False),
    ("qwen2_moe", 24, 16, 16, None, 2048, 4096, False),
    ("qwen3", 32, 32, 32, 128, 4096, 4096, False),
    ("qwen3_moe", 24, 32, 4, None, 2048, 4096, False),
    ("qwen3_next", 48, 16, 2, 256, 2048, None, False),
    ("qwen2_vl_text", 80, 64, 8, None, 8192, 4096, None),
    ("qwen2_5_vl_text", 80, 64, 8, None, 8192, 4096, None),
    ("qwen3_vl_text", 32, 32, 32, 128, 4096, None, None),
    ("qwen3_5_text", 32, 16, 4, 256, 4096, None, False),
    ("gemma", 28, 16, 16, 256, 3072, None, True),
    ("gemma2", 26, 8, 4, 256, 2304, 4096, True),
    ("gemma3_text", 26, 8, 4, 256, 2304, 4096, True),
    ("gemma3n_text", 35, 8, 2, 256, 2048, 512, True),
    ("gemma4_text", 30, 8, 4, 256, 2304, 512, True),
    ("phi", 24, 32, None, None, 2048, None, False),
    ("phi3", 32, 32, None, None, 3072, None, False),
    ("phimoe", 32, 32, 8, None, 4096, None, False),
    ("gpt2", 12, 12, None, None, 768, None, True),
    ("gpt_neo", 24, 16, None, None, 2048, None, True),
    ("gpt_neox", 44, 64, None, None, 6144, None, False),
    ("gptj", 28, 16, None, None, 4096, None, False),
    ("falcon", 32, 71, None, None, 4544, None, True),
    ("opt", 12, 12, None, None, 768, None, True),
    ("bert", 12, 12, None, None, 768, None, True),
    ("roberta", 12, 12, None, None, 768, None, True),
    ("xlm-roberta", 12, 12, None, None, 768, None, True),
    ("distilbert", 6, 12, None, None, 768, None, True),
    ("electra", 12, 4, None, None, 256, None, True),
    ("t5", 6, 8, None, 64, 512, None, True),
    ("mt5", 8, 6, None, 64, 512, None, True),
    ("umt5", 8, 6, None, 64, 512, None, True),
    ("bart", 12, 16, None, None, 1024, None, True),
    ("whisper", 4, 6, None, None, 384, None, True),
    ("vit", 12, 12, None, None, 768, None, None),
    ("clip_text_model", 12, 8, None, None, 512, None, None),
    ("clip_vision_model", 12, 12, None, None, 768, None, None),
    ("siglip_text_model", 12, 12, None, None, 768, None, None),
    ("siglip_vision_model", 12, 12, None, None, 768, None, None),
    ("deepseek_v2", 32, 32, None, None, 4096, None, False),
    ("deepseek_v3", 61, 128, 128, None, 7168, None, False),
    ("gpt_oss", 36, 64, 8, 64, 2880, 128, False),
    ("olmo2", 32, 32, None, None, 4096, None, False),
    ("olmo3", 32, 32, None, None, 4096, 4096, False),
    ("smollm3", 36, 16, 4, None, 2048, None, True),
    ("granite", 32, 32, None, None, 4096, None, False),
    ("stablelm", 32, 32, 32, None, 2560, None, False),
    ("starcoder2", 30, 24, 2, None, 3072, None, True),
    ("cohere", 40, 64, None, None, 8192, None, True),
    ("cohere2", 40, 64, None, 128, 8192, 4096, True),
    ("llama4_text", 48, 40, 8, 128, 5120, 8192, False),
    ("ministral", 32, 32, 8, None, 4096, 4096, False),
    ("modernbert", 22, 12, None, None, 768, None, True),
    ("glm4", 40, 32, 2, 128, 4096, None, False),
    ("glm4_moe", 46, 96, 8, None, 4096, None, False),
)

DEFAULTS: dict[str, Defaults] = {
    row[0]: Defaults(
        num_layers=row[1],
        num_heads=row[2],
        num_kv_heads=row[3],
        head_dim=row[4],
        width=row[5],
        window=row[6],
        tied=row[7],
    )
    for row in _ROWS
}

# The kind of the layers that are not full attention, and every how many layers one is; layer_types overrules it.
ALTERNATION: dict[str, tuple[str, int]] = {
    "gemma2": ("sliding_attention", 2),
    "gemma3_text": ("sliding_attention", 6),
    "gemma3n_text": ("sliding_attention", 5),
    "gemma4_text": ("sliding_attention", 6),
    "gpt_oss": ("sliding_attention", 2),
    "cohere2": ("sliding_attention", 4),
    "olmo3": ("sliding_attention", 4),
    "llama4_text": ("chunked_attention", 4),
    "qwen3_next": ("linear_attention", 4),
    "qwen3_5_text": ("linear_attention", 4),
}

# Families whose window is off unless use_sliding_window is true.
WINDOW_ON_REQUEST = frozenset(
    {
        "qwen2",
        "qwen2_moe",
        "qwen2_vl",
        "qwen2_vl_text",
        "qwen2_5_vl",
        "qwen2_5_vl_text",
        "qwen3",
        "qwen3_moe",
        "smollm3",
    }
)

# Families that see a whole input at once and keep no KV cache, unless is_decoder is true.
ENCODER_ONLY = frozenset(
    {
        "albert",
        "bert",
        "camembert",
        "clip",
        "clip_text_model",
        "clip_vision_model",
        "deberta",
        "deberta-v2",
        "dinov2",
        "distilbert",
        "electra",
        "hubert",
        "modernbert",
        "mpnet",
        "roberta",
        "siglip",
        "siglip_text_model",
        "siglip_vision_model",
        "vit",
        "wav2vec2",
        "xlm-roberta",
    }
)
