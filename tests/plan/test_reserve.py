"""The cache as transformers really allocates it, and the terms of one pass."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

import builders
from loadstone.hardware.cpu import cpu
from loadstone.plan.facts import Facts, facts_of
from loadstone.plan.layer_caches import LayerCache
from loadstone.plan.reserve import (
    FIRST_PASS_BYTES,
    FIRST_PASS_BYTES_16,
    KERNEL_BYTES,
    PACKING_BYTES,
    Loading,
    Pressure,
    activation_bytes,
    beside_cache,
    cache_bytes,
    heap_bytes,
    logits_bytes,
    sums_apart,
    terms,
)
from loadstone.plan.values import Run

NUM_TOKENS = 12


def allocated(cache: Any) -> int:
    """Bytes of all storages that a cache holds, each once."""
    parts = (
        [cache.self_attention_cache, cache.cross_attention_cache] if hasattr(cache, "self_attention_cache") else [cache]
    )
    found: dict[int, int] = {}
    for part in parts:
        for layer in part.layers:
            for value in vars(layer).values():
                for tensor in value.values() if isinstance(value, dict) else [value]:
                    if isinstance(tensor, torch.Tensor) and tensor.numel() > 1:
                        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


def facts(model: Any) -> Facts:
    config = json.loads(model.config.to_json_string(use_diff=False))
    return facts_of({**config, "architectures": [type(model).__name__]})


@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "qwen2",
        "gpt2",
        "gemma3_text",  # windows
        "gpt_oss",
        "mixtral",
        "deepseek_v3",  # the compressed vector is cached
        "mamba",
        "mamba2",
        "jamba",
        "bamba",
        "falcon_h1",
        "qwen3_next",
        "lfm2_moe",
        "gemma4_text",  # layers of other widths
        "mpt",
    ],
)
def test_the_cache_of_a_prompt_is_predicted_to_the_byte(model_type: str) -> None:
    model: Any = builders.tiny_model(model_type, "causal")
    with torch.inference_mode():
        out = model(input_ids=torch.arange(3, 3 + NUM_TOKENS)[None].repeat(2, 1), use_cache=True)
    real = allocated(out.get("past_key_values") or out.get("cache_params"))
    run = Run(context=NUM_TOKENS, prompt_tokens=NUM_TOKENS, batch=2)
    assert sum(cache_bytes(facts(model), Pressure(run=run, dtype_bits=32))) == real


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_a_decoder_also_keeps_what_it_attends_to_of_the_encoder(model_type: str) -> None:
    model: Any = builders.tiny_model(model_type, "seq2seq")
    tokens = torch.arange(3, 3 + NUM_TOKENS)[None]
    with torch.inference_mode():
        real = allocated(model(input_ids=tokens, decoder_input_ids=tokens, use_cache=True).past_key_values)
    run = Run(context=2 * NUM_TOKENS - 1, prompt_tokens=NUM_TOKENS)  # a decoder begins with one token of its own
    assert sum(cache_bytes(facts(model), Pressure(run=run, dtype_bits=32))) == real


@pytest.mark.parametrize("model_type", ["gemma3_text", "mistral"])
def test_a_window_is_an_upper_bound_at_every_step(model_type: str) -> None:
    model: Any = builders.tiny_model(model_type, "causal")
    run = Run(context=NUM_TOKENS + 6, prompt_tokens=NUM_TOKENS)
    bound = sum(cache_bytes(facts(model), Pressure(run=run, dtype_bits=32)))
    most, cache, tokens = 0, None, torch.arange(3, 3 + NUM_TOKENS)[None]
    with torch.inference_mode():
        for _ in range(run.context - run.prompt_tokens + 1):
            cache = model(input_ids=tokens, past_key_values=cache, use_cache=True).past_key_values
            most, tokens = max(most, allocated(cache)), torch.tensor([[5]])
    assert most <= bound <= 1.5 * most


def test_encoders_keep_nothing() -> None:
    for model_type, kind in (("bert", "encoder"), ("vit", "image")):
        found = facts(builders.tiny_model(model_type, kind))
        assert not found.caches
        assert cache_bytes(found, Pressure(run=Run(), dtype_bits=16)) == ()


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"sliding_window": 100}, [100] * 6),
        ({"sliding_window": 100, "use_sliding_window": False}, [None] * 6),
        ({"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 4}, [None] * 4 + [100] * 2),
        ({"sliding_window": 100, "sliding_window_pattern": 3}, [100, 100, None] * 2),
        ({"sliding_window": 100, "model_type": "gemma2"}, [100, None] * 3),
        ({"sliding_window": 100, "layer_types": ["full_attention", "sliding_attention"]}, [None, 100] * 3),
        ({"attention_chunk_size": 50, "model_type": "llama4_text"}, [50, 50, 50, None, 50, 50]),
    ],
)
def test_windows_follow_the_rules_of_each_family(fields: dict[str, Any], windows: list[int | None]) -> None:
    config = {"num_hidden_layers": 6, "hidden_size": 8, "num_attention_heads": 2, **fields}
    assert [layer.window for layer in facts_of(config).layers] == windows


def test_layers_that_read_the_cache_of_others_keep_none() -> None:
    config = {"num_hidden_layers": 4, "hidden_size": 8, "num_attention_heads": 2, "num_kv_shared_layers": 3}
    assert [layer.token_numel for layer in facts_of(config).layers] == [16, 0, 0, 0]


def test_the_language_model_inside_a_larger_one_is_found() -> None:
    text = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 10}
    found = facts_of(
        {"text_config": text, "vision_config": {"hidden_size": 99}, "architectures": ["XForConditionalGeneration"]}
    )
    assert (found.width, found.vocab, len(found.layers), found.needs_head) == (8, 10, 2, True)


def test_terms_grow_with_the_tokens_and_stand_apart() -> None:
    given = Facts(
        width=100, num_heads=4, num_kv_heads=2, key_dim=25, value_dim=25, inner=300, vocab=1000,
        layers=(LayerCache(token_numel=100),) * 3, needs_head=True, caches=True,
    )  # fmt: skip
    short = terms(given, Pressure(run=Run(context=100, prompt_tokens=10), dtype_bits=16))
    assert short == {
        "residual": 4 * 10 * 100 * 2,
        "norm": 3 * 10 * 100 * 4,
        "attention": 10 * (3 * 100 + 2 * 100 + 100) * 2,
        "feed_forward": 10 * 300 * (2 + 2 + 2),
        "experts": 0,
        "mask": 0,
        "cache_growth": 100 * 100 * 2,
        "logits": 1000 * 2,
        "logits_float32": 3 * 1000 * 4,
    }
    assert activation_bytes(short) == 8000 + 20_000 + 18_000
    assert logits_bytes(short) == 14_000
    padded = terms(given, Pressure(run=Run(context=100, prompt_tokens=10, batch=2), dtype_bits=16))
    assert padded["mask"] == 2 * 10 * 100
    # With a mask keys and values are repeated for every query head, over the whole context.
    assert padded["attention"] - 2 * short["attention"] == 2 * 100 * 4 * 50 * 2


def test_staging_shares_the_place_of_what_a_pass_needs() -> None:
    loading = Loading(num_tensors=10, staging_bytes=64_000_000, largest_bytes=5)
    assert loading.workspace_bytes(0, 0) == 64_000_005 + 120_000
    assert loading.workspace_bytes(10**9, 0) == 120_000
    assert loading.workspace_bytes(60_000_000, 3_000_000) == 3_000_000 + 1_000_005 + 120_000


def test_an_allocator_cannot_use_blocks_again_that_a_cache_has_moved_into() -> None:
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    }
    pressure = Pressure(run=Run(context=518, prompt_tokens=512), dtype_bits=32)
    assert heap_bytes(facts_of(config), pressure) == int(0.7 * 24 * 512 * 4864 * 4) + FIRST_PASS_BYTES + PACKING_BYTES


@pytest.mark.parametrize(
    ("tokens", "layers", "bits", "kinds"),
    [
        (64, 8, 16, 29),  # of 64 draws, more than half have a number that is drawn anyway
        (64, 1, 16, 8),  # as many as there are experts in all
        (1, 8, 16, 1),
        (64, 8, 32, 0),  # another library
        (100_000_000, 10_000, 16, 512),  # two products each, as many as are kept
    ],
)
def test_kernels_for_as_many_tokens_as_experts_may_get_are_counted(
    tokens: int, layers: int, bits: int, kinds: int
) -> None:
    config = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    pressure = Pressure(run=Run(context=tokens + 1, prompt_tokens=tokens), dtype_bits=bits)
    found = facts_of(config)
    without = heap_bytes(replace(found, num_experts=0), pressure)
    assert heap_bytes(found, pressure) - without == 2 * kinds * KERNEL_BYTES


def test_an_allocator_keeps_small_blocks_and_gives_large_ones_back() -> None:
    model: Any = builders.tiny_model("llama", "causal")
    short = Pressure(run=Run(context=64, prompt_tokens=32), dtype_bits=32)
    found = facts(model)
    used = activation_bytes(terms(found, short)) + logits_bytes(terms(found, short)) + sum(cache_bytes(found, short))
    assert heap_bytes(found, short) == int(1.05 * used) + FIRST_PASS_BYTES + PACKING_BYTES
    long = Pressure(run=Run(context=10**8, prompt_tokens=10**8), dtype_bits=32)
    assert heap_bytes(found, long) < 10**9 < activation_bytes(terms(found, long))


def test_where_nothing_is_kept_between_passes_little_is_left_between_blocks() -> None:
    model: Any = builders.tiny_model("bert", "encoder")
    found, pressure = facts(model), Pressure(run=Run(context=64, prompt_tokens=64), dtype_bits=32, num_threads=3)
    between = activation_bytes(terms(found, pressure))
    assert heap_bytes(found, pressure) == int(0.75 * between) + FIRST_PASS_BYTES + 3 * PACKING_BYTES


_PRODUCTS = """
import sys, torch
from loadstone.hardware.memory import resident
dtype = getattr(torch, sys.argv[1])
tokens, width, inner = 512, 1024, 8192
torch.ones(1 << 20).add_(1)  # threads
shapes = (tokens, width), (inner, width), (tokens, inner)
values, weight, product = (torch.ones(*shape, dtype=dtype) for shape in shapes)
before = resident().anonymous_bytes
for _ in range(3):
    torch.mm(values, weight.t(), out=product)
