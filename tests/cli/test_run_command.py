"""`loadstone run` with a file of prompts, with foretold tokens, and with a draft model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import loadstone
from loadstone.api.batching import choose_batch_size
from loadstone.cli.app import main
from loadstone.cli.prompts import read_prompts
from loadstone.errors import DoesNotFit
from loadstone.execute.values import Prompt
from loadstone.plan.values import Plan

LINES = ("a b", "", "c d e f g h i j k", "  l  ", "m")
QUICK = ("--max-new-tokens", 6, "--temperature", 0, "--dtype", "float32")


class Ended(Exception):
    """The command ended with another code than 0."""


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0
) -> tuple[str, str]:
    monkeypatch.setattr(sys, "argv", ["loadstone", "run", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        main()
    captured = capsys.readouterr()
    assert (caught.value.code or 0) == code, captured.err
    return captured.out, captured.err


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(LINES))
    return path


def test_each_prompt_of_a_file_is_answered_as_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chatty_folder: Path, prompts: Path
) -> None:
    alone = [
        json.loads(run(monkeypatch, capsys, chatty_folder, line.strip(), *QUICK, "--json")[0])["text"]
        for line in LINES
        if line
    ]
    for more in ((), ("--batch-size", 1), ("--batch-size", 3)):
        out, err = run(monkeypatch, capsys, chatty_folder, "--batch", prompts, *QUICK, *more, "--json")
        found = [json.loads(line) for line in out.splitlines()]
        assert [one["text"] for one in found] == alone
        assert [one["prompt"] for one in found] == [line.strip() for line in LINES if line]
        assert [one["number"] for one in found] == [1, 2, 3, 4]
        assert "4 of 4 prompts answered" in err
    out, err = run(monkeypatch, capsys, chatty_folder, "--batch", prompts, *QUICK, "--quiet")
    blocks = out.strip().split("\n\n")
    assert [block.partition("\n")[0] for block in blocks] == ["[1]", "[2]", "[3]", "[4]"]
    assert [block.partition("\n")[2] for block in blocks] == [text.strip() for text in alone]
    assert err == ""


def test_the_plan_holds_memory_for_the_whole_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chatty_folder: Path, prompts: Path
) -> None:
    seen: list[object] = []
    load = loadstone.load

    def watched(*arguments: object, **more: object) -> object:
        seen.append(more["batch"])
        return load(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("loadstone.api.load.load", watched)
    run(monkeypatch, capsys, chatty_folder, "--batch", prompts, *QUICK, "--batch-size", 3)
    run(monkeypatch, capsys, chatty_folder, "--batch", prompts, *QUICK)
    assert seen == [3, 4]


def test_json_lines_bring_their_own_system_message(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "system": "be brief"}\n\n{"prompt": "b"}\n{"prompt": "c", "system": null}\n')
    assert read_prompts(path, system="usual") == [
        Prompt(text="a", system="be brief"),
        Prompt(text="b", system="usual"),
        Prompt(text="c", system=None),
    ]
    path.write_text("\ufeffone\n  two  \n", encoding="utf-8")
    assert read_prompts(path, raw=True) == [Prompt(text="one", raw=True), Prompt(text="two", raw=True)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a prompt a line, found an empty file"),
        (b" \n\n", "expected a prompt a line, found an empty file"),
        (b"\xff\xfe\x00", "expected UTF-8 text"),
        (b'{"prompt": "a"}\n{"prompt": ', r"prompts\.txt, line 2: expected a JSON object .* found what is no JSON"),
        (b'{"prompt": "a"}\n\n["b"]', "line 3: .* found a list; mend the line"),
        (b'{"prompt": "a", "sytem": "b"}', "line 1: .* found 'sytem' too; leave it out"),
        (b'{"text": "a"}', "line 1: .* found 'text' too"),
        (b'{"prompt": " "}', 'line 1: .* found no text as "prompt"; add it'),
        (b'{"prompt": 3}', 'line 1: .* found no text as "prompt"; add it'),
        (b'{"prompt": "a", "system": 3}', 'line 1: .* found a int as "system"; make it text'),
    ],
)
def test_a_bad_file_ends_with_the_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    chatty_folder: Path,
    prompts: Path,
    content: bytes,
    message: str,
) -> None:
    prompts.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(prompts)
    _, err = run(monkeypatch, capsys, chatty_folder, "--batch", prompts, code=2)
    assert err.startswith(f"loadstone: {prompts}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "PROMPTS", "why"), "the prompt 'why' cannot go with --batch"),
        (("--batch", "missing.txt"), "missing.txt"),
        (("why", "--batch-size", 4), "--batch-size 4: expected a file of prompts beside it, found none; add --batch"),
        (("why", "--draft", "x", "--no-assist"), "--draft x cannot go with --no-assist"),
        (("why", "--draft", "x", "--plan", "p.json"), "--draft x cannot go with --plan"),
    ],
)
def test_what_cannot_go_together_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    chatty_folder: Path,
    prompts: Path,
    arguments: tuple[object, ...],
    message: str,
) -> None:
    given = [prompts if one == "PROMPTS" else one for one in arguments]
    _, err = run(monkeypatch, capsys, chatty_folder, *given, code=2)
    assert message in err


def test_a_plan_for_fewer_prompts_at_a_time_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chatty_folder: Path, prompts: Path
) -> None:
    from loadstone.plan.plan_file import to_json

    saved = prompts.with_name("plan.json")
    saved.write_text(json.dumps(to_json(loadstone.plan(chatty_folder, context=400, batch=2))))
    more = ("--max-new-tokens", 4, "--plan", saved)
    _, err = run(monkeypatch, capsys, chatty_folder, "--batch", prompts, *more, "--batch-size", 3, code=2)
    assert "--batch-size 3: expected at most 2 at a time" in err
    _, err = run(monkeypatch, capsys, chatty_folder, "--batch", prompts, *more)
    assert "4 of 4 prompts answered, 2 at a time" in err


def away(tmp_path: Path) -> tuple[str, Path]:
    """A device map that leaves a block on the disk."""
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"": "cpu", "model.layers.0": "disk"}))
    return "--device-map", path


def test_foretold_tokens_do_not_change_the_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chatty_folder: Path, tmp_path: Path
) -> None:
    options = (chatty_folder, "a b c a b c", "--max-new-tokens", 24, "--temperature", 0, *away(tmp_path), "--json")
    plain = json.loads(run(monkeypatch, capsys, *options, "--no-assist")[0])
    found = json.loads(run(monkeypatch, capsys, *options, "--assist")[0])
    assert plain["assisted"] is None
    assert found["text"] == plain["text"]
    assert found["assisted"]["num_tokens"] == found["num_new_tokens"]
    assert found["assisted"]["note"] == ""
    sampled = (chatty_folder, "a b", "--max-new-tokens", 4, "--temperature", 1, "--assist")
    _, err = run(monkeypatch, capsys, *sampled)
    assert "nothing foretold: tokens are sampled" in err
    _, err = run(monkeypatch, capsys, *options[:-1], "--assist")
    assert "foretold tokens came true" in err


def test_tokens_are_foretold_by_default_where_passes_wait_for_weights(
    chatty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from loadstone.api.registry import Loaded

    options = (chatty_folder, "a b", "--max-new-tokens", 4, "--temperature", 0, *away(tmp_path), "--json")
    for waits in (True, False):
        monkeypatch.setattr(Loaded, "is_stream_bound", lambda _, waits=waits: waits)
        found = json.loads(run(monkeypatch, capsys, *options)[0])
        assert (found["assisted"] is not None) is waits


def test_a_model_waits_for_weights_if_its_plan_says_so(chatty_folder: Path) -> None:
    whole = loadstone.of(loadstone.load(chatty_folder))
    assert not whole.is_stream_bound()
    some = loadstone.of(loadstone.load(chatty_folder, device_map={"": "cpu", "model.layers.0": "disk"}))
    assert some.plan is not None
    decode = some.plan.prediction.decode
    assert some.is_stream_bound() is (decode.transfer_s > decode.compute_s)
    parts = {f"model.layers.0.mlp.{name}_proj": "disk" for name in ("up", "gate", "down")}
    assert not loadstone.of(loadstone.load(chatty_folder, device_map={"": "cpu", **parts})).is_stream_bound()


def test_a_draft_model_is_loaded_beside_it_within_the_budget(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chatty_folder: Path
) -> None:
    options = (chatty_folder, "a b c", *QUICK, "--json")
    plain = json.loads(run(monkeypatch, capsys, *options)[0])
    found = json.loads(run(monkeypatch, capsys, *options, "--draft", chatty_folder)[0])
    assert found["text"] == plain["text"]
    assert found["assisted"]["num_accepted"] > 0
    _, err = run(monkeypatch, capsys, *options, "--draft", chatty_folder, "--max-memory", "1MB", code=2)
    assert "does not fit" in err


def test_a_draft_model_with_another_vocabulary_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chatty_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(chatty_folder, other)
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["A"] = tokenizer["model"]["vocab"].pop("a")
    path.write_text(json.dumps(tokenizer))
    _, err = run(monkeypatch, capsys, chatty_folder, "b c", *QUICK, "--draft", other, code=2)
    assert f"draft model {other}: expected the vocabulary of {chatty_folder}, found 2 tokens that differ" in err


def test_the_batch_for_which_all_answers_take_the_least_time_is_chosen(chatty_folder: Path) -> None:
    made = loadstone.plan(chatty_folder)
    asked: list[int] = []

    def plan_for(size: int) -> Plan:
        asked.append(size)
        if size > 8:
            raise DoesNotFit("too large", shortfall_bytes=1)
        return made

    assert choose_batch_size(100, 50, plan_for) == 8  # each pass takes as long, whatever the size
    assert asked == [1, 2, 4, 8, 16]
    asked.clear()
    assert choose_batch_size(5, 50, plan_for) == 5
    assert asked == [1, 2, 4, 5]

    def nothing_fits(size: int) -> Plan:
        raise DoesNotFit("too large", shortfall_bytes=size)

    assert choose_batch_size(5, 50, nothing_fits) == 1


_IN_A_CONTAINER = """
import sys
from loadstone.cli.app import main
from loadstone.hardware import openmp
openmp.num_cores, openmp.num_bound_cores = lambda: 1, lambda: 2
try:
    main()
except SystemExit as ended:
    import torch
    print(ended.code or 0, torch.get_num_threads())
"""


def test_a_container_that_gives_the_time_of_one_core_is_computed_in_with_one_thread(chatty_folder: Path) -> None:
    unset = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = (sys.executable, "-c", _IN_A_CONTAINER, "run", str(chatty_folder), "a b", *map(str, QUICK))
    said = subprocess.run(command, env=unset, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "0 1"
