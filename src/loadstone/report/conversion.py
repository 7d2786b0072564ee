"""What a conversion did, as values, text and JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from loadstone.events import StageFinished
from loadstone.plan.choose import Choice
from loadstone.report.text import draw_facts, draw_notes
from loadstone.units import format_bytes, format_count, format_rate, format_seconds

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport:
    """Everything about one conversion.

    Attributes:
        source: as it was called.
        format: what it was stored as.
        destination: the folder that was made.
        files: the weight files in it.
        side_files: the other files in it, the manifest left out.
        resumed: those of the weight files that an earlier, killed process had finished.
        num_tensors: in the weight files.
        num_parameters: the elements of these tensors.
        nbytes: the size of the weight files.
        dtype: of the floating-point tensors, and why.
        phases: the stages in order, with seconds.
        seconds: the wall-clock time.
        bound_bytes: the most anonymous memory that the conversion may take, as computed from the headers.
        before_bytes: the anonymous memory of the process before.
        peak_bytes: the most that there was on top of that; sampled every 10 ms.
        notes: what was noticed.
    """

    source: str
    format: str
    destination: str
    files: tuple[str, ...]
    side_files: tuple[str, ...]
    resumed: tuple[str, ...]
    num_tensors: int
    num_parameters: int
    nbytes: int
    dtype: Choice
    phases: tuple[StageFinished, ...]
    seconds: float
    bound_bytes: int
    before_bytes: int
    peak_bytes: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as plain data, sizes in bytes and times in seconds."""
        return asdict(self)


def render(report: ConversionReport, console: Console) -> None:
    """Draw the report.

    Args:
        report: what to draw.
        console: where; its width is respected.
    """
    draw_facts(console, _facts(report))
    draw_notes(console, report.notes)


def _facts(report: ConversionReport) -> Iterator[tuple[str, str]]:
    yield "wrote", report.destination
    yield "from", f"{report.source} ({report.format})"
    count = len(report.files)
    resumed = f", {len(report.resumed)} of them finished before" if report.resumed else ""
    yield (
        "weights",
        f"{format_count(report.num_parameters)} parameters in {report.num_tensors:,} tensors, "
        f"{format_bytes(report.nbytes)} in {count} file{'s' if count > 1 else ''}{resumed}",
    )
    yield "dtype", f"{report.dtype.value}: {report.dtype.reason}"
    yield "beside", ", ".join(report.side_files) or "nothing: there is no config.json beside the weights"
    yield (
        "memory",
        f"peak {format_bytes(report.peak_bytes)} anonymous, at most {format_bytes(report.bound_bytes)} as computed "
        f"from the headers (on top of {format_bytes(report.before_bytes)} before)",
    )
    writing = next((phase.seconds for phase in report.phases if phase.stage == "write"), 0.0)
    rate = f", weights at {format_rate(report.nbytes / writing)}" if writing and not report.resumed else ""
    yield "time", f"{format_seconds(report.seconds)}{rate}"
