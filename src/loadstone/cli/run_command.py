"""`loadstone run`: load a model and answer a prompt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loadstone.cli import options
from loadstone.cli.live import Screen
from loadstone.cli.loading import LoadOptions, load_model, with_options
from loadstone.cli.prompts import read_prompts
from loadstone.cli.run_batch import Answering, answer_all, batch_size
from loadstone.execute.values import Assisted, Generated, Prompt, Sampling
from loadstone.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from loadstone.events import Observer

EPILOG = """[bold]Examples[/bold]

loadstone run "Why is the sky blue?"

loadstone run ./Qwen2.5-7B-Instruct "Write a haiku about disks" --temperature 0

loadstone run ./Qwen2.5-7B-Instruct "Hello" --max-memory 6GB --trace trace.json

git diff | loadstone run ./Qwen2.5-7B-Instruct --system "Write a commit message for this change"

loadstone run ./Qwen2.5-7B-Instruct --max-memory 5GB --draft ./Qwen2.5-0.5B-Instruct "Why is the sky blue?"

loadstone run ./Qwen2.5-7B-Instruct --batch prompts.txt --temperature 0 --json > answers.jsonl
"""

_DEMO_NAMES = (None, "demo")
_TEMPLATE_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(LoadOptions):
    """The options of a load, in which the sequences at a time are those of `--batch`."""

    batch: options.BatchSize = None


@with_options
def run_command(
    source: options.SourceOrDemo = None,
    prompt: Annotated[
        str | None, typer.Argument(help="What to ask; without it, or with -, standard input is read.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to generate.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 takes the likeliest token; by default as the model says.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed gives the same text.")] = None,
    batch_file: options.BatchFile = None,
    assist: options.AssistOption = None,
    draft: options.DraftOption = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write a trace of reads and compute here; ui.perfetto.dev shows it.")
    ] = None,
    *,
    wanted: RunOptions,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Load a model and answer a prompt, token by token.

    With one argument only, the demo model answers it: loadstone run "Why is the sky blue?"
    """
    from loadstone.api.registry import of
    from loadstone.hardware.memory import PeakWatch
    from loadstone.hardware.openmp import fit_threads_to_cores
    from loadstone.report.trace import check_writable

    fit_threads_to_cores()
    if draft is not None and (assist is False or wanted.plan is not None):
        other = "--plan" if assist is not False else "--no-assist"
        raise ValueError(f"--draft {draft} cannot go with {other}; leave one of them out.")
    if wanted.batch is not None and batch_file is None:
        raise ValueError(f"--batch-size {wanted.batch}: expected a file of prompts beside it, found none; add --batch.")
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if batch_file is not None:
        _refuse_prompt(source, prompt)
        source = None if source in _DEMO_NAMES else source
        prompts = read_prompts(batch_file, system=system, raw=raw)
    else:
        source, text = _source_and_prompt(source, prompt)
        prompts = [Prompt(text=text, system=system, raw=raw)]
    if trace is not None:
        check_writable(trace)
    screen = Screen(options.err(), quiet=quiet or as_json)
    with PeakWatch() as watch:
        with screen.loading():
            answering, size = _loaded(source, wanted, prompts, sampling, _Foretelling(assist, draft), screen.observer)
        loaded = of(answering.model)
        tracing = nullcontext() if trace is None else loaded.trace(trace)
        if batch_file is not None:
            with tracing:
                answer_all(answering, prompts, size, as_json=as_json, quiet=quiet)
            return
        from loadstone.execute.generate import generate

        with tracing, screen.answering(loaded.plan, _nothing if as_json else _say) as on_text:
            made = generate(
                answering.model, answering.tokenizer, prompts[0], sampling, on_text, assist=answering.assist
            )
    _close(answering.model, made, watch.peak.anonymous_bytes + watch.peak.file_bytes, as_json)


@dataclass(frozen=True, slots=True)
class _Foretelling:
    """What was said of foretelling tokens: whether, and by which model."""

    assist: bool | None
    draft: str | None


