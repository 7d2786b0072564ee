"""Files of computed weights: whole or not at all, in turn, and within a limit."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loadstone.checkpoint.write import NewTensor
from loadstone.errors import DestinationError
from loadstone.stream.computed_file import ComputedFiles

WANTED = (
    NewTensor(name="narrow", dtype="bfloat16", shape=(3, 5)),
    NewTensor(name="wide", dtype="float32", shape=(7,)),
    NewTensor(name="none", dtype="float32", shape=(0, 4)),
)
MADE = {
    "narrow": torch.arange(15).view(5, 3).to(torch.bfloat16).T,
    "wide": torch.arange(7).float(),
    "none": torch.empty(0, 4),
}
LIMIT = 10_000


def one_by_one() -> Iterator[dict[str, torch.Tensor]]:
    for name, tensor in MADE.items():
        yield {name: tensor}


def never() -> Iterator[dict[str, torch.Tensor]]:
    pytest.fail("computed again")
    yield {}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


def test_what_is_written_is_read_by_others_too(tmp_path: Path) -> None:
    files = ComputedFiles(tmp_path / "new" / "folder", LIMIT)
    assert files.find("a") is None
    in_use = files.write("a", WANTED, one_by_one())
    found = load_file(in_use.path)
    assert found.keys() == MADE.keys()
    for name, tensor in MADE.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    assert names(in_use.path.parent) == ["a.safetensors"]
    files.write("a", WANTED, never()).close()
    in_use.close()
    in_use.close()


def test_a_fault_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[dict[str, torch.Tensor]]:
        yield {"wide": MADE["wide"]}
        raise KeyError("broken")

    files = ComputedFiles(tmp_path, LIMIT)
    with pytest.raises(KeyError, match="broken"):
        files.write("a", WANTED, broken())
    assert names(tmp_path) == []
    with pytest.raises(RuntimeError, match="none, narrow: told of, but not given"):
        files.write("a", WANTED, iter([{"wide": MADE["wide"]}]))
    assert names(tmp_path) == []


def test_the_longest_unused_go_first_and_those_in_use_stay(tmp_path: Path) -> None:
    size = ComputedFiles(tmp_path, LIMIT).write("probe", WANTED, one_by_one()).path.stat().st_size
    (tmp_path / "probe.safetensors").unlink()
    files = ComputedFiles(tmp_path, 3 * size)
    held = files.write("held", WANTED, one_by_one())
    for number, key in enumerate(("old", "new")):
        files.write(key, WANTED, one_by_one()).close()
        os.utime(tmp_path / f"{key}.safetensors", (number + 1, number + 1))
    os.utime(held.path, (0, 0))
    found = files.find("old")
    assert found is not None  # and so it is the newer one now
    found.close()
    files.write("more", WANTED, one_by_one()).close()
    assert names(tmp_path) == ["held.safetensors", "more.safetensors", "old.safetensors"]
    with pytest.raises(DestinationError, match=r"expected room for .* found a limit of"):
        ComputedFiles(tmp_path, size).write("less", WANTED, one_by_one())
    assert names(tmp_path) == ["held.safetensors"]
    held.close()
    ComputedFiles(tmp_path, size).write("less", WANTED, one_by_one()).close()
    assert names(tmp_path) == ["less.safetensors"]


def test_the_disk_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1 << 30

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    with pytest.raises(DestinationError, match=r"found a limit of .* and .* free on the disk"):
        ComputedFiles(tmp_path, LIMIT).write("a", WANTED, one_by_one())


WRITER = """
    import sys, time, torch
    from pathlib import Path
    from loadstone.checkpoint.write import NewTensor
    from loadstone.stream.computed_file import ComputedFiles

    def values():
        print("begun", flush=True)
        time.sleep(float(sys.argv[2]))
        yield {"t": torch.arange(4.0)}

    wanted = [NewTensor(name="t", dtype="float32", shape=(4,))]
    ComputedFiles(Path(sys.argv[1]), 10_000).write("a", wanted, values())
    print("done", flush=True)
"""


def writer(folder: Path, seconds: float) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_of_two_processes_one_writes_and_the_other_finds_it(tmp_path: Path) -> None:
    both = [writer(tmp_path, 1.0) for _ in range(2)]
    said = sorted(process.communicate(timeout=60)[0] for process in both)
    assert said == ["begun\ndone\n", "done\n"]
    assert names(tmp_path) == ["a.safetensors"]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    process = writer(tmp_path, 60.0)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    deadline = time.monotonic() + 10
    while not names(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    assert [name.rpartition(".")[2] for name in names(tmp_path)] == ["unfinished"]
    assert ComputedFiles(tmp_path, LIMIT).find("a") is None
    ComputedFiles(tmp_path, LIMIT).write("b", WANTED, one_by_one()).close()
    assert names(tmp_path) == ["b.safetensors"]
