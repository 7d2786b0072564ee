"""Every field of published configs is known, and what follows from them is right (computed by hand here)."""

import json
from pathlib import Path
from typing import Any

import pytest

from loadstone.architecture.config import explain, kv_cache_bytes_per_token
from loadstone.architecture.config_fields import UNKNOWN
from loadstone.checkpoint.values import Checkpoint, CheckpointFile, Format, TensorInfo

CONFIGS = Path(__file__).parent / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))


def config(name: str) -> dict[str, Any]:
    return dict(json.loads((CONFIGS / f"{name}.json").read_text()))


def consequence(name: str, field: str) -> str | None:
    return {fact.field: fact.consequence for fact in explain(config(name))}[field]


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_known(name: str) -> None:
    facts = explain(config(name))
    assert [fact.field for fact in facts] == list(config(name))
    assert [fact.field for fact in facts if fact.meaning == UNKNOWN] == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2.5-7b", 2 * 28 * 4 * 128 * 2),
        ("llama-3.1-8b", 2 * 32 * 8 * 128 * 2),
        ("gemma-2-9b", 2 * 42 * 8 * 256 * 2),
        ("gpt2", 2 * 12 * 12 * 64 * 2),
        ("t5-small", 2 * 6 * 8 * 64 * 2),
        ("whisper-tiny", 2 * 4 * 6 * 64 * 2),
        ("deepseek-v3", 61 * (512 + 64) * 2),
    ],
)
def test_the_kv_cache_grows_by_this_much_a_token(name: str, expected: int) -> None:
    assert kv_cache_bytes_per_token(config(name), 16) == expected


def test_grouped_queries_are_counted() -> None:
    text = consequence("qwen2.5-7b", "num_key_value_heads")
    assert text is not None
    assert text.startswith(
        "7 query heads share each (grouped-query attention); the KV cache takes 57,344 bytes per token"
    )
    assert text.endswith("7 times less than with a pair for each query head")
    assert str(consequence("phi-2", "num_key_value_heads")).startswith("one for each query head (multi-head attention)")


def test_a_window_that_is_switched_off_says_so() -> None:
    assert "not in force: use_sliding_window is false" in str(consequence("qwen2.5-7b", "sliding_window"))
    assert consequence("qwen2.5-7b", "use_sliding_window") == "sliding_window (131,072) is disabled"
    assert consequence("mistral-7b", "sliding_window") == "the KV cache stops growing at 4,096 tokens, 537 MB"
    assert consequence("mixtral-8x7b", "sliding_window") == "every layer attends to the whole context"


def test_tied_embeddings_save_their_bytes() -> None:
    tied = {**config("qwen2.5-7b"), "tie_word_embeddings": True}
    facts = {fact.field: fact.consequence for fact in explain(tied)}
    assert facts["tie_word_embeddings"] == (
        "one table instead of two saves 1.09 GB (152,064 × 3,584 elements of bfloat16)"
    )


def test_experts_tell_their_share() -> None:
    assert str(consequence("qwen3-30b-a3b", "num_experts")).startswith("8 of 128 work on a token (6.2%); one has 4.72M")


def test_a_head_width_of_its_own_is_noticed() -> None:
    text = "not hidden size over heads (64): the heads together are 4,096 wide"
    assert consequence("qwen3-30b-a3b", "head_dim") == text


def test_stretched_positions_tell_how_far() -> None:
    text = consequence("llama-3.1-8b", "rope_scaling")
    assert text == "type llama3, stretched 8 times: 8,192 tokens become 65,536"
    assert "stretched 40 times: 4,096 tokens become 163,840" in str(consequence("deepseek-v3", "rope_scaling"))


def test_patches_are_counted() -> None:
    assert consequence("vit-base", "patch_size") == "an image becomes 14 × 14 = 196 patches"


def test_what_the_files_hold_is_compared_with_what_is_declared() -> None:
    info = TensorInfo(
        name="model.embed_tokens.weight",
        dtype="float32",
        shape=(5, 3584),
        file=Path("a"),
        offset=0,
        nbytes=5 * 3584 * 4,
    )
    checkpoint = Checkpoint(
        format=Format.SAFETENSORS,
        root=Path(),
        files=(CheckpointFile(path=Path("a"), nbytes=1),),
        tensors={info.name: info},
    )
    facts = {fact.field: fact.consequence for fact in explain(config("qwen2.5-7b"), checkpoint)}
    assert facts["torch_dtype"] == (
        "2 bytes per parameter; the files mostly hold float32, so loading as bfloat16 casts"
    )
    assert str(facts["vocab_size"]).endswith("but the files hold 5 rows")


def test_nested_configs_are_gone_into_with_dotted_names() -> None:
    facts = explain({"model_type": "llava", "text_config": {"hidden_size": 8}})
    assert [fact.field for fact in facts] == ["model_type", "text_config", "text_config.hidden_size"]


def test_an_unknown_field_gets_an_honest_sentence() -> None:
    assert explain({"bananas": 3})[0].meaning == UNKNOWN


@pytest.mark.parametrize("value", ["many", [], {}, -3, 0, 1.5, True, None])
def test_fields_of_the_wrong_type_do_not_end_the_explanation(value: object) -> None:
    broken = dict.fromkeys(config("qwen3-30b-a3b") | config("deepseek-v3") | config("vit-base"), value)
    assert len(explain(broken)) == len(broken)