def _loaded(
    source: str | None,
    wanted: LoadOptions,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    foretelling: _Foretelling,
    observer: Observer,
) -> tuple[Answering, int]:
    """Load the draft model, where there is one, the model and its tokenizer; and the number of prompts at a time."""
    from loadstone.api.draft import check_vocabulary, load_draft
    from loadstone.api.registry import of
    from loadstone.api.tokenizer import load_tokenizer

    longest = max(prompts, key=lambda one: len(one.text.encode()) + len((one.system or "").encode()))
    wanted, prompt_tokens = _planned_for(wanted, longest, sampling.max_new_tokens)
    draft = None
    if foretelling.draft is not None:
        context = wanted.context or 1
        draft = load_draft(foretelling.draft, max_memory=wanted.max_memory, context=context, observer=observer)
        wanted = replace(wanted, max_memory=draft.max_memory)
    size = 1 if len(prompts) == 1 else batch_size(source, wanted, len(prompts), sampling)
    if wanted.plan is None:
        wanted = replace(wanted, batch=size)
    model, path = load_model(source, wanted, prompt_tokens, observer=observer)
    tokenizer = load_tokenizer(
        path,
        local_files_only=True,
        revision=wanted.revision,
        subfolder=wanted.subfolder,
        trust_remote_code=wanted.trust_remote_code,
    )
    if draft is not None:
        check_vocabulary(draft, path, tokenizer)
    assists = of(model).is_stream_bound() if foretelling.assist is None and draft is None else foretelling.assist
    assist = of(model).assist(None if draft is None else draft.model) if assists is not False else None
    return Answering(model=model, tokenizer=tokenizer, sampling=sampling, assist=assist), size


def _refuse_prompt(source: str | None, prompt: str | None) -> None:
    given = prompt if prompt is not None else source if source is not None and _is_prompt(source) else None
    if given is not None:
        raise ValueError(f"the prompt {given[:40]!r} cannot go with --batch, whose file has the prompts; leave it out.")


def _planned_for(wanted: LoadOptions, asked: Prompt, max_new_tokens: int) -> tuple[LoadOptions, int | None]:
    """The options with the context that this run needs, and the most tokens that its prompt can have."""
    if wanted.plan is not None:
        return wanted, None
    # No token is shorter than a byte; what a chat template adds is short.
    prompt_tokens = len(asked.text.encode()) + len((asked.system or "").encode()) + _TEMPLATE_TOKENS
    if wanted.context is not None:
        return wanted, min(prompt_tokens, wanted.context)
    return replace(wanted, context=prompt_tokens + max_new_tokens), prompt_tokens


def _source_and_prompt(source: str | None, prompt: str | None) -> tuple[str | None, str]:
    """One argument that is no source is a prompt for the demo model."""
    text = "" if prompt is None or prompt == "-" else prompt
    if prompt is None and source is not None and _is_prompt(source):
        text, source = source, None
    elif prompt is None or prompt == "-":
        if sys.stdin.isatty():
            options.err().print(f"Type the prompt for {source or 'the demo model'}, then end it with Ctrl-D.")
        text = sys.stdin.read()
        if not text.strip() and source is not None and _is_word(source):
            text, source = source, None
    if not text.strip():
        raise ValueError("the prompt is empty; give one as an argument or on standard input.")
    return (None if source in _DEMO_NAMES else source), text


def _is_prompt(argument: str) -> bool:
    """Sources have no blanks and no question marks; what exists as a path is a source whatever it looks like."""
    return any(mark in argument for mark in (" ", "?", "\n")) and not Path(argument).exists()


def _is_word(argument: str) -> bool:
    """A single word with nothing on standard input: a short prompt rather than a hub id, which has a slash."""
    return "/" not in argument and argument not in _DEMO_NAMES and not Path(argument).exists()


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _nothing(text: str) -> None:
    """The text is printed whole, as JSON."""


def _close(model: Any, made: Generated, peak_bytes: int, as_json: bool) -> None:
    from loadstone.api.registry import of
    from loadstone.report.streaming import to_json

    loaded = of(model)
    report, stats = loaded.report, loaded.stats()
    if as_json:
        options.print_json(
            {
                "text": made.text,
                "num_prompt_tokens": made.num_prompt_tokens,
                "num_new_tokens": made.num_new_tokens,
                "load_s": report.seconds,
                "first_token_s": made.first_token_s,
                "tokens_per_s": made.tokens_per_s,
                "peak_bytes": peak_bytes,
                "dtype": report.dtype.value,
                "device": report.device.value,
                "assisted": None if made.assisted is None else asdict(made.assisted),
                "streaming": None if stats is None else to_json(stats),
            }
        )
        return
    sys.stdout.write("\n")
    options.err().print(
        f"\nloaded in {format_seconds(report.seconds)} ({report.dtype.value} on {report.device.value}), "
        f"first token after {format_seconds(made.first_token_s)}, {made.tokens_per_s:.1f} tokens/s over "
        f"{made.num_new_tokens} tokens{_assisted_line(made.assisted)}, peak memory {format_bytes(peak_bytes)}"
        + (f"\n{loaded.summary()}" if stats is not None else ""),
        style="dim",
        highlight=False,
    )


def _assisted_line(assisted: Assisted | None) -> str:
    if assisted is None:
        return ""
    if assisted.note and not assisted.num_proposed:
        return f" (nothing foretold: {assisted.note})"
    came_true = f"{assisted.num_accepted} of {assisted.num_proposed} foretold tokens came true"
    return f" in {assisted.num_passes} passes ({came_true})"
