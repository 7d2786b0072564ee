"""What a load did: choices with reasons, phases with seconds, bytes with rates, peaks. As values, text and JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from loadstone.events import StageFinished
from loadstone.hardware.memory import ResidentBytes
from loadstone.hardware.spec import Rates
from loadstone.plan.choose import Choice
from loadstone.plan.load_peak import LoadPeak
from loadstone.plan.values import Plan
from loadstone.report.machine import rates_line
from loadstone.report.text import as_text, draw_facts, draw_notes
from loadstone.units import format_bytes, format_count, format_rate, format_seconds

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaMemory:
    """What torch's allocator says of one CUDA device after the load, in bytes.

    Attributes:
        allocated_bytes: in tensors.
        reserved_bytes: held by the allocator.
        peak_bytes: the most that was allocated.
        fragmented_bytes: reserved, split, and in no tensor.
        num_retries: how often the allocator had to free its cache and try again.
    """

    allocated_bytes: int
    reserved_bytes: int
    peak_bytes: int
    fragmented_bytes: int
    num_retries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """Everything about one load.

    Attributes:
        source: as it was called.
        model_class: the class that was built.
        chosen_by: where the class came from.
        files: its weight files.
        num_parameters: of the module, tied ones counted once.
        weight_bytes: of the module's parameters and buffers in memory, tied ones counted once.
        dtype: the floating-point dtype, and why.
        device: where the weights are, and why.
        attention: the attention implementation, and why.
        phases: the stages in order, with seconds.
        seconds: the wall-clock time of the whole load.
        mapped_bytes: used where they lie in the file.
        paged_bytes: of the mapped files, brought into memory ahead of use; what was in the page cache may be left out.
        paged_s: how long that took; it runs while torch is imported.
        read_bytes: read into memory during the load, casts and decoding included.
        read_s: how long that took; it runs while torch is imported.
        before: resident memory when the load began.
        peak: the most resident memory during the load.
        foretold: what the load itself would take of the host's memory at most, computed before it read a tensor.
        plan: the plan that was followed; None where everything fitted with room to spare.
        rates: what the machine was measured to do at best; None where it was not measured.
        cuda: the allocator's figures, on CUDA.
        notes: what was noticed.
    """

    source: str
    model_class: str
    chosen_by: str
    files: tuple[str, ...]
    num_parameters: int
    weight_bytes: int
    dtype: Choice
    device: Choice
    attention: Choice
    phases: tuple[StageFinished, ...]
    seconds: float
    mapped_bytes: int
    paged_bytes: int
    paged_s: float
    read_bytes: int
    read_s: float
    before: ResidentBytes
    peak: ResidentBytes
    foretold: LoadPeak
    plan: Plan | None = None
    rates: Rates | None = None
    cuda: CudaMemory | None = None
    notes: tuple[str, ...] = ()

    @property
    def read_bytes_per_s(self) -> float:
        """The rate at which stored bytes were read and decoded."""
        return self.read_bytes / self.read_s if self.read_s else 0.0

    @property
    def paged_bytes_per_s(self) -> float:
        """The rate at which mapped bytes came in."""
        return self.paged_bytes / self.paged_s if self.paged_s else 0.0

    def __str__(self) -> str:
        """The report as text, 100 columns wide."""
        return as_text(lambda console: render(self, console))

    def to_json(self) -> dict[str, Any]:
        """The report as plain data, sizes in bytes and times in seconds."""
        rates = {"read_bytes_per_s": self.read_bytes_per_s, "paged_bytes_per_s": self.paged_bytes_per_s}
        return {**asdict(self), **rates}


def render(report: LoadReport, console: Console) -> None:
    """Draw the report.

    Args:
        report: what to draw.
        console: where; its width is respected.
    """
    from rich.table import Table

    draw_facts(console, _facts(report))
    phases = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    phases.add_column("phase", no_wrap=True)
    phases.add_column("time", justify="right", no_wrap=True)
    phases.add_column("what", overflow="fold")
    for phase in report.phases:
        phases.add_row(phase.stage, format_seconds(phase.seconds), phase.detail)
    phases.add_row("total", format_seconds(report.seconds), "", style="bold")
    console.print()
    console.print(phases)
    draw_notes(console, report.notes)


def _facts(report: LoadReport) -> Iterator[tuple[str, str]]:
    yield "model", f"{report.model_class} from {report.source} ({report.chosen_by})"
    yield "size", f"{format_count(report.num_parameters)} parameters, {format_bytes(report.weight_bytes)} of weights"
    yield "dtype", f"{report.dtype.value}: {report.dtype.reason}"
    yield "device", f"{report.device.value}: {report.device.reason}"
    yield "attention", f"{report.attention.value}: {report.attention.reason}"
    yield "bytes", _bytes_line(report)
    if report.rates is not None:
        measured = rates_line(report.rates)
        yield "limits", f"measured here: {measured}" if measured else "not measured"
    yield (
        "memory",
        f"peak {format_bytes(report.peak.anonymous_bytes)} anonymous "
        f"({format_bytes(report.before.anonymous_bytes)} before), {format_bytes(report.peak.file_bytes)} file-backed; "
        f"the load itself was to take at most {format_bytes(report.foretold.anonymous_bytes)} anonymous",
    )
    if report.cuda is not None:
        yield (
            "CUDA",
            f"{format_bytes(report.cuda.allocated_bytes)} allocated, {format_bytes(report.cuda.reserved_bytes)} "
            f"reserved, peak {format_bytes(report.cuda.peak_bytes)}, {format_bytes(report.cuda.fragmented_bytes)} "
            f"fragmented, {report.cuda.num_retries} allocation retries",
        )


def _bytes_line(report: LoadReport) -> str:
    parts = []
    if report.mapped_bytes:
        brought_in = f", brought in at {format_rate(report.paged_bytes_per_s)}" if report.paged_bytes else ""
        parts.append(f"{format_bytes(report.mapped_bytes)} mapped where they lie{brought_in}")
    if report.read_bytes:
        parts.append(f"{format_bytes(report.read_bytes)} read and decoded at {format_rate(report.read_bytes_per_s)}")
    return ", ".join(parts) or "none"
