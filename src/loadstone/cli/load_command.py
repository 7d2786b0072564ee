"""`loadstone load`: load a model, print the report, and exit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loadstone.cli import options
from loadstone.cli.loading import LoadOptions, load_model
from loadstone.cli.progress import shown

if TYPE_CHECKING:
    from loadstone.report.load_report import LoadReport

EPILOG = """[bold]Examples[/bold]

loadstone load ./Qwen2.5-7B-Instruct

loadstone load model.gguf --dtype bfloat16 --json
"""


def load_command(
    source: options.SourceOrDemo = None,
    architecture: options.Architecture = None,
    dtype: options.Dtype = None,
    device: options.DeviceOption = None,
    attn_implementation: options.Attention = None,
    revision: options.Revision = None,
    local_files_only: options.LocalOnly = False,
    trust_remote_code: options.TrustRemoteCode = False,
    no_strict: options.NotStrict = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Load a model, print the load report, and exit."""
    from loadstone.api.registry import of
    from loadstone.report import load_report

    wanted = LoadOptions(
        architecture=architecture,
        dtype=dtype,
        device=device,
        attn_implementation=attn_implementation,
        revision=revision,
        local_files_only=local_files_only,
        trust_remote_code=trust_remote_code,
        strict=not no_strict,
    )
    with shown(options.err(), quiet=quiet or as_json) as observer:
        model, _ = load_model(source, wanted, observer)
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
