"""`loadstone machine`: what there is to plan with, here or on a machine that one does not have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loadstone.cli import options

if TYPE_CHECKING:
    from loadstone.hardware.spec import Machine

EPILOG = """[bold]Examples[/bold]

loadstone machine

loadstone machine --measure --model ./Qwen2.5-7B-Instruct

loadstone machine --gallery

loadstone machine desktop-rtx4090-24gb

loadstone machine --save gpu-box.json
"""


def machine_command(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME|FILE",
            help="A machine of the gallery, or one that was saved; without it the one at hand.",
            show_default=False,
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Measure disk, memory, links and matrix products, in a few seconds; it is kept."
        ),
    ] = False,
    model: Annotated[
        Path | None, typer.Option(help="A model's folder or file, whose disk is told of and measured.")
    ] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the machine to a file, as JSON.")] = None,
    show_gallery: Annotated[
        bool, typer.Option("--gallery", help="List the machines that come with Loadstone.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Show devices, memory that may be used, limits in force, disks, and what was measured.

    A machine can be saved and planned for elsewhere.
    """
    if show_gallery:
        if source is not None or measure or model is not None or save is not None:
            raise ValueError("--gallery: expected only --json beside it; give a name without --gallery to see one.")
        _show_gallery(as_json)
        return
    from loadstone.api.machine import machine
    from loadstone.hardware.openmp import fit_threads_to_cores

    if measure:
        fit_threads_to_cores()  # as for `loadstone run`
    _show(machine(source, model=model, measure=measure), save, as_json)


def _show_gallery(as_json: bool) -> None:
    from loadstone.hardware.machine_file import find_machine, gallery, to_json
    from loadstone.report import machine as report

    machines = [find_machine(name) for name in gallery()]
    if as_json:
        options.print_json([to_json(machine) for machine in machines])
    else:
        report.render_gallery(machines, options.out())


def _show(found: Machine, save: Path | None, as_json: bool) -> None:
    from loadstone.hardware.machine_file import save_machine, to_json
    from loadstone.report import machine as report

    if save is not None:
        found = replace(found, name=found.name or save.stem)
        save_machine(found, save)
    if as_json:
        options.print_json(to_json(found))
    else:
        report.render(found, options.out())
        if save is not None:
            options.err().print(f"saved as {save}", style="dim", highlight=False)
