"""Sources that are cut short, replaced or written to while they are converted: a named error, nothing left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import loadstone
from loadstone.errors import FileChanged
from loadstone.events import BytesMoved, Event

# Cut when a part of the tensor whose elements lie apart was gathered, in a process of its own: it may be ended.
CHILD = """
import os, sys
from loadstone.api.convert import convert
from loadstone.errors import TruncatedFile
from loadstone.events import BytesMoved

def cut(event):
    if isinstance(event, BytesMoved) and event.done_bytes > 1 << 20:
        os.truncate(sys.argv[1], 1 << 20)

try:
    convert(sys.argv[1], sys.argv[2], dtype=sys.argv[3] or None, max_shard_size="1MB", progress=cut)
except TruncatedFile as error:
    print(error)
"""


@pytest.mark.parametrize("dtype", ["", "float32"])
def test_a_strided_tensor_that_is_cut_short_meanwhile_is_an_error(tmp_path: Path, dtype: str) -> None:
    source = tmp_path / "m.bin"
    torch.save({"t": torch.ones(1024, 4096, dtype=torch.bfloat16).t()}, source)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, source, tmp_path / "made", dtype], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "m.bin: t ends at byte" in done.stdout
    assert "it was cut short after it was opened" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["m.bin"]


def safetensors_file(folder: Path, llama_folder: Path) -> Path:
    return Path(shutil.copy(llama_folder / "model.safetensors", folder))


def strided_file(folder: Path, _: Path) -> Path:
    torch.save({"t": torch.ones(64, 40).t()}, folder / "m.bin")
    return folder / "m.bin"


def gguf_file(folder: Path, _: Path) -> Path:
    from test_convert_checkpoint import tiny_gguf

    return tiny_gguf(folder)


@pytest.mark.parametrize("build", [safetensors_file, strided_file, gguf_file])
@pytest.mark.parametrize("way", ["replaced", "written to"])
def test_a_source_that_changes_meanwhile_is_an_error(
    tmp_path: Path, llama_folder: Path, build: object, way: str
) -> None:
    source = build(tmp_path, llama_folder)  # type: ignore[operator]

    def change(event: Event) -> None:
        if isinstance(event, BytesMoved):
            if way == "replaced":
                shutil.copy(source, tmp_path / "new")
                (tmp_path / "new").replace(source)
            else:
                os.utime(source, ns=(0, 0))

    with pytest.raises(
        FileChanged, match=r"it was replaced or written to meanwhile \(.* bytes now\); convert it again\.$"
    ):
        loadstone.convert(source, tmp_path / "made", progress=change)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]
