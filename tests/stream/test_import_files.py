import os
import subprocess
import sys
from pathlib import Path

import pytest

from loadstone.stream import import_files


def test_what_was_imported_is_learnt_once(tmp_path: Path) -> None:
    import torch

    import_files.learn(tmp_path)
    (file,) = (tmp_path / "imports").iterdir()
    paths = file.read_text().splitlines()
    assert any(path.endswith("libtorch_cpu.so") for path in paths)
    assert any("/torch/nn/" in path for path in paths)
    assert torch.__file__ is not None
    file.write_text("kept")
    import_files.learn(tmp_path)
    assert file.read_text() == "kept"


def test_the_sources_that_transformers_reads_are_learnt_before_its_modules(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
read = []
sys.addaudithook(lambda event, of: read.append(of[0]) if event == "open" and str(of[0]).endswith(".py") else None)
import transformers
import transformers.models
from loadstone.stream import import_files
import_files.learn(Path(sys.argv[1]))
models = str(Path(transformers.__file__).parent / "models")
print("\\n".join({path for path in read if path.startswith(models)}))
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    read = set(done.stdout.splitlines())
    learnt = import_files._list_file(tmp_path).read_text().splitlines()
    assert len(read) > 1000
    assert {path for path in learnt if path.endswith(".py")} == read
    places = {path: place for place, path in enumerate(learnt)}
    first_module = min(places[path] for path in learnt if "/transformers/" in path and path.endswith(".pyc"))
    assert max(places[path] for path in read) < first_module


def test_nothing_is_read_where_torch_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_files.learn(tmp_path)
    monkeypatch.setattr(import_files, "_is_cold", lambda _: pytest.fail("looked"))
    import_files.read_ahead(tmp_path)


def test_cold_files_are_read_ahead_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = import_files._list_file(tmp_path)
    file.parent.mkdir()
    modules = [tmp_path / f"module{number}.pyc" for number in range(30)]
    for each in modules:
        each.write_bytes(bytes(10))
    file.write_text("\n".join(map(str, [modules[0], tmp_path / "gone.pyc", *modules[1:]])))
    monkeypatch.delitem(sys.modules, "torch")
    advised: list[int] = []
    monkeypatch.setattr(import_files, "_is_cold", lambda _: True)
    monkeypatch.setattr(
        import_files.os, "posix_fadvise", lambda descriptor, *_: advised.append(os.fstat(descriptor).st_ino)
    )
    import_files.read_ahead(tmp_path).wait()
    assert sorted(advised) == sorted(each.stat().st_ino for each in modules)


def test_lists_of_environments_that_are_no_more_go(tmp_path: Path) -> None:
    folder = tmp_path / "imports"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text("")
        os.utime(folder / f"{number}.txt", (number, number))
    import_files.learn(tmp_path)
    kept = {path.name for path in folder.iterdir()}
    assert len(kept) == 8
    assert import_files._list_file(tmp_path).name in kept
    assert {"19.txt", "13.txt"} < kept


def test_a_list_that_was_never_learnt_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    import_files.read_ahead(tmp_path).wait()


def test_a_file_that_is_gone_is_not_cold(tmp_path: Path) -> None:
    assert not import_files._is_cold(str(tmp_path / "gone"))


def test_a_cached_file_is_warm(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    assert not import_files._is_cold(str(tmp_path / "a"))
