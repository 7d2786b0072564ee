"""The arguments and options that several commands share, and the consoles they write to."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

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
