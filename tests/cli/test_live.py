"""What a run of a streamed model shows while it runs, and says at its end."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import loadstone
from loadstone.cli.app import main
from loadstone.cli.live import PassLine, Screen
from loadstone.events import BytesMoved, Event, PassProgress, ignore
from loadstone.hardware.spec import Rates


class Clock:
    """Time that goes on when it is told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def progress(**changes: Any) -> PassProgress:
    facts: dict[str, Any] = {
        "number": 1,
        "unit": "model.layers.12",
        "done_units": 8,
        "num_units": 22,
        "done_bytes": 1_000_000_000,
        "total_bytes": 4_000_000_000,
        "seconds": 1.0,
        "waited_s": 0.62,
    }
    return PassProgress(**facts | changes)


def test_the_line_tells_where_the_pass_is_and_when_the_first_token_comes() -> None:
    clock = Clock()
    line = PassLine(8.4, clock)
    assert line.text() == "reading the prompt, first token in about 8.00 s"
    for second in range(3):
        clock.now = 100.0 + second / 2
        line.tell(BytesMoved(stage="stream", done_bytes=second * 850_000_000, total_bytes=10**10))
    line.tell(BytesMoved(stage="read", done_bytes=5, total_bytes=10))
    line.tell(progress())
    assert line.text() == (
        "pass 1, model.layers.12 (9 of 22 streamed), 1.70 GB/s, waited 62%, first token in about 3.00 s"
    )
    line.tell(progress(number=7, done_bytes=0))
    assert line.text() == "pass 7, model.layers.12 (9 of 22 streamed), 1.70 GB/s, waited 62%"
    line.num_texts = 1
    line.tell(progress(unit="", is_over=True))
    assert line.text() == "pass 1, 1.70 GB/s, waited 62%"


@pytest.fixture
def away(tmp_path: Path) -> Path:
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"": "cpu", "model.layers": "disk", "lm_head": "disk"}))
    return path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = Rates(disk_bytes_per_s=1.75e9)
    monkeypatch.setattr("loadstone.api.reported.known_rates", lambda *_: rates)


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[str, str, object]:
    monkeypatch.setattr(sys, "argv", ["loadstone", "run", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        main()
    captured = capsys.readouterr()
    return captured.out, captured.err, caught.value.code or 0  # None is success too


TELL = ("a b", "--max-new-tokens", 5, "--temperature", 0)


@pytest.mark.usefixtures("measured")
def test_a_streamed_run_ends_with_what_was_streamed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chatty_folder: Path, away: Path
) -> None:
    whole, _, _ = run(monkeypatch, capsys, chatty_folder, *TELL)
    out, err, code = run(monkeypatch, capsys, chatty_folder, *TELL, "--device-map", away)
    assert (out, code) == (whole, 0)
    assert "streamed " in err
    assert " (disk measured 1.75 GB/s), waited " in err
    assert "pass 1, " not in err  # no terminal, no line
    data = json.loads(run(monkeypatch, capsys, chatty_folder, *TELL, "--device-map", away, "--json")[0])
    assert data["streaming"]["passes"] == data["num_new_tokens"]
    assert data["streaming"]["disk_bytes_per_s"] == 1.75e9
    assert json.loads(run(monkeypatch, capsys, chatty_folder, *TELL, "--json")[0])["streaming"] is None


def test_a_run_writes_a_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chatty_folder: Path, away: Path, tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    _, err, code = run(monkeypatch, capsys, chatty_folder, *TELL, "--device-map", away, "--trace", path)
    assert not code, err
    events = json.loads(path.read_text())["traceEvents"]
    assert {event.get("cat") for event in events} >= {"pass", "compute", "read", "wait", "switch"}
    bad = tmp_path / "none" / "trace.json"
    _, err, code = run(monkeypatch, capsys, chatty_folder, *TELL, "--trace", bad)
    assert code == 2
    assert "expected a folder to write the trace into" in " ".join(err.split())


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_shows_the_line_and_loses_it_before_the_text(
    monkeypatch: pytest.MonkeyPatch, chatty_folder: Path, quiet: bool
) -> None:
    drawn = io.StringIO()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    screen = Screen(Console(file=drawn, force_terminal=True, width=100), quiet=quiet)
    with screen.loading():
        model: Any = loadstone.load(
            chatty_folder, device_map={"": "cpu", "model.layers.0": "disk"}, progress=screen.observer
        )
    assert (screen.observer is ignore) is quiet
    drawn.seek(0)
    drawn.truncate()
    said: list[str] = []
    with screen.answering(loadstone.of(model).plan, said.append) as say, torch.inference_mode():
        model(torch.arange(4)[None])
        say("text")
        before = drawn.getvalue()
        model(torch.arange(4)[None])
    assert said == ["text"]
    assert drawn.getvalue() == before  # nothing is drawn once there is text
    assert ("reading the prompt, first token" in before) is not quiet
    assert ("pass 1, " in before) is not quiet
    assert ("\x1b[2K" in before) is not quiet  # the line is erased


def test_callers_are_told_where_each_pass_is(chatty_folder: Path) -> None:
    told: list[Event] = []
    model: Any = loadstone.load(chatty_folder, device_map={"": "cpu", "model.layers": "disk"}, progress=told.append)
    told.clear()
    with torch.inference_mode():
        for _ in range(2):
            model(torch.arange(4)[None])
    passes = [event for event in told if isinstance(event, PassProgress)]
    assert [(one.number, one.unit, one.done_units, one.is_over) for one in passes] == [
        (number, *rest)
        for number in (1, 2)
        for rest in (("", 0, False), ("model.layers.0", 0, False), ("model.layers.1", 1, False), ("", 2, True))
    ]
    assert passes[3].done_bytes == passes[3].total_bytes > 0
    assert passes[3].seconds >= passes[3].waited_s >= 0
