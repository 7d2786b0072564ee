"""`loadstone.verify`: every fault of every file, by structure and by content, and what cannot be known said so."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import loadstone
from loadstone.checkpoint.manifest import NAME as SUMS
from loadstone.checkpoint.manifest import format_manifest
from loadstone.errors import NotACheckpoint, SourceNotFound
from loadstone.events import BytesMoved
from loadstone.report.verification import Verdict, VerifiedFile
from malformed_base import entry, safetensors

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CONTENTS = {
    ONE: safetensors({"a": entry()}, b"aaaa"),
    TWO: safetensors({"b": entry(), "c": entry(begin=4, end=8)}, b"bbbbcccc"),
    INDEX: json.dumps({"weight_map": {"a": ONE, "b": TWO, "c": TWO}}).encode(),
    "config.json": b'{"model_type": "llama"}',
}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards, their index and a config, all named in SHA256SUMS."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    (folder / SUMS).write_text(format_manifest({name: sha256(content) for name, content in CONTENTS.items()}))
    return folder


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def found(verification: loadstone.verify, name: str) -> VerifiedFile:
    return next(file for file in verification.files if file.name == name)


def test_a_whole_checkpoint_is_in_order(folder: Path) -> None:
    verification = loadstone.verify(folder)
    assert verification.ok
    assert [file.name for file in verification.files] == [ONE, TWO, "config.json", INDEX]
    assert {file.content for file in verification.files} == {Verdict.OK}
    assert found(verification, ONE).structure is Verdict.OK
    assert found(verification, INDEX).structure is Verdict.NOT_CHECKED
    assert verification.num_tensors == 3
    assert verification.hashed_bytes == sum(map(len, CONTENTS.values()))
    assert "all well; 3 tensors in order; content of 4 of 4 files" in str(verification)


@pytest.mark.parametrize("name", [TWO, "config.json"])
def test_a_flipped_bit_is_found_where_a_hash_is_known(folder: Path, name: str) -> None:
    flip(folder / name, 1 if name == "config.json" else -1)
    (folder / "config.json").touch()
    verification = loadstone.verify(folder, structure_only=False)
    assert found(verification, name).content is Verdict.FAULT
    fault = next(fault for fault in verification.faults if "SHA-256" in fault)
    assert str(folder / name) in fault
    assert (
        f"expected SHA-256 {sha256(CONTENTS[name])}, as {SUMS} says, found {sha256((folder / name).read_bytes())}"
        in (fault)
    )
    assert "download or copy the file again" in fault


def test_a_flipped_bit_is_not_found_where_no_hash_is_known_and_that_is_said(folder: Path) -> None:
    (folder / SUMS).unlink()
    flip(folder / TWO)
    verification = loadstone.verify(folder)
    assert verification.ok
    assert found(verification, TWO).content is Verdict.UNKNOWN
    assert found(verification, TWO).said_by == "no hash is known"
    assert "structure only for 2, of which no hash is known" in verification.summary


def test_structure_only_reads_no_content(folder: Path) -> None:
    flip(folder / TWO)
    verification = loadstone.verify(folder, structure_only=True)
    assert verification.ok
    assert verification.hashed_bytes == 0
    assert found(verification, TWO).content is Verdict.NOT_CHECKED


def test_a_file_that_the_manifest_lacks_is_structure_only(folder: Path) -> None:
    (folder / SUMS).write_text(format_manifest({ONE: sha256(CONTENTS[ONE])}))
    verification = loadstone.verify(folder)
    assert verification.ok
    assert found(verification, ONE).content is Verdict.OK
    assert found(verification, TWO).said_by == f"not in {SUMS}"


def test_a_file_that_the_manifest_names_and_is_not_there(folder: Path) -> None:
    (folder / "config.json").unlink()
    verification = loadstone.verify(folder)
    assert found(verification, "config.json").content is Verdict.FAULT
    (fault,) = verification.faults
    assert "config.json: expected a file, found nothing there" in fault


def test_every_fault_of_every_file_is_told(folder: Path) -> None:
    (folder / ONE).write_bytes(CONTENTS[ONE][:-1])
    (folder / TWO).write_bytes(safetensors({"b": entry(), "c": entry(begin=3, end=7)}, b"bbbbcccc"))
    flip(folder / "config.json", -2)
    (folder / "config.json").write_bytes(b"{}")
    verification = loadstone.verify(folder)
    told = "\n".join(verification.faults)
    assert f"{ONE}: expected 4 bytes of tensors after the header, found 3" in told
    assert "tensor 'c': expected its data to begin at 4, found 3: an overlap" in told
    assert told.count("expected SHA-256") == 3
    assert len(verification.faults) == 5
    assert found(verification, ONE).structure is found(verification, TWO).structure is Verdict.FAULT


def test_an_index_that_is_wrong(folder: Path) -> None:
    (folder / SUMS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": ONE, "b": TWO, "ghost": TWO, "spook": ONE}}))
    verification = loadstone.verify(folder)
    assert len(verification.faults) == 2
    assert f"expected tensor 'spook' in {ONE}" in verification.faults[0]
    assert f"expected tensor 'ghost' in {TWO}" in verification.faults[1]


def test_an_index_that_leads_out_of_the_folder(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../secret"}}))
    verification = loadstone.verify(folder)
    assert "expected names of files in its own folder" in verification.faults[0]
    assert verification.num_tensors == 0
    assert found(verification, ONE).content is Verdict.OK


def test_a_missing_shard(folder: Path) -> None:
    (folder / TWO).unlink()
    verification = loadstone.verify(folder)
    assert len(verification.faults) == 1
    assert f"{TWO}: expected a file, found nothing there" in verification.faults[0]
    assert found(verification, ONE).content is Verdict.OK


def test_shards_that_repeat_a_tensor(folder: Path) -> None:
    (folder / TWO).write_bytes(CONTENTS[ONE])
    verification = loadstone.verify([folder / ONE, folder / TWO])
    assert "expected each tensor in one file, found 'a'" in verification.faults[0]


def test_a_shard_that_is_a_pipe_is_named_and_not_waited_for(folder: Path) -> None:
    (folder / TWO).unlink()
    os.mkfifo(folder / TWO)
    verification = loadstone.verify(folder)
    assert "found a pipe, socket or device" in verification.faults[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(folder: Path) -> None:
    (folder / TWO).chmod(0)
    verification = loadstone.verify(folder)
    assert f"{TWO}: expected a readable file; opening it failed: Permission denied" in verification.faults[0]


def test_a_file_that_may_not_be_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.open

    def refuse(path: object, *arguments: int) -> int:
        if str(path).endswith(TWO):
            raise PermissionError(13, "Permission denied")
        return really(path, *arguments)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(os, "open", refuse)
    verification = loadstone.verify(folder)
    assert f"{TWO}: expected a readable file; opening it failed: Permission denied" in verification.faults[0]
    assert len(verification.faults) == 1


def test_a_manifest_that_cannot_be_read_is_a_fault(folder: Path) -> None:
    (folder / SUMS).write_text("nonsense\n")
    verification = loadstone.verify(folder)
    assert "expected a SHA-256 in hex and a file name in line 1" in verification.faults[0]
    assert found(verification, ONE).structure is Verdict.OK


def hub_snapshot(root: Path) -> Path:
    """A cache of org/name: the weights named by SHA-256, the config by git's hash of it."""
    folder = root / "models--org--name"
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    weights, config = CONTENTS[ONE], CONTENTS["config.json"]
    git_hash = hashlib.sha1(b"blob %d\0" % len(config) + config).hexdigest()
    for name, blob, content in (("model.safetensors", sha256(weights), weights), ("config.json", git_hash, config)):
        (folder / "blobs" / blob).write_bytes(content)
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    return snapshot


