"""Tokens that are foretold change how many passes there are, and nothing else."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import builders
import loadstone
from loadstone.api.begun import Request
from loadstone.api.load import carry_out
from loadstone.execute.assist import Assist
from loadstone.execute.values import Streaming

EXACT = ["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gpt2", "gpt_neox", "opt", "phi", "olmo2", "starcoder2"]
NUM_TOKENS = 32
SCRIPT = [20, 21, 22, 23, 24, 25, 26, 27]
NO_REPEATS = list(range(30, 30 + NUM_TOKENS))


pytestmark = pytest.mark.usefixtures("quiet")


class Script(transformers.LogitsProcessor):
    """Has the model say what is written, and keeps the logits that it had for it."""

    def __init__(self, tokens: list[int], num_prompt_tokens: int) -> None:
        self.tokens = tokens
        self.num_prompt_tokens = num_prompt_tokens
        self.logits: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.logits.append(scores.clone())
        number = input_ids.shape[1] - self.num_prompt_tokens
        scores[:, self.tokens[number % len(self.tokens)]] += 1e4
        return scores


def answer(model: Any, prompt: torch.Tensor, script: list[int] | None, **more: Any) -> tuple[torch.Tensor, list[Any]]:
    """What a model says, and the logits of every token."""
    recorder = Script(script or [], prompt.shape[1])
    if script is None:
        recorder = Recorder()
    options: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS, "do_sample": False}
    with torch.inference_mode():
        made = model.generate(prompt, logits_processor=[recorder], pad_token_id=0, **(options | more))
    return made, recorder.logits


class Recorder(Script):
    """Keeps the logits."""

    def __init__(self) -> None:
        super().__init__([], 0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.logits.append(scores.clone())
        return scores


def streamed(folder: Path, model_type: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model whose blocks and head come anew in each pass."""
    made = builders.tiny_model(model_type, "causal", dtype)
    builders.write_checkpoint(made, folder, "safetensors")
    units = [
        name
        for name, module in made.named_modules()
        if name.rpartition(".")[2].isdigit() and not isinstance(module, nn.ModuleList) and name.count(".") == 2
    ]
    assert units
    return carry_out(
        Request(source=folder, architecture=type(made).__name__, streaming=Streaming(units=tuple(units), num_slots=2))
    )


def passes(model: Any) -> int:
    found = loadstone.of(model).stats()
    assert found is not None
    return found.passes


PROMPT = torch.tensor([[5, *SCRIPT, 6, 7]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", EXACT)
def test_every_bit_is_that_of_plain_decoding(model_type: str, dtype: torch.dtype) -> None:
    model: Any = builders.tiny_model(model_type, "causal", dtype).eval()
    for script in (SCRIPT, [*SCRIPT[:5], 40, 41], None):
        expected, logits = answer(model, PROMPT, script)
        assist = Assist()
        found, ours = answer(model, PROMPT, script, custom_generate=assist)
        assert torch.equal(found, expected)
        assert len(ours) == len(logits) == assist.facts.num_tokens == NUM_TOKENS
        assert all(map(torch.equal, ours, logits))
        assert assist.facts.note == ""
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_a_text_that_repeats_takes_few_passes(tmp_path: Path, model_type: str) -> None:
    model = streamed(tmp_path, model_type)
    expected, logits = answer(model, PROMPT, SCRIPT)
    plain = passes(model)
    found, ours = answer(model, PROMPT, SCRIPT, custom_generate=(assist := loadstone.of(model).assist()))
    assert torch.equal(found, expected)
    assert all(map(torch.equal, ours, logits))
    assert plain == NUM_TOKENS
    assert passes(model) - plain == assist.facts.num_passes <= NUM_TOKENS / 3
    stats = loadstone.of(model).stats()
    assert stats is not None
    # What a pass reads does not grow with its tokens.
    assert stats.streamed_bytes <= stats.passes * stats.pass_bytes + stats.slot_bytes


def test_a_text_without_repeats_takes_no_more_passes_and_hardly_more_work(tmp_path: Path) -> None:
    model = streamed(tmp_path)
    tokens_seen: list[int] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: tokens_seen.append(args[0].numel()))
    answer(model, PROMPT, NO_REPEATS, custom_generate=(assist := Assist()))
    assert passes(model) == assist.facts.num_passes == NUM_TOKENS
    assert sum(tokens_seen) == PROMPT.shape[1] + NUM_TOKENS - 1
    # Repeats that mislead: after each of them follows something new.
    misleading = [token for number in range(16) for token in (20, 21, 100 + number)]
    tokens_seen.clear()
    answer(model, PROMPT, misleading, custom_generate=assist)
    assert assist.facts.num_passes == NUM_TOKENS
    assert 0 < sum(tokens_seen) - PROMPT.shape[1] - NUM_TOKENS + 1 == assist.facts.num_proposed <= NUM_TOKENS / 2


@pytest.mark.parametrize("draft_type", ["llama", "qwen2", "mamba"])
def test_a_draft_model_foretells(draft_type: str) -> None:
    model: Any = builders.tiny_model("llama", "causal", torch.float32).eval()
    draft = builders.tiny_model(draft_type, "causal", torch.float32).eval()
    expected, logits = answer(model, PROMPT, None)
    assist = Assist(draft)
    found, ours = answer(model, PROMPT, None, custom_generate=assist)
    assert torch.equal(found, expected)
    assert all(map(torch.equal, ours, logits))
    assert assist.facts.num_proposed > 0
    if draft_type == "llama":  # the same weights: everything comes true
        assert assist.facts.num_accepted == assist.facts.num_proposed
        assert assist.facts.num_passes <= NUM_TOKENS / 3


def test_a_draft_model_with_a_smaller_vocabulary_is_asked_only_what_it_knows() -> None:
    model: Any = builders.tiny_model("llama", "causal", torch.float32).eval()
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    draft = transformers.LlamaForCausalLM(config).eval()
    expected, _ = answer(model, PROMPT, [*SCRIPT, 50])
    found, _ = answer(model, PROMPT, [*SCRIPT, 50], custom_generate=Assist(draft))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("model_type", "options", "note"),
    [
        ("llama", {"do_sample": True}, "tokens are sampled"),
        ("llama", {"num_beams": 2}, "beams are searched"),
        ("llama", {"use_cache": False}, "the cache is off"),
        ("llama", {"cache_implementation": "static"}, "the cache does not keep every token"),
        ("mamba", {}, "does not keep every token|not sdpa"),
        ("gemma3_text", {}, "does not keep every token"),
        ("bloom", {}, "not sdpa"),
    ],
)
def test_what_cannot_be_foretold_exactly_is_decoded_plainly(
    model_type: str, options: dict[str, Any], note: str
) -> None:
    model: Any = builders.tiny_model(model_type, "causal", torch.float32).eval()
    script = None if options.get("num_beams") else SCRIPT
    torch.manual_seed(3)
    expected, logits = answer(model, PROMPT, script, **options)
    torch.manual_seed(3)
    assist = Assist()
    found, ours = answer(model, PROMPT, script, custom_generate=assist, **options)
    assert torch.equal(found, expected)
    assert all(map(torch.equal, ours, logits))
    assert re.search(note, assist.facts.note)
    assert assist.facts.num_accepted == 0