print(resident().anonymous_bytes - before, torch.get_num_threads())
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_libraries_keep_of_a_product_is_planned(dtype: str) -> None:
    made = subprocess.run([sys.executable, "-c", _PRODUCTS, dtype], check=True, capture_output=True, text=True)
    kept, num_threads = map(int, made.stdout.split())
    planned = PACKING_BYTES * num_threads if dtype == "float32" else 0
    assert kept <= planned + FIRST_PASS_BYTES


@pytest.mark.parametrize(
    ("dtype", "features", "apart"),
    [
        ("bfloat16", (), True),
        ("bfloat16", ("avx2", "avx512f", "avx512_vnni"), True),
        ("bfloat16", ("avx512f", "avx512_bf16"), False),
        ("bfloat16", ("amx_tile", "amx_bf16"), False),
        ("bfloat16", ("neon", "bf16"), False),
        ("float16", (), False),
        ("float32", (), False),
    ],
)
def test_instructions_for_bfloat16_need_no_sums_beside(dtype: str, features: tuple[str, ...], apart: bool) -> None:
    assert sums_apart(dtype, features) is apart


def most_alive(profile: Any) -> int:
    """The most bytes of tensors that a profile saw at a time, beside those that were there before."""
    now, most = 0, 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        now += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, now)
    return most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_product_takes_no_more_than_is_planned(dtype: torch.dtype) -> None:
    tokens, width, inner = 256, 256, 4096
    values, weight = torch.ones(tokens, width, dtype=dtype), torch.ones(inner, width, dtype=dtype)
    torch.nn.functional.linear(values, weight)  # kernels come into being
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.nn.functional.linear(values, weight)
    most = most_alive(profile)
    apart = sums_apart(str(dtype).removeprefix("torch."), cpu().features)
    planned = tokens * inner * (dtype.itemsize + (4 if apart else 0))
    packed = 2 * width * inner * dtype.itemsize  # weights in oneDNN's order, in part
    assert tokens * inner * dtype.itemsize <= most <= planned + packed


