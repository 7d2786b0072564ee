"""What verifying a checkpoint found, file by file. As values, text and JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from loadstone.report.text import as_text
from loadstone.units import format_bytes, format_rate, format_seconds, printable

if TYPE_CHECKING:
    from rich.console import Console


class Verdict(Enum):
    """What is known of one side of a file."""

    OK = "ok"
    FAULT = "fault"
    UNKNOWN = "unknown"
    NOT_CHECKED = "not checked"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedFile:
    """One file.

    Attributes:
        name: relative to the checkpoint's folder where it lies in it.
        nbytes: its size; 0 if it is not there.
        structure: whether its header is in order; `NOT_CHECKED` for files that hold no weights.
        content: whether its bytes have the hash that is known; `UNKNOWN` where none is.
        said_by: where the hash is known from, or why none is.
        seconds: how long its bytes took; 0 if they were not read.
        faults: what is wrong with it.
    """

    name: str
    nbytes: int
    structure: Verdict
    content: Verdict
    said_by: str
    seconds: float = 0.0
    faults: tuple[str, ...] = ()

    @property
    def bytes_per_s(self) -> float:
        """The rate at which its bytes were read and hashed; 0 if they were not."""
        return self.nbytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Everything about one verification.

    Attributes:
        root: the folder of the checkpoint.
        files: weight files first, then what lies beside them and has a known hash.
        faults: all that was found, those of single files included; empty if all is well.
        num_tensors: that the headers describe; 0 where they could not be read.
        hashed_bytes: read and hashed.
        seconds: the wall-clock time of the whole.
    """

    root: str
    files: tuple[VerifiedFile, ...]
    faults: tuple[str, ...]
    num_tensors: int
    hashed_bytes: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, as far as it can be known."""
        return not self.faults

    @property
    def summary(self) -> str:
        """The outcome in a line."""
        unknown = sum(file.content is Verdict.UNKNOWN for file in self.files)
        checked = sum(file.content is Verdict.OK for file in self.files)
        parts = [f"{len(self.faults)} {'fault' if len(self.faults) == 1 else 'faults'}" if self.faults else "all well"]
        parts.append(f"{self.num_tensors:,} tensors in order" if self.num_tensors else "no tensors could be listed")
        parts.append(f"content of {checked} of {len(self.files)} files as it should be")
        if unknown:
            parts.append(f"structure only for {unknown}, of which no hash is known")
        return "; ".join(parts)

    def __str__(self) -> str:
        """The verification as text, 100 columns wide."""
        return as_text(lambda console: render(self, console))

    def to_json(self) -> dict[str, Any]:
        """The verification as plain data, sizes in bytes and times in seconds."""
        files = [
            {
                **asdict(file),
                "structure": file.structure.value,
                "content": file.content.value,
                "bytes_per_s": file.bytes_per_s,
            }
            for file in self.files
        ]
        return {**asdict(self), "files": files, "ok": self.ok}


_STYLES = {Verdict.OK: "green", Verdict.FAULT: "bold red", Verdict.UNKNOWN: "yellow", Verdict.NOT_CHECKED: "dim"}


def render(verification: Verification, console: Console) -> None:
    """Draw the verification.

    Args:
        verification: what to draw.
        console: where; its width is respected.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("file", overflow="fold")
    for title in ("size", "structure", "content"):
        table.add_column(title, justify="right" if title == "size" else "left", no_wrap=True)
    table.add_column("by", overflow="fold")
    table.add_column("rate", justify="right", no_wrap=True)
    for file in verification.files:
        table.add_row(
            Text(printable(file.name)),
            format_bytes(file.nbytes),
            Text(file.structure.value, style=_STYLES[file.structure]),
            Text(file.content.value, style=_STYLES[file.content]),
            Text(file.said_by),
            format_rate(file.bytes_per_s) if file.seconds else "",
        )
    console.print(table)
    for fault in verification.faults:
        console.print(Text.assemble(("fault  ", "bold red"), printable(" ".join(fault.split()))))
    rate = format_rate(verification.hashed_bytes / verification.seconds) if verification.hashed_bytes else ""
    hashed = f", {format_bytes(verification.hashed_bytes)} hashed at {rate}" if rate else ""
    console.print(Text(f"{verification.summary} ({format_seconds(verification.seconds)}{hashed})"))
