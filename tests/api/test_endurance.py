"""A thousand passes take no more than a hundred; a process that is killed leaves nothing; threads and models mix."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn

import loadstone

AWAY = {"": "cpu", "model.layers": "disk", "model.embed_tokens": "disk", "lm_head": "disk"}

_CHILD = """
import json, os, sys, threading
import torch
import loadstone
from loadstone.hardware.memory import resident

torch.set_num_threads(1)  # products this small only wait for a second one
model = loadstone.load(sys.argv[1], dtype="float32", device_map=json.loads(sys.argv[2]))

def passes(count):
    with torch.inference_mode():
        for number in range(count):
            model(torch.randint(64, (1, 1 + number % 4)), use_cache=False)

def level():
    memory = resident()
    return {
        "memory": memory.anonymous_bytes + memory.file_bytes,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }

passes(100)
before = level()
passes(900)
print(json.dumps({"before": before, "after": level(), "passes": loadstone.of(model).stats().passes}), flush=True)
while True:
    passes(100)
"""


def files_below(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*") if not path.is_dir()}


def test_a_thousand_passes_do_not_grow_and_a_kill_leaves_nothing(
    llama_folder: Path, caches: Path, tmp_path: Path
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    before, shared = files_below(llama_folder), set(Path("/dev/shm").iterdir())
    environment = os.environ | {"TMPDIR": str(temporary), "HOME": str(tmp_path / "home")}
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(llama_folder), json.dumps(AWAY)],
        stdout=subprocess.PIPE,
        env=environment,
        cwd=tmp_path,
        text=True,
    )
    try:
        assert child.stdout is not None
        told = json.loads(child.stdout.readline())
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert told["passes"] == 1000
    assert told["after"]["memory"] - told["before"]["memory"] < 3_000_000
    assert told["after"]["files"] <= told["before"]["files"]
    assert told["after"]["threads"] <= told["before"]["threads"]
    assert child.returncode == -signal.SIGKILL
    assert files_below(llama_folder) == before
    assert files_below(tmp_path) == set()
    assert {path.relative_to(caches).parts[0] for path in files_below(caches)} <= {"loadstone"}
    assert set(Path("/dev/shm").iterdir()) <= shared


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(tokens).logits
    return found


def test_threads_with_one_model_and_with_two(llama_folder: Path) -> None:
    whole = loadstone.load(llama_folder)
    models: list[nn.Module] = [loadstone.load(llama_folder, device_map=AWAY) for _ in range(2)]
    prompts = [torch.arange(number, number + 9)[None] for number in range(8)]
    expected = [logits(whole, prompt) for prompt in prompts]
    wrong: list[int] = []

    def work(model: nn.Module, numbers: range) -> None:
        found = [(number, logits(model, prompts[number])) for number in [*numbers] * 8]
        wrong.extend(number for number, one in found if not torch.equal(one, expected[number]))

    threads = [threading.Thread(target=work, args=(models[number % 2], range(number % 8, 8, 3))) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_generations_of_several_threads_are_those_of_one_after_the_other(llama_folder: Path) -> None:
    model: Any = loadstone.load(llama_folder, device_map=AWAY)
    prompts = [torch.arange(3 + number, 9 + number)[None] for number in range(4)]
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = [model.generate(prompt, **options) for prompt in prompts]
    found: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        found[number] = model.generate(prompts[number], **options)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [torch.equal(found[number], expected[number]) for number in range(4)] == [True] * 4
