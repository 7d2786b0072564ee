"""Streamed equals resident bit by bit: whatever is streamed, by how many slots, for whom and with which cache.

Each architecture takes the next row of a table in which every share, number of slots and size of a batch meets every
other one.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "architecture"))

from test_gguf_families import CASES, build, gguf_tensors, metadata
from test_residency import equal, streamed, units_of

import builders
import loadstone
from gguf_builders import Gguf
from loadstone.errors import StreamedModel

NEW_TOKENS = 64
# (share that is resident, slots, batch): every pair of two of them, in twelve rows.
ROWS = [
    (share, 2 + (index + batch) % 3, 1 + batch) for batch in range(4) for index, share in enumerate((0.0, 0.3, 0.7))
]
DEPTH = {"num_hidden_layers": 4}
ZOO: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dense": ("causal", "llama", DEPTH),
    "dense with biases": ("causal", "qwen2", DEPTH),
    "sliding and full": ("causal", "gemma3_text", {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    "tied, learned positions": ("causal", "gpt2", {"n_layer": 4, "n_positions": 128}),
    "sliding window": ("causal", "mistral", DEPTH | {"sliding_window": 16}),
    "mixture of experts": ("causal", "mixtral", {"num_hidden_layers": 3}),
    "mixture with dense layers": ("causal", "qwen3_moe", {"num_hidden_layers": 3}),
    "state space": ("causal", "mamba", DEPTH),
    "encoder and decoder": ("seq2seq", "t5", {"num_layers": 3}),
    "encoder, its bias tied to the head's": ("encoder", "bert", DEPTH),
    "encoder and decoder, learned positions": ("seq2seq", "bart", {"max_position_embeddings": 128}),
}

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(folder: Path, name: str) -> Path:
    kind, model_type, changes = ZOO[name]
    config = builders.tiny_config(model_type)
    for field, value in changes.items():
        setattr(config, field, value)
    if "layer_types" in changes:
        config.num_hidden_layers = len(changes["layer_types"])
    elif config.to_dict().get("layer_types"):
        config.layer_types = (config.layer_types * 5)[: config.num_hidden_layers]
    torch.manual_seed(0)
    model = getattr(transformers, builders.KINDS[kind].auto_class).from_config(config)
    builders.stir(model)
    return builders.write_checkpoint(model.to(torch.bfloat16), folder)


def generated(model: Any, tokens: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """Greedy tokens of a fixed number, with the logits of each."""
    count = options.pop("count", NEW_TOKENS)
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        **{
            "max_new_tokens": count,
            "min_new_tokens": count,
            "do_sample": False,
            "pad_token_id": 0,
            "return_dict_in_generate": True,
            "output_logits": True,
            "disable_compile": True,
            **({"decoder_start_token_id": 0} if model.config.is_encoder_decoder else {}),
            **options,
        },
    )
    return [out.sequences, *out.logits]


def prompts(batch: int, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 120, (batch, length), generator=torch.Generator().manual_seed(batch))


@pytest.mark.usefixtures("small_grains")
@pytest.mark.parametrize(("slot_bytes", "read_bytes"), [(0, None), (8192, None), (8192, 2048)])
@pytest.mark.parametrize("number", range(len(ZOO)))
def test_streamed_equals_resident(tmp_path: Path, number: int, slot_bytes: int, read_bytes: int | None) -> None:
    name = list(ZOO)[number]
    # Nothing stays of what is cast.
    kind, dtype = ZOO[name][0], ("bfloat16", "float32")[number % 2 if not slot_bytes else 0]
    path = made(tmp_path, name)
    whole: Any = loadstone.load(path, dtype=dtype)
    share, num_slots, batch = ROWS[number]
    stays: dict[str, Any] = {"slot_bytes": slot_bytes, "read_bytes": read_bytes}
    model = streamed(path, units_of(whole, share), num_slots=num_slots, dtype=dtype, **stays)
    if kind == "encoder":
        for length in (12, 40, 3):
            inputs = {"input_ids": prompts(batch, length)}
            assert equal(builders.outputs(model, inputs), builders.outputs(whole, inputs))
    else:
        assert equal(generated(model, prompts(batch)), generated(whole, prompts(batch)))
    stats = loadstone.of(model).stats()
    assert stats is not None
    assert stats.streamed_bytes > 0
    assert bool(stats.front_bytes) is bool(slot_bytes and stats.num_units)
    assert bool(stats.compressed_bytes) is bool(read_bytes and stats.num_units)


def test_rows_pair_everything_with_everything() -> None:
    for one, other, count in ((0, 1, 9), (0, 2, 12), (1, 2, 12)):
        assert len({(row[one], row[other]) for row in ROWS}) == count


@pytest.mark.parametrize(("name", "row"), [("llama", 11), ("gemma2", 7)])
def test_a_gguf_equals_its_resident_self(tmp_path: Path, name: str, row: int) -> None:
    case = CASES[name]
    path = Gguf(metadata(case), gguf_tensors(build(case), case)).write(tmp_path / "m.gguf")
    whole: Any = loadstone.load(path)
    share, num_slots, batch = ROWS[row]
    model = streamed(path, units_of(whole, share), num_slots=num_slots)
    tokens = prompts(batch) % whole.config.vocab_size
    assert equal(generated(model, tokens, count=16), generated(whole, tokens, count=16))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    path = made(tmp_path_factory.mktemp("llama"), "dense")
    whole = loadstone.load(path)
    return whole, streamed(path, units_of(whole, 0.3))


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"cache_implementation": "offloaded"},
        {"cache_implementation": "offloaded_static"},
        {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}},
        {"cache_implementation": "quantized", "cache_config": {"backend": "hqq", "nbits": 4}},
        {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
        {"prefill_chunk_size": 4},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"num_beams": 3, "cache_implementation": "static"},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"prompt_lookup_num_tokens": 3, "count": 24, "batch": 1},
    ],
    ids=str,
)
def test_every_way_to_generate_gives_the_same(llama: tuple[Any, Any], options: dict[str, Any]) -> None:
    whole, model = llama
    options = {"count": 12} | options
    tokens = prompts(options.pop("batch", 2))
    try:
        expected = generated(whole, tokens, **options)
    except (ImportError, AssertionError) as error:
        # A package that is not there, or a build of torch without the CUDA streams that offloaded caches use.
        assert options["cache_implementation"] in ("quantized", "offloaded", "offloaded_static")
        pytest.skip(f"transformers cannot do it here: {error}")
    assert equal(generated(model, tokens, **options), expected)


def test_sampling_with_a_seed_gives_the_same(llama: tuple[Any, Any]) -> None:
    found = []
    for model in llama:
        torch.manual_seed(7)
        found.append(generated(model, prompts(3), count=12, do_sample=True, temperature=0.8, top_k=20))
    assert equal(*found)


def test_a_cache_that_goes_on_from_call_to_call_gives_the_same(llama: tuple[Any, Any]) -> None:
    found = []
    for model in llama:
        cache, tokens, logits = transformers.DynamicCache(config=model.config), prompts(2, 6), []
        with torch.inference_mode():
            for begin, end in ((0, 3), (3, 4), (4, 6)):
                out = model(tokens[:, begin:end], past_key_values=cache, use_cache=True, output_hidden_states=True)
                logits += [out.logits, *out.hidden_states]
        found.append(logits)
    assert equal(*found)


def test_what_cannot_be_done_says_so_and_changes_nothing(llama: tuple[Any, Any], tmp_path: Path) -> None:
    whole, model = llama
    expected = generated(whole, prompts(1), count=4)
    attempts: dict[str, Any] = {
        "deepcopy": lambda: copy.deepcopy(model),
        "state_dict": model.state_dict,
        "save": lambda: model.save_pretrained(tmp_path),
        "to another dtype": lambda: model.to(torch.float64),
        "float": model.float,
        "meta": lambda: model.to("meta"),
        "one of its blocks": model.model.layers[0].float,
        "a weight": lambda: model.model.layers[0].mlp.up_proj.weight + 1,
        "new weights": lambda: model.load_state_dict(whole.state_dict()),
        "another vocabulary": lambda: model.resize_token_embeddings(200),
    }
    for name, attempt in attempts.items():
        with pytest.raises((StreamedModel, RuntimeError), match=r"streamed|read from its file") as found:
            attempt()
        assert str(found.value), name
        assert equal(generated(model, prompts(1), count=4), expected), name
    assert model.to("cpu") is model
    assert model.eval().requires_grad_(False) is model
    assert equal(generated(model, prompts(1), count=4), expected)
