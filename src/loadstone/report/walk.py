"""What loading does, step by step: what each stage is for, what it found here, and how long it took."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loadstone.report.load_report import LoadReport
from loadstone.units import format_seconds

if TYPE_CHECKING:
    from rich.console import Console

# What each stage is for. The order is that of a load; a stage that did not run is not shown.
PURPOSES: dict[str, str] = {
    "headers": "Find the weight files and read only their headers: names, dtypes, shapes and offsets of all tensors.",
    "plan": "Ask whether all of it fits, and what must be read anew in each pass if not. Then the bytes are set in "
    "motion, in the background.",
    "import": "Import torch and transformers. This is most of what a person waits for, so the disk works meanwhile.",
    "class": "config.json names a model_type; its config class holds the sizes. Its architectures entry names the "
    "class to build; no entry means the bare model of that type.",
    "skeleton": "Build the module on the meta device: every parameter has a shape and a dtype, none has memory, "
    "and no initialiser runs.",
    "placement": "Choose the device that the weights go to.",
    "key map": "Match checkpoint names to parameter names: wrapper prefixes dropped, old names renamed, per-expert "
    "tensors gathered into fused ones. Faults in names or shapes show here, before a tensor is read.",
    "tensors": "Bytes become parameters: where dtype and device allow it as views of the mapped file, otherwise "
    "read and cast by several threads into their final memory.",
    "ties, buffers, eval": "Tied parameters become one tensor, buffers that no file holds (rotary frequencies) are "
    "computed by the class, and dropout is switched off.",
    "generation config": "Sampling defaults and end-of-text tokens for generate().",
    "streaming": "Hooks are put on what does not stay in memory: its parameters come before its forward and go after "
    "it.",
    "page in": "Wait for what is left of the mapped bytes, which were on their way all the time, so that the first "
    "forward finds them in memory.",
}


def to_json(report: LoadReport) -> list[dict[str, Any]]:
    """The steps as plain data."""
    return [
        {
            "step": phase.stage,
            "purpose": PURPOSES.get(phase.stage, ""),
            "seconds": phase.seconds,
            "found": phase.detail,
            "lines": list(phase.lines),
        }
        for phase in report.phases
    ]


def render(report: LoadReport, console: Console) -> None:
    """Draw the walk, a numbered step for each stage."""
    from rich.padding import Padding
    from rich.text import Text

    for number, phase in enumerate(report.phases, start=1):
        title = Text.assemble((f"{number}. {phase.stage}", "bold"), "  ", (format_seconds(phase.seconds), "cyan"))
        console.print(title)
        console.print(Padding(Text(PURPOSES.get(phase.stage, ""), style="dim"), (0, 0, 0, 3)))
        for line in phase.lines or (phase.detail,):
            console.print(Padding(Text(line), (0, 0, 0, 3)))
        if phase.lines and phase.detail:
            console.print(Padding(Text(f"= {phase.detail}", style="green"), (0, 0, 0, 3)))
        console.print()
    console.print(Text(f"{report.model_class} is ready after {format_seconds(report.seconds)}.", style="bold"))
