"""What each block does in a pass beside multiplying with its weights."""

from typing import Any

import pytest
from plan_models import checkpoint, llama

from loadstone.plan.beside import Passes, beside_by_order
from loadstone.plan.facts import facts_of
from loadstone.plan.reserve import Pressure
from loadstone.plan.units import inventory
from loadstone.plan.values import Run

PAIR = 2 * 4 * (16 + 16)  # floating-point operations of a query with a key and its value, four heads of 16
RUN = Run(context=100, batch=1, prompt_tokens=60)


def besides(config: dict[str, Any] | None = None, run: Run = RUN) -> dict[int, Passes]:
    model = llama(layers=3)
    found = checkpoint(
        {name: info.shape for name, info in model.tensors.items()}, {**(model.config or {}), **(config or {})}
    )
    facts = facts_of(found.config)
    return dict(beside_by_order(facts, Pressure(run=run, dtype_bits=16), inventory(found, facts, "bfloat16").units))


def test_a_query_meets_all_that_is_kept_and_a_prompt_half_of_itself() -> None:
    found = besides()
    assert len(found) == 3
    assert [passes[0].num_steps for passes in found.values()] == [60, 0, 0]  # once for all layers
    assert found[2] == found[3]
    decode, prompt = found[2]
    assert decode.query_flops == PAIR * 100
    assert decode.cache_bytes == 2 * 2 * 16 * 100 * 2  # keys and values of two heads
    assert (decode.attention_flops, prompt.query_flops, prompt.cache_bytes) == (0, 0, 0)
    assert prompt.attention_flops == PAIR * 60 * 60 / 2
    assert prompt.activation_bytes > 30 * decode.activation_bytes > 0


def test_padding_and_windows_have_every_pair_computed() -> None:
    decode, prompt = next(iter(besides(run=Run(context=100, batch=3, prompt_tokens=60)).values()))
    assert decode.query_flops == 3 * PAIR * 100
    assert prompt.attention_flops == 3 * PAIR * 60 * 60
    windowed = {"model_type": "mistral", "sliding_window": 20}
    decode, prompt = next(iter(besides(windowed).values()))
    assert decode.query_flops == PAIR * 20
    assert prompt.attention_flops == PAIR * 60 * 60


def test_an_encoder_has_one_kind_of_pass() -> None:
    config = {"model_type": "bert", "architectures": ["BertModel"], "head_dim": None, "hidden_size": 64}
    found = besides(config)
    assert len(found) == 3
    for passes in found.values():
        assert passes[0] == passes[1]
        assert passes[0].attention_flops == pytest.approx(PAIR * 60 * 60)


def test_of_an_encoder_decoder_the_encoder_runs_once_and_the_decoder_looks_at_it() -> None:
    shapes = {
        f"{side}.block.{layer}.layer.0.SelfAttention.q.weight": (64, 64)
        for side in ("encoder", "decoder")
        for layer in range(2)
    }
    config = {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "d_model": 64,
        "d_kv": 16,
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "d_ff": 128,
        "vocab_size": 50,
    }
    found = checkpoint(shapes, config)
    facts = facts_of(config)
    units = inventory(found, facts, "bfloat16").units
    passes = list(beside_by_order(facts, Pressure(run=RUN, dtype_bits=16), units).values())
    assert len(passes) == 4
    for decode, prompt in passes[:2]:
        assert (decode.query_flops, decode.activation_bytes) == (0, 0)
        assert prompt.attention_flops == PAIR * 60 * 60
    for decode, prompt in passes[2:]:
        assert prompt.query_flops == PAIR * 60
        assert decode.query_flops > prompt.query_flops


def test_a_model_without_a_config_has_nothing_beside() -> None:
    found = checkpoint({"weight": (4, 4)})
    units = inventory(found, facts_of(None), "bfloat16").units
    assert not beside_by_order(facts_of(None), Pressure(run=RUN, dtype_bits=16), units)
