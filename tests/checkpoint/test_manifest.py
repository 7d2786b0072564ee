"""SHA256SUMS: what we write sha256sum accepts, and what it writes we read."""

import hashlib
import shutil
import subprocess

import pytest

from loadstone.checkpoint.manifest import NAME, format_manifest, read_manifest
from loadstone.errors import InvalidHeader

NAMES = ("model.safetensors", "sub/a b.json", "back\\slash", "new\nline")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in NAMES:
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def test_what_is_written_is_read_back(folder):
    sums = {name: hashlib.sha256(name.encode()).hexdigest() for name in NAMES}
    (folder / NAME).write_text(format_manifest(sums))
    assert read_manifest(folder / NAME) == sums


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
@pytest.mark.parametrize("mode", ["--binary", "--text"])
def test_sha256sum_and_we_read_each_other(folder, mode):
    sums = {name: hashlib.sha256(name.encode()).hexdigest() for name in NAMES}
    written = subprocess.run(["sha256sum", mode, *NAMES], cwd=folder, capture_output=True, text=True, check=True)
    (folder / NAME).write_text(written.stdout)
    assert read_manifest(folder / NAME) == sums
    (folder / NAME).write_text(format_manifest(sums))
    subprocess.run(["sha256sum", "--check", "--strict", NAME], cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("0123  model.safetensors", "a SHA-256 in hex and a file name in line 1"),
        ("0" * 64 + "  ../secret", "names inside its folder"),
        ("0" * 64 + "  /etc/passwd", "names inside its folder"),
        ("not a manifest", "a SHA-256 in hex and a file name in line 1"),
    ],
)
def test_other_lines_are_refused(tmp_path, line, found):
    (tmp_path / NAME).write_text(line + "\n")
    with pytest.raises(InvalidHeader, match=found):
        read_manifest(tmp_path / NAME)


def test_a_huge_manifest_is_refused(tmp_path):
    with (tmp_path / NAME).open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(InvalidHeader, match="of hashes"):
        read_manifest(tmp_path / NAME)
