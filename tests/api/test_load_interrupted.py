"""What happens to a file while it is loaded: a named fault, never a signal or wrong numbers, and life goes on."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import loadstone
from loadstone.errors import FileChanged, SourceError, TruncatedFile
from loadstone.events import Event, StageFinished

Damage = Callable[[Path], None]


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def remove(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    other = path.with_suffix(".other")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)


def replace_with_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def num_open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


DAMAGES: tuple[Damage, ...] = (cut_short, remove, replace, replace_with_a_pipe)


@pytest.fixture
def folders(llama_folder: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies of a model in every form that takes another way through the engine."""

    def make(form: str) -> Path:
        folder = tmp_path / form
        shutil.copytree(llama_folder, folder)
        if form == "pickle":
            from safetensors.torch import load_file

            torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
        return folder

    return make


@pytest.mark.parametrize("stage", ["headers", "skeleton", "tensors"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("form", ["safetensors", "pickle"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_while_loading_is_a_named_fault(
    folders: Callable[[str], Path], damage: Damage, form: str, dtype: str, stage: str
) -> None:
    folder = folders(form)
    path = next(path for path in folder.iterdir() if path.name in {"model.safetensors", "pytorch_model.bin"})

    def interfere(event: Event) -> None:
        if isinstance(event, StageFinished) and event.stage == stage:
            damage(path)

    with pytest.raises((SourceError, TruncatedFile), match=path.name) as found:
        loadstone.load(folder, dtype=dtype, progress=interfere)
    assert "\n" not in str(found.value)
    if damage is replace and stage == "tensors":
        assert type(found.value) is FileChanged
        assert str(found.value).endswith("bytes now); load it again.")


def test_the_process_goes_on_after_a_fault(llama_folder: Path, llama_copy: Path) -> None:
    def interfere(event: Event) -> None:
        if isinstance(event, StageFinished) and event.stage == "headers":
            cut_short(llama_copy / "model.safetensors")

    loadstone.load(llama_folder, dtype="float32")  # what is opened once stays open: code, caches
    threads, files = threading.active_count(), num_open_files()
    for _ in range(3):
        shutil.copy(llama_folder / "model.safetensors", llama_copy)
        with pytest.raises(TruncatedFile):
            loadstone.load(llama_copy, dtype="float32", progress=interfere)
    model = loadstone.load(llama_folder, dtype="float32")
    assert torch.isfinite(model(torch.arange(4)[None]).logits).all()
    del model
    assert num_open_files() <= files
    for thread in threading.enumerate():
        if thread.name.startswith("loadstone"):
            thread.join(5)
    assert threading.active_count() <= threads


_AS_NOBODY = """
import os, sys
from pathlib import Path
import loadstone
from loadstone.events import StageFinished

folder, dtype = Path(sys.argv[1]), sys.argv[2]
import loadstone.api.assemble, loadstone.architecture.transformers_model

def interfere(event):
    if isinstance(event, StageFinished) and event.stage == "headers":
        (folder / "model.safetensors").chmod(0)
        os.seteuid(65534)

try:
    loadstone.load(folder, dtype=dtype, progress=interfere)
except loadstone.LoadstoneError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(not hasattr(os, "seteuid") or os.geteuid() != 0, reason="only root can give its rights away")
def test_a_permission_revoked_while_loading_is_a_named_fault(llama_copy: Path) -> None:
    for folder in (llama_copy, *llama_copy.parents):
        if folder != Path("/"):
            folder.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, str(llama_copy), "float32"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(("UnreadableFile", "NotACheckpoint"))
    assert "Permission denied" in done.stdout


_UNTIL_KILLED = """
import os, signal, sys
import loadstone
from loadstone.events import StageFinished

def die(event):
    if isinstance(event, StageFinished) and event.stage == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)

loadstone.load(sys.argv[1], dtype="float32", progress=die)
"""


@pytest.mark.parametrize("stage", ["headers", "tensors", "page in"])
def test_a_load_that_is_killed_leaves_nothing_behind(llama_copy: Path, caches: Path, stage: str) -> None:
    before = {path: path.read_bytes() for path in llama_copy.iterdir()}
    done = subprocess.run([sys.executable, "-c", _UNTIL_KILLED, str(llama_copy), stage], check=False)
    assert done.returncode == -signal.SIGKILL
    assert {path: path.read_bytes() for path in llama_copy.iterdir()} == before
    assert not [path for path in caches.rglob("*") if path.is_file()]
