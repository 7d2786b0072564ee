"""How long products and what is beside them take, from measured rates."""

from dataclasses import replace

import pytest
from plan_models import checkpoint

from loadstone.hardware.spec import ComputeRate, TokensRate
from loadstone.plan.cost import Beside, alone_s, transfer_s, work
from loadstone.plan.facts import facts_of
from loadstone.plan.units import inventory
from loadstone.plan.values import Seen, Unit, UnitKind

PLAIN = ComputeRate(weight_bytes_per_s=1e9, flops_per_s=1e12)
FULL = replace(
    PLAIN,
    few_tokens=(TokensRate(tokens=4, flops_per_s=2e9), TokensRate(tokens=64, flops_per_s=2e11)),
    query_flops_per_s=1e9,
    attention_flops_per_s=1e10,
    activation_bytes_per_s=2e9,
    step_s=1e-3,
)


def unit(kind: UnitKind = UnitKind.BLOCK, use_share: float = 1.0, seen: Seen = Seen.ALL) -> Unit:
    return Unit(
        name="model.layers.0",
        kind=kind,
        order=0,
        tensors=("a", "b"),
        num_parameters=1_000_000,
        stored_bytes=2_000_000,
        memory_bytes=2_000_000,
        mappable_bytes=0,
        largest_bytes=0,
        use_share=use_share,
        seen=seen,
    )


def test_products_run_at_the_rate_that_was_measured_with_so_many_tokens() -> None:
    one = work(unit(), FULL, 1)
    assert one.arithmetic_s == pytest.approx(one.memory_s) == 2e-3  # by definition: what reading the weights allows
    assert one.seconds == pytest.approx(2e-3 + 2 * 1e-3)  # and a step for each of two tensors
    assert work(unit(), FULL, 4).arithmetic_s == pytest.approx(8e6 / 2e9)
    assert work(unit(), FULL, 16).arithmetic_s == pytest.approx(32e6 / 2e10)  # in the middle, by logarithms
    assert work(unit(), FULL, 64).arithmetic_s == pytest.approx(128e6 / 2e11)
    for many in (512, 5000):
        assert work(unit(), FULL, many).arithmetic_s == pytest.approx(many * 2e6 / 1e12)


def test_with_two_rates_only_products_are_as_fast_as_the_slower_of_both_allows() -> None:
    assert work(unit(), PLAIN, 1).seconds == 2e-3
    assert work(unit(), PLAIN, 10_000).seconds == pytest.approx(2e10 / 1e12)


def test_an_expert_multiplies_with_the_tokens_that_chose_it() -> None:
    some = work(unit(UnitKind.EXPERT, use_share=1 / 8), FULL, 512)
    assert some.arithmetic_s == pytest.approx(512 * 2e6 / 8 / 2e11, rel=0.01)  # 64 of 512
    assert some.steps_s == pytest.approx(2e-3)
    one = work(unit(UnitKind.EXPERT, use_share=1 / 8), FULL, 1)
    assert one.seconds == pytest.approx((2e-3 + 2e-3) / 8)


@pytest.mark.parametrize(("seen", "decode", "prompt"), [(Seen.ALL, 2, 60), (Seen.NEWEST, 2, 2), (Seen.PROMPT, 0, 60)])
def test_units_compute_with_the_tokens_that_they_are_given(seen: Seen, decode: int, prompt: int) -> None:
    given = unit(seen=seen)
    assert (given.num_tokens((2, 60), 0), given.num_tokens((2, 60), 1)) == (decode, prompt)
    if not decode:
        assert work(given, FULL, 0).seconds == 0


def test_attention_and_what_is_handed_on_have_rates_of_their_own() -> None:
    beside = Beside(cache_bytes=10_000_000, query_flops=3e6, attention_flops=5e9, activation_bytes=4_000_000)
    assert beside.seconds(FULL) == pytest.approx(10e-3 + 0.5 + 2e-3)  # the cache's bytes take longer than the query
    assert replace(beside, query_flops=3e7).seconds(FULL) == pytest.approx(30e-3 + 0.5 + 2e-3)
    assert beside.seconds(PLAIN) == pytest.approx(10e-3 + 5e-3 + 4e-3)
    assert beside + beside == Beside(
        cache_bytes=20_000_000, query_flops=6e6, attention_flops=1e10, activation_bytes=8_000_000
    )


def test_an_encoder_sees_the_prompt_and_its_decoder_and_heads_the_newest_tokens() -> None:
    shapes = {
        "shared.weight": (50, 8),
        "encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8),
        "encoder.final_layer_norm.weight": (8,),
        "decoder.block.0.layer.0.SelfAttention.q.weight": (8, 8),
        "lm_head.weight": (50, 8),
    }
    config = {"model_type": "t5", "is_encoder_decoder": True, "num_layers": 1, "d_model": 8, "vocab_size": 50}
    found = checkpoint(shapes, {**config, "architectures": ["T5ForConditionalGeneration"], "num_heads": 2, "d_kv": 4})
    seen = {one.name: one.seen for one in inventory(found, facts_of(found.config), "bfloat16").units}
    assert seen == {
        "shared": Seen.ALL,
        "encoder.block.0": Seen.PROMPT,
        "encoder.final_layer_norm": Seen.PROMPT,
        "decoder.block.0": Seen.NEWEST,
        "lm_head": Seen.NEWEST,
    }


def test_a_block_whose_experts_are_in_one_tensor_multiplies_with_those_that_were_chosen() -> None:
    shapes = {
        "model.layers.0.block_sparse_moe.input_linear.weight": (8, 32, 16),
        "model.layers.0.block_sparse_moe.router.layer.weight": (8, 16),
    }
    config = {"model_type": "granitemoe", "num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 16}
    found = checkpoint(shapes, config)
    (block,) = inventory(found, facts_of(config), "bfloat16").units
    assert (block.expert_parameters, block.expert_share) == (8 * 32 * 16, 1 / 4)
    one = work(block, PLAIN, 1)
    assert one.memory_s == pytest.approx((8 * 32 * 16 * 2 / 4 + 8 * 16 * 2) / 1e9, rel=1e-3)
    assert one.arithmetic_s == pytest.approx(2 * (8 * 32 * 16 / 4 + 8 * 16) / 1e12, rel=1e-3)
    assert work(block, PLAIN, 1000).memory_s == pytest.approx(block.memory_bytes / 1e9)


def test_an_accelerator_decodes_blocks_in_the_stream_that_they_come_in() -> None:
    way, slow = (1e9, "link"), ComputeRate(weight_bytes_per_s=1e10, flops_per_s=1e12)
    plain = replace(unit(), stored_bytes=1000)
    blocks = replace(plain, encoded_parameters=10**6)
    assert transfer_s(blocks, 1, way) == transfer_s(plain, 1, way) == transfer_s(plain, 1, way, slow)
    assert transfer_s(blocks, 1, way, slow) - transfer_s(plain, 1, way) == pytest.approx(24e6 / 1e10)


def test_nothing_hides_the_way_of_an_expert_to_an_accelerator() -> None:
    way, rate = (1e9, "link"), ComputeRate(weight_bytes_per_s=1e10, flops_per_s=1e12)
    expert = unit(UnitKind.EXPERT, 0.25)
    assert alone_s(expert, 1, way, rate) == transfer_s(expert, 1, way, rate) > 0
    assert alone_s(expert, 1, way) == alone_s(unit(), 1, way, rate) == 0