def test_an_encoder_and_eager_attention_and_batches_are_decoded_plainly() -> None:
    t5: Any = builders.tiny_model("t5", "seq2seq", torch.float32).eval()
    assist = Assist()
    t5.generate(PROMPT, max_new_tokens=4, custom_generate=assist, decoder_start_token_id=0, pad_token_id=0)
    assert "an encoder and a decoder" in assist.facts.note
    model: Any = builders.tiny_model("llama", "causal", torch.float32).eval()
    two = torch.cat([PROMPT, PROMPT])
    answer(model, two, SCRIPT, custom_generate=assist)
    assert "several sequences" in assist.facts.note
    padded = {"attention_mask": torch.tensor([[0] + [1] * (PROMPT.shape[1] - 1)])}
    expected, _ = answer(model, PROMPT, SCRIPT, **padded)
    found, _ = answer(model, PROMPT, SCRIPT, custom_generate=assist, **padded)
    assert torch.equal(found, expected)
    assert "padded" in assist.facts.note
    model.set_attn_implementation("eager")
    answer(model, PROMPT, SCRIPT, custom_generate=assist)
    assert "not sdpa" in assist.facts.note


def test_the_end_of_a_text_inside_of_what_was_foretold_ends_it() -> None:
    model: Any = builders.tiny_model("llama", "causal", torch.float32).eval()
    ends = {"min_new_tokens": 0, "eos_token_id": SCRIPT[5]}
    expected, _ = answer(model, PROMPT, SCRIPT, **ends)
    assist = Assist()
    found, _ = answer(model, PROMPT, SCRIPT, custom_generate=assist, **ends)
    assert torch.equal(found, expected)
    assert assist.facts.num_tokens == 6
    assert 0 < assist.facts.num_accepted < 6


def test_other_threads_compute_as_ever_meanwhile() -> None:
    model: Any = builders.tiny_model("llama", "causal", torch.float32).eval()
    expected, _ = answer(model, PROMPT, SCRIPT)
    two = PROMPT.repeat(1, 3)
    with torch.inference_mode():
        logits = model(two).logits
    found: list[bool] = []

    def assisted() -> None:
        found.extend(torch.equal(answer(model, PROMPT, SCRIPT, custom_generate=Assist())[0], expected) for _ in "abc")

    threads = [threading.Thread(target=assisted) for _ in range(2)]
    for thread in threads:
        thread.start()
    with torch.inference_mode():
        while any(thread.is_alive() for thread in threads):
            found.append(torch.equal(model(two).logits, logits))
    for thread in threads:
        thread.join()
    assert all(found)
    assert len(found) > 6
