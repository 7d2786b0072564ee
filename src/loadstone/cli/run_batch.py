"""`loadstone run --batch`: many prompts from a file, several in each pass."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loadstone.api.batching import choose_batch_size
from loadstone.checkpoint.demo import demo_model
from loadstone.cli import options
from loadstone.execute.values import Generated, Prompt, Sampling
from loadstone.units import format_seconds

if TYPE_CHECKING:
    from loadstone.cli.loading import LoadOptions
    from loadstone.execute.assist import Assist
    from loadstone.plan.values import Plan

# For parts of a source, whose plan is made only when they are loaded.
_USUAL_SIZE = 8


def batch_size(source: str | None, wanted: LoadOptions, num_prompts: int, sampling: Sampling) -> int:
    """How many prompts to answer at a time.

    Args:
        source: as on the command line.
        wanted: the options, with the context that the longest prompt needs.
        num_prompts: how many there are.
        sampling: says how long answers can be.

    Raises:
        ValueError: more at a time than the plan was made for.
    """
    if wanted.plan is not None:
        planned = options.read_plan(wanted.plan)
        most = 1 if planned is None else planned.run.batch
        if wanted.batch is not None and wanted.batch > most:
            raise ValueError(
                f"--batch-size {wanted.batch}: expected at most {most} at a time, for which {wanted.plan} was made; "
                "make it anew with --batch."
            )
        return min(wanted.batch or most, num_prompts)
    if wanted.batch is not None:
        return min(wanted.batch, num_prompts)
    if wanted.subfolder or wanted.variant or wanted.prefix or wanted.select:
        return min(_USUAL_SIZE, num_prompts)
    return choose_batch_size(num_prompts, sampling.max_new_tokens, lambda size: _plan(source, wanted, size))


def _plan(source: str | None, wanted: LoadOptions, size: int) -> Plan:
    from loadstone.api.plan import plan

    return plan(
        source or str(demo_model()),
        max_memory=wanted.max_memory,
        dtype=wanted.dtype,
        context=wanted.context or 1,
        batch=size,
        device=wanted.device,
        device_map=options.read_device_map(wanted.device_map),
        offload=not wanted.no_offload,
        local_files_only=wanted.local_files_only,
        revision=wanted.revision,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """What answers prompts.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        sampling: how tokens are chosen.
        assist: foretells tokens; None where nothing is to be foretold.
    """

    model: Any
    tokenizer: Any
    sampling: Sampling
    assist: Assist | None = None


def answer_all(answering: Answering, prompts: Sequence[Prompt], size: int, *, as_json: bool, quiet: bool) -> None:
    """Answer every prompt, with a line of progress on standard error for each batch.

    Args:
        answering: the model.
        prompts: what is asked.
        size: prompts at a time.
        as_json: a line of JSON for each answer instead of a block of text.
        quiet: no progress.
    """
    from loadstone.execute.batch import generate_batches

    told = options.err()
    batches = generate_batches(
        answering.model, answering.tokenizer, prompts, answering.sampling, size, answering.assist
    )
    number, num_tokens, begin = 0, 0, time.perf_counter()
    for batch in batches:
        for one in batch:
            number += 1
            sys.stdout.write(_line(number, prompts[number - 1], one) if as_json else _block(number, one))
            num_tokens += one.num_new_tokens
        sys.stdout.flush()
        seconds = time.perf_counter() - begin
        if not quiet:
            told.print(
                f"{number} of {len(prompts)} prompts answered, {len(batch)} at a time, {num_tokens} tokens in "
                f"{format_seconds(seconds)} ({num_tokens / seconds:.1f} tokens/s)",
                style="dim",
                highlight=False,
            )


def _block(number: int, one: Generated) -> str:
    return f"[{number}]\n{one.text.strip()}\n\n"


def _line(number: int, prompt: Prompt, one: Generated) -> str:
    found = {
        "number": number,
        "prompt": prompt.text,
        "text": one.text,
        "num_prompt_tokens": one.num_prompt_tokens,
        "num_new_tokens": one.num_new_tokens,
    }
    return json.dumps(found, ensure_ascii=False) + "\n"
