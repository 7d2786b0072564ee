"""`loadstone verify`: whether a checkpoint is what it should be."""

from __future__ import annotations

from typing import Annotated

import typer

from loadstone.cli import options
from loadstone.cli.loading import source_or_demo
from loadstone.cli.progress import shown

EPILOG = """[bold]Examples[/bold]

loadstone verify ./Qwen2.5-7B-Instruct

loadstone verify Qwen/Qwen2.5-7B-Instruct --local-files-only

loadstone verify ./stable-diffusion-3.5-medium --subfolder transformer

loadstone verify model.gguf --structure-only

loadstone verify ./Qwen2.5-7B-Instruct --json | jq .faults
"""


def verify_command(
    source: options.SourceOrDemo = None,
    structure_only: Annotated[
        bool, typer.Option("--structure-only", help="Read only headers; hash no content.")
    ] = False,
    revision: options.Revision = None,
    subfolder: options.Subfolder = None,
    variant: options.Variant = None,
    local_files_only: options.LocalOnly = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Check headers, sizes, overlaps and index, and the content of every file whose hash is known.

    A hash is known from a SHA256SUMS beside the weights, and from the names of blobs in the hub cache. Every fault of
    every file is told; the exit code is 0 if there is none, else 2. Nothing is written.
    """
    from loadstone.api.verify import verify
    from loadstone.report import verification

    with shown(options.err(), quiet=quiet or as_json) as observer:
        found = verify(
            source_or_demo(source, observer),
            structure_only=structure_only,
            revision=revision,
            subfolder=subfolder,
            variant=variant,
            local_files_only=local_files_only,
            progress=observer,
        )
    if as_json:
        options.print_json(found.to_json())
    else:
        verification.render(found, options.out())
    if not found.ok:
        raise typer.Exit(2)
