"""`loadstone convert`: write any checkpoint anew as safetensors in Hugging Face layout."""

from __future__ import annotations

from typing import Annotated

import typer

from loadstone.cli import options
from loadstone.cli.loading import SourceOptions, with_options
from loadstone.cli.progress import shown
from loadstone.units import parse_bytes

EPILOG = """[bold]Examples[/bold]

loadstone convert model.gguf ./model --dtype bfloat16

loadstone convert ./model-with-bin-files ./model-with-safetensors

loadstone convert ./Llama-2-7b ./Llama-2-7b-hf

loadstone convert sd-v1-5.safetensors ./text-encoder --prefix cond_stage_model.transformer.

loadstone convert ./model ./model-in-small-files --max-shard-size 500MB --json
"""


@with_options
def convert_command(
    source: Annotated[str, typer.Argument(help="A folder, a weight file or a hub id.")],
    destination: Annotated[str, typer.Argument(help="The folder to make; it must not exist yet, or be empty.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="bfloat16, float16, float32, ...: cast floating-point tensors; by default all stay as stored, and "
            "GGUF blocks become float32."
        ),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="The most bytes of tensors in a file, such as 500MB or 2GiB.")
    ] = "5GB",
    *,
    wanted: SourceOptions,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Write a checkpoint anew: sharded safetensors, config, generation config, tokenizer, SHA256SUMS.

    The folder appears whole or not at all. If the command is killed, the same command goes on where it was; if it
    fails, or is interrupted, nothing is left.
    """
    from loadstone.api.convert import convert
    from loadstone.report import conversion

    max_shard_bytes = parse_bytes(max_shard_size, option="--max-shard-size")
    with shown(options.err(), quiet=quiet or as_json) as observer:
        report = convert(
            source,
            destination,
            dtype=dtype,
            max_shard_size=max_shard_bytes,
            revision=wanted.revision,
            subfolder=wanted.subfolder,
            variant=wanted.variant,
            prefix=wanted.prefix,
            select=wanted.select or None,
            local_files_only=wanted.local_files_only,
            progress=observer,
        )
    if as_json:
        options.print_json(report.to_json())
    else:
        conversion.render(report, options.out())
