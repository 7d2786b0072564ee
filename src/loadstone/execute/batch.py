"""Answer many prompts, several in each pass: what a pass reads is read once for all of them."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from loadstone.execute.assist import Assist
from loadstone.execute.generate import check_generates, encode, options_of
from loadstone.execute.values import Generated, Prompt, Sampling


def generate_batches(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    size: int,
    assist: Assist | None = None,
) -> Iterator[list[Generated]]:
    """Answer prompts in their order, a batch at a time.

    Args:
        model: a model that generates, as `loadstone.load` returns it.
        tokenizer: its tokenizer.
        prompts: what is asked.
        sampling: how tokens are chosen. The seed is that of all of them together.
        size: the most prompts in a batch.
        assist: foretells tokens where a batch is a single prompt.

    Yields:
        The answers of one batch. `first_token_s` is the whole batch's, 0, for nobody watches them come.

    Raises:
        ValueError: a prompt is empty, or the model does not generate.
    """
    check_generates(model)
    for number, prompt in enumerate(prompts, 1):
        if not prompt.text.strip():
            raise ValueError(f"prompt {number} is empty; leave it out.")
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    options = options_of(model, tokenizer, sampling)
    encoded = [[int(token) for token in encode(tokenizer, prompt)["input_ids"][0]] for prompt in prompts]
    for rows in _batches(encoded, size, pads=_knows_padding(model)):
        begin = time.perf_counter()
        more = {"custom_generate": assist} if assist is not None and len(rows) == 1 else {}
        answers = _answered(model, rows, options | more)
        seconds = time.perf_counter() - begin
        yield [
            Generated(
                text=str(tokenizer.decode(answer, skip_special_tokens=True)),
                num_prompt_tokens=len(row),
                num_new_tokens=len(answer),
                first_token_s=0.0,
                tokens_per_s=len(answer) / seconds,
                assisted=more["custom_generate"].facts if more else None,
            )
            for row, answer in zip(rows, answers, strict=True)
        ]


def _batches(rows: Sequence[list[int]], size: int, *, pads: bool) -> Iterator[list[list[int]]]:
    """Neighbours together; only those of one length where shorter ones cannot be padded."""
    batch: list[list[int]] = []
    for row in rows:
        if batch and (len(batch) == size or not (pads or len(row) == len(batch[0]))):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _knows_padding(model: Any) -> bool:
    """Whether the numbers of a prompt do not depend on what pads it: positions are told, and no state is kept."""
    told = "position_ids" in inspect.signature(model.forward).parameters
    return told and not getattr(model, "_is_stateful", False) and not model.config.is_encoder_decoder


def _answered(model: Any, rows: Sequence[list[int]], options: dict[str, Any]) -> list[list[int]]:
    """The tokens of each answer, its end included."""
    width = max(map(len, rows))
    padding = options.get("pad_token_id", model.generation_config.pad_token_id)
    ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    with torch.inference_mode():
        made = model.generate(input_ids=ids, attention_mask=mask, **options)
    begin = 0 if model.config.is_encoder_decoder else width
    ends = _ends(model.generation_config.eos_token_id)
    return [_until_end(row[begin:].tolist(), ends) for row in made]


def _ends(eos: Any) -> frozenset[int]:
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def _until_end(tokens: list[int], ends: frozenset[int]) -> list[int]:
    """A row up to its own end; what follows pads it to the length of the longest."""
    last = next((index for index, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: last + 1]
