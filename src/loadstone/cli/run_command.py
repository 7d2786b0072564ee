"""`loadstone run`: load a model and answer a prompt."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from loadstone.cli import options
from loadstone.cli.live import Screen
from loadstone.cli.loading import LoadOptions, load_model, with_options
from loadstone.execute.values import Generated, Prompt, Sampling
from loadstone.units import format_bytes, format_seconds

EPILOG = """[bold]Examples[/bold]

loadstone run "Why is the sky blue?"

loadstone run ./Qwen2.5-7B-Instruct "Write a haiku about disks" --temperature 0

loadstone run ./Qwen2.5-7B-Instruct "Hello" --max-memory 6GB --trace trace.json

git diff | loadstone run ./Qwen2.5-7B-Instruct --system "Write a commit message for this change"
"""

_DEMO_NAMES = (None, "demo")
_TEMPLATE_TOKENS = 64


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
    trace: Annotated[
        Path | None, typer.Option(help="Write a trace of reads and compute here; ui.perfetto.dev shows it.")
    ] = None,
    *,
    wanted: LoadOptions,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Load a model and answer a prompt, token by token.

    With one argument only, the demo model answers it: loadstone run "Why is the sky blue?"
    """
    from loadstone.api.registry import of
    from loadstone.api.tokenizer import load_tokenizer
    from loadstone.hardware.memory import PeakWatch
    from loadstone.report.trace import check_writable

    source, text = _source_and_prompt(source, prompt)
    asked = Prompt(text=text, system=system, raw=raw)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if trace is not None:
        check_writable(trace)
    screen = Screen(options.err(), quiet=quiet or as_json)
    with PeakWatch() as watch:
        with screen.loading():
            model, path = load_model(source, *_planned_for(wanted, asked, max_new_tokens), observer=screen.observer)
            tokenizer = load_tokenizer(
                path,
                local_files_only=True,
                revision=wanted.revision,
                subfolder=wanted.subfolder,
                trust_remote_code=wanted.trust_remote_code,
            )
        from loadstone.execute.generate import generate

        loaded = of(model)
        with (
            nullcontext() if trace is None else loaded.trace(trace),
            screen.answering(loaded.plan, _nothing if as_json else _say) as on_text,
        ):
            made = generate(model, tokenizer, asked, sampling, on_text)
    _close(model, made, watch.peak.anonymous_bytes + watch.peak.file_bytes, as_json)


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
                "streaming": None if stats is None else to_json(stats),
            }
        )
        return
    sys.stdout.write("\n")
    options.err().print(
        f"\nloaded in {format_seconds(report.seconds)} ({report.dtype.value} on {report.device.value}), "
        f"first token after {format_seconds(made.first_token_s)}, {made.tokens_per_s:.1f} tokens/s over "
        f"{made.num_new_tokens} tokens, peak memory {format_bytes(peak_bytes)}"
        + (f"\n{loaded.summary()}" if stats is not None else ""),
        style="dim",
        highlight=False,
    )
