"""`loadstone load`: load a model, print the report, and exit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loadstone.cli import options
from loadstone.cli.loading import LoadOptions, load_model, with_options
from loadstone.cli.progress import shown

if TYPE_CHECKING:
    from loadstone.report.load_report import LoadReport

EPILOG = """[bold]Examples[/bold]

loadstone load ./Qwen2.5-7B-Instruct

loadstone load model.gguf --dtype bfloat16 --json

loadstone load ./stable-diffusion-3.5-medium --subfolder text_encoder --variant fp16
"""


@with_options
def load_command(
    source: options.SourceOrDemo = None,
    *,
    wanted: LoadOptions,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Load a model, print the load report, and exit."""
    from loadstone.api.registry import of
    from loadstone.report import load_report

    with shown(options.err(), quiet=quiet or as_json) as observer:
        model, _ = load_model(source, wanted, observer=observer)
    report = measured(of(model).report)
    if as_json:
        options.print_json(report.to_json())
    else:
        load_report.render(report, options.out())


def measured(report: LoadReport) -> LoadReport:
    """The report with this machine's rates, measured now where they are not known yet (half a second, once)."""
    if report.rates is not None:
        return report
    from loadstone.checkpoint.cache import cache_folder
    from loadstone.hardware.measure import measure

    return replace(report, rates=measure(Path(report.files[0]), cache_folder()))
