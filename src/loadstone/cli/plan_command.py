"""`loadstone plan`: what a run would take, before a byte of a tensor is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loadstone.cli import options
from loadstone.cli.loading import SourceOptions, source_or_demo, with_options

if TYPE_CHECKING:
    from loadstone.events import Observer
    from loadstone.plan.values import Plan

EPILOG = """[bold]Examples[/bold]

loadstone plan ./Qwen2.5-7B-Instruct --max-memory cuda:0=8GiB,cpu=12GiB --context 8192

loadstone plan ./Qwen2.5-7B-Instruct --max-memory 6GB --no-offload

loadstone plan ./Qwen2.5-7B-Instruct --machine laptop-rtx4060-8gb --html plan.html

loadstone plan model.gguf --save plan.json

loadstone plan model.gguf --context 16384 --diff plan.json
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions(SourceOptions):
    """What is planned, and for what; see `loadstone.plan`."""

    max_memory: options.MaxMemory = None
    context: Annotated[int, typer.Option(help="Tokens of prompt and answer together.")] = 4096
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the prompt; by default 512, or the context where that is shorter.")
    ] = None
    dtype: options.Dtype = None
    device: options.DeviceOption = None
    device_map: options.DeviceMap = None
    machine: Annotated[
        str | None,
        typer.Option(help="Plan for another machine: one of the gallery by name, or a file of `machine --save`."),
    ] = None
    no_offload: options.NoOffload = False


@with_options
def plan_command(
    source: options.SourceOrDemo = None,
    *,
    wanted: PlanOptions,
    save: Annotated[Path | None, typer.Option(help="Write the plan to this file, as JSON.")] = None,
    save_device_map: Annotated[
        Path | None, typer.Option(help="Write where each module is kept to this file, as a device map of transformers.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the picture to this file, as a page with every tensor.")
    ] = None,
    diff: Annotated[Path | None, typer.Option(help="Show what is different from the plan in this file.")] = None,
    as_json: options.Json = False,
) -> None:
    """Show where everything would lie, the peak of every device and how long things take. No tensor is read."""
    from loadstone.api.pause import paused_gc
    from loadstone.cli.progress import shown

    earlier = None if diff is None else options.read_plan(diff)
    # A large plan is hundreds of thousands of values, among which there is no garbage to look for.
    with paused_gc():
        with shown(options.err(), quiet=as_json) as observer:
            source = source_or_demo(source, observer)
            made = _made(source, wanted, observer)
        if save is not None:
            _save(made, save)
        if save_device_map is not None:
            _save_device_map(made, save_device_map)
        if html is not None:
            _save_page(source, made, wanted, html)
        _show(made, earlier, as_json)


def _made(source: str, wanted: PlanOptions, observer: Observer) -> Plan:
    from loadstone.api.plan import plan
    from loadstone.errors import DoesNotFit
    from loadstone.hardware.machine_file import find_machine

    try:
        return plan(
            source,
            max_memory=wanted.max_memory,
            dtype=wanted.dtype,
            context=wanted.context,
            batch=wanted.batch,
            prompt_tokens=wanted.prompt_tokens,
            device=wanted.device,
            device_map=options.read_device_map(wanted.device_map),
            offload=not wanted.no_offload,
            machine=None if wanted.machine is None else find_machine(wanted.machine),
            revision=wanted.revision,
            subfolder=wanted.subfolder,
            variant=wanted.variant,
            prefix=wanted.prefix,
            select=wanted.select or None,
            local_files_only=wanted.local_files_only,
            progress=observer,
        )
    except DoesNotFit as error:
        _draw_alternatives(error.alternatives)
        raise


def _show(made: Plan, earlier: Plan | None, as_json: bool) -> None:
    """The plan, or what is different from an earlier one."""
    from loadstone.plan.plan_file import diff, to_json
    from loadstone.report import plan_picture

    if earlier is not None:
        lines = diff(earlier, made)
        if as_json:
            options.print_json(list(lines))
        else:
            typer.echo("\n".join(lines) if lines else "no difference")
    elif as_json:
        options.print_json(to_json(made))
    else:
        plan_picture.render(made, options.out())


def _draw_alternatives(alternatives: Sequence[Plan]) -> None:
    if alternatives:
        from loadstone.report import plan_picture

        plan_picture.render_alternatives(alternatives, options.err())


def _save(made: Plan, path: Path) -> None:
    from loadstone.plan.plan_file import to_json

    _write_json(path, to_json(made))


def _save_device_map(made: Plan, path: Path) -> None:
    from loadstone.plan.device_map import to_device_map

    _write_json(path, to_device_map(made))


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    from loadstone.checkpoint.files import write_whole

    write_whole(path, json.dumps(data, indent=1) + "\n")


def _save_page(source: str, made: Plan, wanted: PlanOptions, path: Path) -> None:
    from loadstone.api.plan import tensors_by_unit
    from loadstone.checkpoint.excerpt import Excerpt
    from loadstone.checkpoint.files import write_whole
    from loadstone.checkpoint.hub_cache import HubAccess
    from loadstone.report.plan_html import to_html

    access = HubAccess(revision=wanted.revision, local_files_only=wanted.local_files_only)
    excerpt = Excerpt(
        subfolder=wanted.subfolder or "", variant=wanted.variant, prefix=wanted.prefix, select=wanted.select or None
    )
    write_whole(path, to_html(made, tensors_by_unit(source, made, access, excerpt)))
