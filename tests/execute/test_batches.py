"""Each prompt of a batch gets the answer that it gets alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

import builders
from loadstone.execute.assist import Assist
from loadstone.execute.batch import generate_batches
from loadstone.execute.generate import generate
from loadstone.execute.values import Prompt, Sampling

PROMPTS = [Prompt(text=text) for text in ("abc", "a much longer prompt", "xyz", "b", "the last one", "abd")]
GREEDY = Sampling(temperature=0.0, max_new_tokens=12)


pytestmark = pytest.mark.usefixtures("quiet")


class Bytes:
    """A tokenizer of bytes that shows every token."""

    pad_token_id = None
    eos_token_id = 7
    chat_template = None

    def __call__(self, text: str, **_: object) -> Any:
        tokens = torch.tensor([list(text.encode())])
        return transformers.BatchEncoding({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})

    def decode(self, tokens: list[int], **_: object) -> str:
        return " ".join(map(str, tokens))


@pytest.mark.parametrize("size", [1, 2, 6, 50])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gpt2", "gemma3_text", "bloom", "mamba"])
def test_answers_are_those_of_each_prompt_alone(model_type: str, size: int) -> None:
    model: Any = builders.tiny_model(model_type, "causal", torch.float32).eval()
    alone = [generate(model, Bytes(), prompt, GREEDY, lambda _: None) for prompt in PROMPTS]
    batches = list(generate_batches(model, Bytes(), PROMPTS, GREEDY, size))
    made = [one for batch in batches for one in batch]
    assert [one.text for one in made] == [one.text for one in alone]
    assert [one.num_prompt_tokens for one in made] == [one.num_prompt_tokens for one in alone]
    assert [one.num_new_tokens for one in made] == [one.num_new_tokens for one in alone]
    assert max(map(len, batches)) <= size
    if model_type == "llama":
        assert len(batches) == -(-len(PROMPTS) // size)


def test_each_answer_ends_where_it_ends() -> None:
    model: Any = builders.tiny_model("llama", "causal", torch.float32).eval()
    alone = [generate(model, Bytes(), prompt, GREEDY, lambda _: None) for prompt in PROMPTS[:2]]
    end = int(alone[0].text.split()[3])
    model.generation_config.eos_token_id = [end, 151]
    alone = [generate(model, Bytes(), prompt, GREEDY, lambda _: None) for prompt in PROMPTS[:2]]
    made = next(generate_batches(model, Bytes(), PROMPTS[:2], GREEDY, 2))
    assert [one.text for one in made] == [one.text for one in alone]
    assert made[0].num_new_tokens <= 4


def test_a_batch_of_one_may_foretell() -> None:
    model: Any = builders.tiny_model("llama", "causal", torch.float32).eval()
    plain = [one for batch in generate_batches(model, Bytes(), PROMPTS, GREEDY, 1) for one in batch]
    made = [one for batch in generate_batches(model, Bytes(), PROMPTS, GREEDY, 1, Assist()) for one in batch]
    assert [one.text for one in made] == [one.text for one in plain]
    assert all(one.assisted is not None and one.assisted.note == "" for one in made)
    assert [one.assisted for one in plain] == [None] * len(PROMPTS)


def test_an_empty_prompt_is_named() -> None:
    model: Any = builders.tiny_model("llama", "causal", torch.float32).eval()
    with pytest.raises(ValueError, match="prompt 2 is empty; leave it out"):
        list(generate_batches(model, Bytes(), [PROMPTS[0], Prompt(text=" ")], GREEDY, 2))
    with pytest.raises(ValueError, match="Linear does not generate text"):
        list(generate_batches(torch.nn.Linear(1, 1), Bytes(), PROMPTS, GREEDY, 2))


def test_the_seed_fixes_what_is_sampled() -> None:
    model: Any = builders.tiny_model("llama", "causal", torch.float32).eval()
    sampling = Sampling(temperature=1.0, seed=5, max_new_tokens=8)
    first, second = (list(generate_batches(model, Bytes(), PROMPTS, sampling, 4)) for _ in range(2))
    assert [[one.text for one in batch] for batch in first] == [[one.text for one in batch] for batch in second]