def test_where_sums_lie_beside_their_product_a_pass_takes_them() -> None:
    model: Any = builders.tiny_model("mixtral", "causal")
    plain = Pressure(run=Run(context=64, prompt_tokens=32), dtype_bits=16)
    without, with_sums = (terms(facts(model), one) for one in (plain, replace(plain, sums_apart=True)))
    differ = {name for name in without if without[name] != with_sums[name]}
    assert differ == {"feed_forward", "experts"}
    # One product of 2 bytes gives way to sums of 4.
    inner = model.config.intermediate_size
    assert with_sums["feed_forward"] - without["feed_forward"] == 32 * inner * 2


def test_a_block_of_32_mb_goes_back_at_once_a_smaller_one_is_kept() -> None:
    config = {
        "model_type": "granitemoe",
        "architectures": ["GraniteMoeForCausalLM"],
        "hidden_size": 1024,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 49_155,
        "num_local_experts": 32,
        "num_experts_per_tok": 8,
    }
    found = facts_of(config)
    run = Run(context=1024, prompt_tokens=1024)
    kept, less = (
        heap_bytes(found, Pressure(run=one, dtype_bits=32)) for one in (run, replace(run, prompt_tokens=1023))
    )
    # 8 of 1,024 rows for each token: 32 MB.
    assert kept < less - 1.5 * terms(found, Pressure(run=run, dtype_bits=32))["attention"]


