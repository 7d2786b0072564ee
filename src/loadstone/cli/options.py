"""The arguments and options that several commands share, and the consoles they write to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from loadstone.errors import LoadstoneError
    from loadstone.plan.values import Plan

SourceOrDemo = Annotated[
    str | None,
    typer.Argument(help="A folder, a weight file or a hub id; without one the demo model, SmolLM2-135M-Instruct."),
]
Architecture = Annotated[
    str | None, typer.Option(help="A transformers class, such as LlamaModel or AutoModelForCausalLM.")
]
Dtype = Annotated[
    str | None, typer.Option(help='bfloat16, float16, float32, or "auto" for as stored; chosen for you by default.')
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda:0, mps; chosen for you by default.")]
Attention = Annotated[str | None, typer.Option("--attn-implementation", help="sdpa, eager, flash_attention_2, ...")]
Revision = Annotated[str | None, typer.Option(help="The branch, tag or commit of a hub id.")]
Subfolder = Annotated[
    str | None, typer.Option(help="A folder inside the source, such as a component of a diffusers pipeline.")
]
Variant = Annotated[str | None, typer.Option(help="The fp16 of files named model.fp16.safetensors.")]
Prefix = Annotated[
    str | None, typer.Option(help="Only the tensors whose names begin with it, without it: one model of several.")
]
SelectOption = Annotated[
    list[str] | None,
    typer.Option("--select", help="Only tensors whose names match this shell pattern; may be given several times."),
]
LocalOnly = Annotated[bool, typer.Option("--local-files-only", help="Never ask the network.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run model code that the checkpoint brings. Read it first.")
]
NotStrict = Annotated[
    bool, typer.Option("--no-strict", help="Missing and left-over tensors are notes instead of errors.")
]
MaxMemory = Annotated[
    str | None,
    typer.Option(help="The most that may be used, by device: cuda:0=8GiB,cpu=12GiB; a size alone is the host's."),
]
Context = Annotated[int | None, typer.Option(help="Tokens of prompt and answer together, to plan memory for.")]
Batch = Annotated[int | None, typer.Option(help="Sequences at a time, to plan memory for.")]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="Prompts of --batch at a time; chosen by what memory allows by default."),
]
BatchFile = Annotated[
    Path | None,
    typer.Option(
        "--batch", help='Answer every prompt of a file: a line each, or JSON lines with "prompt" and "system".'
    ),
]
AssistOption = Annotated[
    bool | None,
    typer.Option(
        "--assist/--no-assist",
        help="Foretell tokens that repeat what was said, so that a pass yields several; the text stays the same. By "
        "default where passes wait for weights.",
    ),
]
DraftOption = Annotated[
    str | None, typer.Option("--draft", help="A smaller model with the same vocabulary that foretells tokens instead.")
]
DeviceMap = Annotated[
    str | None, typer.Option(help="auto, a device for everything, or a JSON file of devices by module name.")
]
NoOffload = Annotated[bool, typer.Option("--no-offload", help="Fail rather than read parts in each pass.")]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="Follow a plan that `loadstone plan --save` wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print plain data on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def out() -> Console:
    """The console for results."""
    from rich.console import Console

    return Console()


def err() -> Console:
    """The console for progress and timings."""
    from rich.console import Console

    return Console(stderr=True)


def print_json(value: Any) -> None:
    """Plain data on standard output."""
    typer.echo(json.dumps(value, indent=2, default=str))


# Plans of models with tens of thousands of units are large.
_MAX_JSON_BYTES = 256_000_000


def read_json(path: Path, fault: Callable[[str], LoadstoneError], advice: str) -> dict[str, Any]:
    """A JSON object of a file that an option names; `advice` is what a message says to do."""
    from loadstone.checkpoint.files import read_json_object

    return read_json_object(path, max_bytes=_MAX_JSON_BYTES, fault=fault, advice=advice)


def read_plan(path: Path | None) -> Plan | None:
    """The plan of a file."""
    if path is None:
        return None
    from loadstone.errors import InvalidPlan
    from loadstone.plan.plan_file import from_json

    return from_json(read_json(path, InvalidPlan, "write one with `loadstone plan --save`"), str(path))


def read_device_map(text: str | None) -> Any:
    """A word or a device as it is, a file's content where there is such a file."""
    if text is None or not (text.endswith(".json") or Path(text).is_file()):
        return text
    from loadstone.errors import InvalidPlan

    return read_json(Path(text), InvalidPlan, "write it as an object of devices by the start of module names")
