"""`loadstone plan`: what a run would take, before a byte of a tensor is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loadstone.cli import options

if TYPE_CHECKING:
    from loadstone.plan.values import Plan

EPILOG = """[bold]Examples[/bold]

loadstone plan ./Qwen2.5-7B-Instruct --max-memory cuda:0=8GiB,cpu=12GiB --context 8192

loadstone plan ./Qwen2.5-7B-Instruct --max-memory 6GB --no-offload

loadstone plan ./Qwen2.5-7B-Instruct --machine laptop-rtx4060-8gb --html plan.html

loadstone plan model.gguf --save plan.json

loadstone plan model.gguf --context 16384 --diff plan.json
"""


def plan_command(
    source: options.SourceOrDemo = None,
    max_memory: options.MaxMemory = None,
    context: Annotated[int, typer.Option(help="Tokens of prompt and answer together.")] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the prompt; by default 512, or the context where that is shorter.")
    ] = None,
    dtype: options.Dtype = None,
    device: options.DeviceOption = None,
    device_map: options.DeviceMap = None,
    machine: Annotated[
        str | None,
        typer.Option(help="Plan for another machine: one of the gallery by name, or a file of `machine --save`."),
    ] = None,
    no_offload: options.NoOffload = False,
    save: Annotated[Path | None, typer.Option(help="Write the plan to this file, as JSON.")] = None,
    save_device_map: Annotated[
        Path | None, typer.Option(help="Write where each module is kept to this file, as a device map of transformers.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the picture to this file, as a page with every tensor.")
    ] = None,
    diff: Annotated[Path | None, typer.Option(help="Show what is different from the plan in this file.")] = None,
    revision: options.Revision = None,
    local_files_only: options.LocalOnly = False,
    as_json: options.Json = False,
) -> None:
    """Show where everything would lie, the peak of every device and how long things take. No tensor is read."""
    from loadstone.api.plan import plan
    from loadstone.checkpoint.files import write_whole
    from loadstone.cli.progress import shown
    from loadstone.errors import DoesNotFit
    from loadstone.hardware.machine_file import find_machine
    from loadstone.plan import plan_file

    earlier = None if diff is None else options.read_plan(diff)
    with shown(options.err(), quiet=as_json) as observer:
        named = _source(source, observer)
        try:
            made = plan(
                named,
                max_memory=max_memory,
                dtype=dtype,
                context=context,
                batch=batch,
                prompt_tokens=prompt_tokens,
                device=device,
                device_map=options.read_device_map(device_map),
                offload=not no_offload,
                machine=None if machine is None else find_machine(machine),
                revision=revision,
                local_files_only=local_files_only,
                progress=observer,
            )
        except DoesNotFit as error:
            _draw_alternatives(error.alternatives)
            raise
    if save is not None:
        write_whole(save, _json_text(plan_file.to_json(made)))
    if save_device_map is not None:
        from loadstone.plan.device_map import to_device_map

        write_whole(save_device_map, _json_text(to_device_map(made)))
    if html is not None:
        write_whole(html, _page(named, made, revision, local_files_only))
    if earlier is not None:
        lines = plan_file.diff(earlier, made)
        if as_json:
            options.print_json(list(lines))
        else:
            typer.echo("\n".join(lines) if lines else "no difference")
    elif as_json:
        options.print_json(plan_file.to_json(made))
    else:
        from loadstone.report import plan_picture

        plan_picture.render(made, options.out())


def _draw_alternatives(alternatives: Sequence[Plan]) -> None:
    if alternatives:
        from loadstone.report import plan_picture

        plan_picture.render_alternatives(alternatives, options.err())


def _page(source: str, made: Plan, revision: str | None, local_files_only: bool) -> str:
    from loadstone.api.plan import tensors_by_unit
    from loadstone.report.plan_html import to_html

    return to_html(made, tensors_by_unit(source, made, revision=revision, local_files_only=local_files_only))


def _json_text(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=1) + "\n"


def _source(source: str | None, observer: Any) -> str:
    if source is not None:
        return source
    from loadstone.checkpoint.demo import demo_model

    return str(demo_model(observer))
