"""`loadstone convert` as a user runs it: what it prints, what it leaves when it is killed, when the disk is full."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from loadstone.checkpoint.manifest import read_manifest
from loadstone.checkpoint.new_folder import leftovers
from loadstone.checkpoint.open import open_checkpoint
from loadstone.checkpoint.write import NewTensor, plan_shards
from loadstone.cli.app import main

Run = Callable[..., tuple[int, str, str]]

NUM_TENSORS, TENSOR_BYTES = 40, 1 << 19


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["loadstone", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 MB of random bfloat16 in one file."""
    folder = tmp_path_factory.mktemp("source")
    shape = (TENSOR_BYTES // 2 // 64, 64)
    tensors = [NewTensor(name=f"t{n:02d}", dtype="bfloat16", shape=shape) for n in range(NUM_TENSORS)]
    (shard,) = plan_shards(tensors, 10**9)
    content = np.random.default_rng(0).integers(0, 256, NUM_TENSORS * TENSOR_BYTES, np.uint8)
    (folder / shard.name).write_bytes(shard.header + content.tobytes())
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def start(source: Path, made: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "loadstone", "convert", str(source), str(made), "--json", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def written_bytes(made: Path) -> int:
    """What is on the disk so far, in place or on the way to it."""
    total = 0
    for folder in (*leftovers(made), made):
        try:
            total += sum(path.stat().st_size for path in folder.iterdir())
        except OSError:  # it was renamed meanwhile
            continue
    return total


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_summary_and_the_json_say_what_was_done(run: Run, chatty_folder: Path, tmp_path: Path) -> None:
    code, out, _ = run("convert", chatty_folder, tmp_path / "made", "--dtype", "bf16")
    assert code == 0
    for words in ("wrote", "bfloat16: asked for", "tokenizer.json", "as computed", "parameters in 21 tensors"):
        assert words in out
    code, out, _ = run("convert", chatty_folder, tmp_path / "again", "--max-shard-size", "20kB", "--json")
    report = json.loads(out)
    assert report["files"][0] == f"model-00001-of-{len(report['files']):05d}.safetensors"
    assert report["peak_bytes"] <= report["bound_bytes"]
    assert report["num_tensors"] == 21
    assert len(open_checkpoint(tmp_path / "again").tensors) == 21


def test_a_part_of_a_source_is_asked_for_as_of_every_command(run: Run, chatty_folder: Path, tmp_path: Path) -> None:
    part = ("--prefix", "model.layers.0", "--select", "*q_proj.weight", "--select", "*norm.weight")
    code, out, _ = run("convert", chatty_folder, tmp_path / "made", *part, "--json")
    assert (code, json.loads(out)["num_tensors"]) == (0, 3)
    assert set(open_checkpoint(tmp_path / "made").tensors) == {
        "self_attn.q_proj.weight",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
    for option, words in (
        (("--variant", "fp16"), 'the variant "fp16"'),
        (("--subfolder", "unet"), "a subfolder 'unet'"),
    ):
        code, out, err = run("convert", chatty_folder, tmp_path / "none", *option)
        assert (code, out) == (2, "")
        assert words in err
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_help_has_examples(run: Run) -> None:
    _, out, _ = run("convert", "--help")
    assert "Examples" in out
    assert "loadstone convert model.gguf ./model" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-shard-size", "5 bananas"), "--max-shard-size: expected a size such as 5GB, 500MB or 2GiB"),
        (("--dtype", "bf17"), "dtype='bf17'"),
    ],
)
def test_bad_options_are_one_sentence(
    run: Run, chatty_folder: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    code, out, err = run("convert", chatty_folder, tmp_path / "made", *options)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(run: Run, chatty_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    code, _, err = run("convert", chatty_folder, tmp_path)
    assert code == 2
    assert "found a folder that is not empty; name another, or remove it." in err


def test_killed_at_any_moment_it_leaves_nothing_or_everything_and_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    options = ("--max-shard-size", "1MB", "--dtype", "float32")
    expected = tmp_path / "expected"
    start(checkpoint, expected, *options).communicate()
    whole = hashes(expected)
    points = random.Random(0)
    made, total = tmp_path / "made", 2 * NUM_TENSORS * TENSOR_BYTES
    num_killed, resumed = 0, 0
    for step in range(9):
        # What was finished before counts, so that later points are further on.
        target = int(total * (step + points.random()) / 9)
        child = start(checkpoint, made, *options)
        while written_bytes(made) < target and child.poll() is None:
            time.sleep(0.001)
        time.sleep(points.random() * 0.01)
        child.kill()
        child.communicate()
        num_killed += child.returncode == -signal.SIGKILL
        if made.exists():
            assert hashes(made) == whole
            break
        (hidden,) = leftovers(made)
        resumed = max(resumed, len(read_manifest(hidden / ".finished")) if (hidden / ".finished").exists() else 0)
    assert num_killed >= 8
    if not made.exists():
        out, err = start(checkpoint, made, *options).communicate()
        assert json.loads(out)["resumed"], err
    assert resumed
    assert hashes(made) == whole
    assert leftovers(made) == ()


def test_what_was_finished_is_not_written_again(checkpoint: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    child = start(checkpoint, made, "--max-shard-size", "1MB")
    while written_bytes(made) < 10 * TENSOR_BYTES and child.poll() is None:
        time.sleep(0.001)
    child.kill()
    child.communicate()
    (hidden,) = leftovers(made)
    before = {name: (hidden / name).stat() for name in read_manifest(hidden / ".finished")}
    # Other options go their own way.
    other = json.loads(start(checkpoint, tmp_path / "made", "--max-shard-size", "10MB").communicate()[0])
    assert other["resumed"] == []
    assert any(str(hidden) in note for note in other["notes"])
    made.rename(tmp_path / "other")
    report = json.loads(start(checkpoint, made, "--max-shard-size", "1MB").communicate()[0])
    assert set(report["resumed"]) == set(before)
    assert before
    for name, status in before.items():
        after = (made / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (status.st_ino, status.st_mtime_ns)


def test_a_second_process_is_told_to_wait(checkpoint: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    with held_up(checkpoint, made) as first:
        for options in (("--max-shard-size", "1MB", "--dtype", "float32"), ("--dtype", "float32")):
            second = start(checkpoint, made, *options)
            _, err = second.communicate()
            assert second.returncode == 2
            assert "another process is writing it" in err
    assert first.returncode == 0
    assert leftovers(made) == ()


@contextmanager
def held_up(checkpoint: Path, made: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that converts to float32 in files of 1 MB, and waits after the first bytes until this is left."""
    code = f"""
import loadstone, sys, threading
from loadstone.events import BytesMoved

one_by_one, said = threading.Lock(), []  # several files are written at once, each by a thread that tells

def wait(event):
    with one_by_one:
        if isinstance(event, BytesMoved) and not said:
            said.append("waiting")
            print(*said, flush=True)
            sys.stdin.readline()

loadstone.convert({str(checkpoint)!r}, {str(made)!r}, max_shard_size="1MB", dtype="float32", progress=wait)
"""
    first = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    try:
        assert first.stdout.readline() == "waiting\n"
        yield first
    finally:
        first.communicate("go on\n")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for half of the checkpoint."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = NUM_TENSORS * TENSOR_BYTES // 2
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_without_room_is_found_at_once(run: Run, checkpoint: Path, small_disk: Path) -> None:
    code, _, err = run("convert", checkpoint, small_disk / "made")
    assert code == 2
    assert "21.0 MB are to be written, but the disk has" in err
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(
    run: Run, checkpoint: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadstone.checkpoint.new_folder.NewFolder.require", lambda *_: None)
    code, _, err = run("convert", checkpoint, small_disk / "made", "--max-shard-size", "1MB")
    assert code == 2
    assert "the disk was full while it was written (No space left on device" in err
    assert err.count("\n") == 1
    assert list(small_disk.iterdir()) == []