def test_what_an_encoder_had_is_gone_when_the_cache_of_its_decoder_comes() -> None:
    config = {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "d_model": 768,
        "d_kv": 64,
        "d_ff": 3072,
        "num_layers": 12,
        "num_decoder_layers": 12,
        "num_heads": 12,
        "vocab_size": 32_128,
        "is_encoder_decoder": True,
    }
    pressure, found = Pressure(run=Run(context=518, prompt_tokens=512), dtype_bits=16), facts_of(config)
    allocated, cache = terms(found, pressure), sum(cache_bytes(found, pressure))
    assert activation_bytes(allocated) < cache
    assert beside_cache(found, pressure, allocated, cache) == 512 * 768 * 2 + allocated["cache_growth"]
    long = activation_bytes(allocated) + 10**6
    assert beside_cache(found, pressure, {**allocated, "residual": long + cache}, cache) > long
    states = 512 * 768 * 2
    live = cache + states + allocated["cache_growth"] + logits_bytes(allocated)
    assert heap_bytes(found, pressure) == int(1.2 * live) + FIRST_PASS_BYTES_16


@pytest.mark.parametrize(("activation", "blocks"), [("gelu_new", 4), ("gelu_pytorch_tanh", 3)])
def test_an_activation_function_in_steps_takes_a_block_more(activation: str, blocks: int) -> None:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 128, "n_inner": 2048, "vocab_size": 64}
    model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, activation_function=activation)).eval()
    found, run = facts(model), Run(context=257, prompt_tokens=256)
    assert found.inner_blocks == blocks
    planned = activation_bytes(terms(found, Pressure(run=run, dtype_bits=32)))
    tokens = torch.randint(0, model.config.vocab_size, (1, 256))
    inputs = {"input_ids": tokens, "logits_to_keep": 1, "use_cache": False}
    with torch.inference_mode():
        model(**inputs)  # what is made once
        with torch.profiler.profile(profile_memory=True) as profile:
            model(**inputs)
    most = most_alive(profile)
    block = 256 * 2048 * 4
    assert planned - 1.5 * block < most <= planned + 4096  # masks and positions


def test_activation_functions_that_configs_do_not_name_are_those_of_their_type() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # Their configs always name it (apertus), or name two (clvp_decoder, pop2piano), or hold others (pix2struct).
    known = {"apertus", "clvp_decoder", "pix2struct", "pop2piano"}
    differ = set()
    for model_type, config in CONFIG_MAPPING.items():
        try:
            full = config().to_dict()
        except Exception:  # those that need arguments
            continue
        if facts_of(full).inner_blocks != facts_of({"model_type": model_type}).inner_blocks:
            differ.add(model_type)
    assert differ <= known


@pytest.mark.parametrize(("tokens", "fewest", "most"), [(64, 41, 49), (512, 121, 135), (2048, 171, 175)])
def test_as_many_numbers_of_rows_are_expected_as_a_router_was_seen_to_make(tokens: int, fewest: int, most: int) -> None:
    config = {"model_type": "granitemoe", "num_hidden_layers": 6, "num_local_experts": 32, "num_experts_per_tok": 8}
    config |= {"architectures": ["GraniteMoeForCausalLM"], "hidden_size": 64, "num_attention_heads": 4}
    found = facts_of(config)
    pressure = Pressure(run=Run(context=tokens + 1, prompt_tokens=tokens), dtype_bits=16)
    products = heap_bytes(found, pressure) - heap_bytes(replace(found, num_experts=0), pressure)
    assert fewest <= products / KERNEL_BYTES / 2 <= most


def test_scores_of_an_encoder_lie_where_its_layers_did_if_they_are_not_too_large() -> None:
    found = replace(facts(builders.tiny_model("bert", "encoder")), needs_head=True)
    pressure = Pressure(run=Run(context=64, prompt_tokens=64), dtype_bits=32)
    for vocab, beside in ((1, -1), (10**4, 0), (10**6, 1)):
        allocated = terms(replace(found, vocab=vocab), pressure)
        between, all_layers = beside_cache(found, pressure, allocated, 0), activation_bytes(allocated)
        expected = {-1: all_layers - allocated["logits"], 0: allocated["residual"], 1: all_layers}[beside]
        assert between == expected
