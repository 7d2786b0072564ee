"""`loadstone inspect`: what a checkpoint holds, and what loading it does."""

from __future__ import annotations

from typing import Annotated

import typer

from loadstone.cli import options
from loadstone.cli.loading import LoadOptions, SourceOptions, load_model, source_or_demo, with_options
from loadstone.cli.progress import shown

EPILOG = """[bold]Examples[/bold]

loadstone inspect ./Qwen2.5-7B-Instruct

loadstone inspect model.gguf --json | jq .totals

loadstone inspect ./stable-diffusion-3.5-medium --subfolder transformer

loadstone inspect sd-v1-5.safetensors --prefix cond_stage_model. --select "*.weight"

loadstone inspect --walk ./Qwen2.5-7B-Instruct
"""


@with_options
def inspect_command(
    source: options.SourceOrDemo = None,
    walk: Annotated[
        bool, typer.Option("--walk", help="Load it, and tell step by step what that does, with names and timings.")
    ] = False,
    *,
    wanted: SourceOptions,
    as_json: options.Json = False,
) -> None:
    """Show the files, tensors and config of a checkpoint. Only headers are read; torch is not imported."""
    if walk:
        _walk(source, wanted, as_json)
        return
    from loadstone.api.inspect import inspect
    from loadstone.report import inspection

    with shown(options.err(), quiet=False) as observer:
        found = inspect(
            source_or_demo(source, observer),
            revision=wanted.revision,
            subfolder=wanted.subfolder,
            variant=wanted.variant,
            prefix=wanted.prefix,
            select=wanted.select or None,
            local_files_only=wanted.local_files_only,
            progress=observer,
        )
    if as_json:
        options.print_json(inspection.to_json(found))
    else:
        inspection.render(found, options.out())


def _walk(source: str | None, wanted: SourceOptions, as_json: bool) -> None:
    from loadstone.api.registry import of
    from loadstone.report import walk

    with shown(options.err(), quiet=False) as observer:
        model, _ = load_model(source, LoadOptions.of(wanted), observer=observer)
    report = of(model).report
    if as_json:
        options.print_json(walk.to_json(report))
    else:
        walk.render(report, options.out())
