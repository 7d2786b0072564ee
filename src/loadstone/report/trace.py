"""A recording as a file that chrome://tracing and Perfetto open.

Source: the Trace Event Format,
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.errors import DestinationError
from loadstone.execute.trace import Recording, Span

if TYPE_CHECKING:
    from io import TextIOWrapper

_PROCESS = 1
# What the threads of `stream.read` are called.
_READER = "loadstone-read"


def check_writable(path: Path) -> None:
    """Find out now rather than after a long run that there is no such folder, or that nothing may be written there.

    Raises:
        DestinationError: so it is.
    """
    if path.is_dir():
        raise DestinationError(f"{path}: expected the name of a file for the trace, found a folder; name a file in it.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise DestinationError(
            f"{path}: expected a folder to write the trace into, found none that may be written at {path.parent}; "
            "create it, or name another."
        )


def write_trace(path: Path, recording: Recording) -> None:
    """Write a recording whole or not at all.

    Args:
        path: where; what is there is replaced.
        recording: what happened.

    Raises:
        DestinationError: it cannot be written; nothing is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            _write(file, recording)
        temporary.replace(path)
    except OSError as error:
        raise DestinationError(
            f"{path}: expected to write the trace, found: {error.strerror or error}; name another file."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _write(file: TextIOWrapper, recording: Recording) -> None:
    """Event by event, so that the text is never in memory as a whole."""
    head = {"displayTimeUnit": "ms", "otherData": {"spans_left_out": recording.num_left_out}}
    file.write(json.dumps(head)[:-1] + ', "traceEvents": [\n')
    for index, event in enumerate(_events(recording)):
        file.write((",\n" if index else "") + json.dumps(event))
    file.write("\n]}\n")


def _events(recording: Recording) -> Iterator[dict[str, Any]]:
    yield _about("process_name", 0, {"name": "loadstone"})
    for span in recording.spans():
        yield {
            "ph": "X",
            "cat": span.kind,
            "name": span.name if span.kind in {"compute", "pass"} else f"{span.kind} {span.name}",
            "pid": _PROCESS,
            "tid": span.thread,
            "ts": round(span.begin_s * 1e6, 3),
            "dur": round(span.seconds * 1e6, 3),
            "args": _facts(span),
        }
    num_readers = 0
    for number, thread in enumerate(recording.threads):
        is_reader = thread == _READER
        num_readers += is_reader
        name = f"reader {num_readers}" if is_reader else f"forward ({thread})"
        yield _about("thread_name", number, {"name": name})
        # Forwards above readers.
        yield _about("thread_sort_index", number, {"sort_index": number + (1000 if is_reader else 0)})


def _facts(span: Span) -> dict[str, Any]:
    facts: dict[str, Any] = {"of": span.name}
    if span.nbytes:
        facts["bytes"] = span.nbytes
    if span.kind == "read" and span.seconds:
        facts["GB/s"] = float(f"{span.nbytes / span.seconds / 1e9:.3g}")  # a small read can take long
    return facts


def _about(what: str, number: int, facts: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": _PROCESS, "tid": number, "args": facts}
