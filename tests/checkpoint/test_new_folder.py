"""A folder that appears whole or not at all."""

import errno
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from loadstone.checkpoint.manifest import read_manifest
from loadstone.checkpoint.new_folder import NewFolder, check_destination, leftovers, new_folder
from loadstone.errors import DestinationBusy, DestinationError, DestinationExists, DiskFull

CONTENT = b"weights"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Killed(BaseException):
    """Stands for a process that ends without cleaning up."""


def make(destination: Path, *, fingerprint: str = "f") -> None:
    with new_folder(destination, fingerprint) as folder:
        (folder.path / "model.safetensors").write_bytes(CONTENT)
        folder.finish("model.safetensors", DIGEST)
        folder.add("sub/config.json", b"{}")
        folder.publish()


def fail(destination: Path, error: BaseException) -> None:
    with new_folder(destination, "f") as folder:
        (folder.path / "a").write_bytes(CONTENT)
        folder.finish("a", DIGEST)
        (folder.path / "b").write_bytes(b"hal")
        raise error


def left_by_a_killed_process(destination: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hidden folder with one finished file and half another one."""
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            fail(destination, Killed())
    (hidden,) = leftovers(destination)
    return hidden


@pytest.mark.parametrize("exists", [False, True])
def test_the_folder_and_its_manifest_appear_at_once(tmp_path: Path, exists: bool) -> None:
    destination = tmp_path / "made"
    if exists:
        destination.mkdir()
    make(destination)
    assert sorted(path.name for path in destination.iterdir()) == ["SHA256SUMS", "model.safetensors", "sub"]
    assert read_manifest(destination / "SHA256SUMS") == {
        "model.safetensors": DIGEST,
        "sub/config.json": hashlib.sha256(b"{}").hexdigest(),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), OSError(errno.EIO, "bad disk")])
def test_a_failure_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        fail(tmp_path / "made", error)
    assert list(tmp_path.iterdir()) == []


def test_ending_without_publishing_leaves_nothing(tmp_path: Path) -> None:
    with new_folder(tmp_path / "made", "f") as folder:
        folder.add("config.json", b"{}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, number: int) -> None:
    with pytest.raises(DiskFull, match=r"made: the disk was full while it was written .* Make room"):
        fail(tmp_path / "made", OSError(number, "No space left on device"))
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_found_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match=r"made: .* PB are to be written, but the disk has .* free"):
        with_folder(tmp_path / "made", lambda folder: folder.require(10**18))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_finished_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = left_by_a_killed_process(tmp_path / "made", monkeypatch)
    inode = (hidden / "a").stat().st_ino
    with new_folder(tmp_path / "made", "f") as folder:
        assert folder.resume({"a": len(CONTENT), "b": 4}) == ("a",)
        assert not (folder.path / "b").exists()
        folder.publish()
    assert (tmp_path / "made" / "a").stat().st_ino == inode
    assert read_manifest(tmp_path / "made" / "SHA256SUMS") == {"a": DIGEST}


@pytest.mark.parametrize("damage", ["size", "record", "no record"])
def test_what_cannot_be_trusted_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    hidden = left_by_a_killed_process(tmp_path / "made", monkeypatch)
    if damage == "size":
        (hidden / "a").write_bytes(CONTENT + b"!")
    elif damage == "record":
        (hidden / ".finished").write_text(DIGEST[:20])
    else:
        (hidden / ".finished").unlink()
    with new_folder(tmp_path / "made", "f") as folder:
        assert folder.resume({"a": len(CONTENT)}) == ()
        assert not (folder.path / "a").exists()


def test_another_source_resumes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = left_by_a_killed_process(tmp_path / "made", monkeypatch)
    with new_folder(tmp_path / "made", "g") as folder:
        assert folder.resume({"a": len(CONTENT)}) == ()
        folder.publish()
    assert leftovers(tmp_path / "made") == (hidden,)


@pytest.mark.parametrize("fingerprint", ["f", "g"])
def test_two_at_once_are_refused(tmp_path: Path, fingerprint: str) -> None:
    with new_folder(tmp_path / "made", "f") as folder:
        folder.add("config.json", b"{}")
        with (
            pytest.raises(DestinationBusy, match="made: another process is writing it"),
            new_folder(tmp_path / "made", fingerprint),
        ):
            pass
        folder.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_one_that_comes_too_late_leaves_nothing(tmp_path: Path) -> None:
    make(tmp_path / "made")
    with pytest.raises(DestinationExists), new_folder(tmp_path / "made", "f"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_what_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    def somebody_else(folder: NewFolder) -> None:
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "mine").touch()
        folder.publish()

    with pytest.raises(DestinationExists, match="an empty folder, found a folder that is not"):
        with_folder(tmp_path / "made", somebody_else)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def with_folder(destination: Path, act: Callable[[NewFolder], None]) -> None:
    with new_folder(destination, "f") as folder:
        act(folder)


def test_destinations_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DestinationExists, match=r"file: .*found a file"):
        check_destination(tmp_path / "file")
    with pytest.raises(DestinationExists, match="found a folder that is not empty"):
        check_destination(tmp_path)
    with pytest.raises(DestinationError, match=r"expected a folder .*nowhere to write into, found none; make it first"):
        check_destination(tmp_path / "nowhere" / "made")
    with pytest.raises(DestinationError, match="a file system is mounted there"):
        check_destination(Path("/proc"))
    (tmp_path / "dangling").symlink_to(tmp_path / "target")
    assert check_destination(tmp_path / "dangling") == tmp_path / "target"


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(DestinationError, match=r"cannot be written \(Permission denied\); choose another"),
        new_folder(tmp_path / "made", "f"),
    ):
        pass
