"""Every case of the corpus is refused: the right class, one clear line, a second and 300 MB at most, nothing run."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import loadstone
import malformed
from loadstone.cli.app import main
from loadstone.report import inspection
from malformed import CASES, CONTROLS, DEADLINE_S, Ended
from malformed_base import CANARY, Case, Control, Through

HEADERS = [case for case in CASES if case.through is Through.INSPECT]
LOADS = [case for case in CASES if case.through is not Through.INSPECT]

MAX_SECONDS = 1
MAX_PEAK_BYTES = 300_000_000

# These list the names that do not fit, or those that would have.
LISTING = {"CheckpointMismatch", "UnknownArchitecture"}


def named(case: Case | Control) -> str:
    return case.name


@pytest.mark.parametrize("case", CASES, ids=named)
def test_case_is_refused_in_one_clear_line(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "case"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(loadstone.LoadstoneError) as caught:
        malformed.meet(case, folder)
    told = str(caught.value).replace(str(folder), "")
    assert type(caught.value) is case.error
    assert case.message
    assert case.message in told
    assert told.isprintable(), "one line, no control characters"
    assert len(told) < 400 or case.error.__name__ in LISTING
    assert not (folder / CANARY).exists(), "something in the checkpoint was run"


@pytest.mark.parametrize("cases", [HEADERS, LOADS], ids=["headers", "loads"])
def test_cases_take_no_time_and_no_memory(cases: list[Case]) -> None:
    throughs = sorted({case.through.value for case in cases})
    done = subprocess.run(
        [sys.executable, malformed.__file__, *(part for name in throughs for part in ("--measure", name))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    ended = [Ended(**json.loads(line)) for line in done.stdout.splitlines()]
    last = ended[-1].name if ended else "none"
    assert done.returncode == 0, f"died, or hung for {DEADLINE_S} s, in the case after {last!r}: {done.stderr[-2000:]}"
    assert {one.name for one in ended} == {case.name for case in cases}
    assert not {one.name: one.seconds for one in ended if one.seconds >= MAX_SECONDS}
    assert not {one.name: one.peak_bytes for one in ended if one.peak_bytes >= MAX_PEAK_BYTES}


@pytest.mark.parametrize("control", CONTROLS, ids=named)
def test_control_is_read(control: Control, tmp_path: Path) -> None:
    found = loadstone.inspect(control.write(tmp_path), local_files_only=True)
    assert tuple(found.checkpoint.tensors) == control.tensors
    drawn = io.StringIO()
    inspection.render(found, Console(file=drawn, width=100, color_system=None))
    assert drawn.getvalue().replace("\n", "").isprintable()
    assert json.dumps(inspection.to_json(found), default=str)


def test_names_are_unique() -> None:
    names = [case.name for case in (*CASES, *CONTROLS)]
    assert len(names) == len(set(names))
    assert len(CASES) >= 60


@pytest.mark.parametrize("case", HEADERS[:: len(HEADERS) // 20], ids=named)
def test_the_command_says_it_in_a_line_and_ends_with_2(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = case.write(tmp_path)
    sources = source if isinstance(source, list) else [source]
    monkeypatch.setattr(sys, "argv", ["loadstone", "inspect", *map(str, sources[:1])])
    with pytest.raises(SystemExit) as caught:
        main()
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("loadstone: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(("template", "said"), [("{{ messages[0].content }}", "hello"), ("hello", "hello")])
def test_a_harmless_chat_template_is_used(template: str, said: str, tmp_path: Path) -> None:
    from loadstone.execute.generate import encode
    from loadstone.execute.values import Prompt
    from malformed_folders import llama, tokenizer_files

    tokenizer = loadstone.load_tokenizer(llama(None, **tokenizer_files(template))(tmp_path))
    tokens = encode(tokenizer, Prompt(text="hello", system=None, raw=False))["input_ids"]
    assert tokenizer.decode(tokens[0]) == said


def test_an_attribute_filter_gives_nothing_away(tmp_path: Path) -> None:
    from malformed_folders import llama, tokenizer_files

    hidden = "{{ messages|attr('__class__') }}{{ messages|map(attribute='__class__')|join }}{{ self.__init__ }}hello"
    tokenizer = loadstone.load_tokenizer(llama(None, **tokenizer_files(hidden))(tmp_path))
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except Exception as error:
        assert type(error).__name__ == "SecurityError"  # noqa: PT017 - an empty text is as good
    else:
        assert text == "hello"