def test_blobs_of_the_hub_cache_are_known_by_their_names(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path)
    verification = loadstone.verify("org/name", local_files_only=True, cache_dir=tmp_path)
    assert verification.ok
    assert {file.name: file.content for file in verification.files} == {
        "model.safetensors": Verdict.OK,
        "config.json": Verdict.OK,
    }
    assert found(verification, "config.json").said_by == "git SHA-1 from its name in the hub cache"
    for name in ("model.safetensors", "config.json"):
        flip((snapshot / name).resolve())
    verification = loadstone.verify(snapshot)
    assert {file.content for file in verification.files} == {Verdict.FAULT}
    assert any("expected git SHA-1" in fault for fault in verification.faults)


def test_a_blob_that_is_gone(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path)
    (snapshot / "model.safetensors").resolve().unlink()
    verification = loadstone.verify(snapshot)
    assert "model.safetensors: expected a file, found a link to nothing there" in verification.faults[0]


def test_what_convert_wrote_is_verified_whole(llama_folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    loadstone.convert(llama_folder, made, max_shard_size="20kB")
    verification = loadstone.verify(made)
    assert verification.ok
    assert {file.content for file in verification.files} == {Verdict.OK}
    flip(next(made.glob("*.safetensors")))
    assert len(loadstone.verify(made).faults) == 1


def test_a_subfolder_and_a_variant_are_meant(folder: Path) -> None:
    (folder / "part").mkdir()
    (folder / "part" / "model.fp16.safetensors").write_bytes(CONTENTS[ONE][:-1])
    verification = loadstone.verify(folder, subfolder="part", variant="fp16")
    assert [file.name for file in verification.files] == ["model.fp16.safetensors"]
    assert "expected 4 bytes of tensors after the header, found 3" in verification.faults[0]


def test_progress_adds_up_to_all_bytes(folder: Path) -> None:
    events: list[object] = []
    loadstone.verify(folder, progress=events.append, num_threads=3)
    moved = [event for event in events if isinstance(event, BytesMoved)]
    total = sum(map(len, CONTENTS.values()))
    assert [event.done_bytes for event in moved] == sorted(event.done_bytes for event in moved)
    assert {event.total_bytes for event in moved} == {total}
    assert moved[-1].done_bytes == total


def test_what_is_no_checkpoint_at_all_is_raised(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match="found an empty folder"):
        loadstone.verify(tmp_path)
    with pytest.raises(SourceNotFound, match="found no such path"):
        loadstone.verify(tmp_path / "nowhere")


def test_nothing_is_written_and_torch_is_not_imported(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}
    script = f"import sys, loadstone; assert loadstone.verify({str(folder)!r}).ok; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")} == before
