"""What a file lies on, as the kernel tells it."""

import os
from pathlib import Path

import pytest

from loadstone.hardware import mounts, storage
from loadstone.hardware.storage import Storage, disk_under, existing_parent, storage_of, storages_of

MOUNTS = """22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
40 27 0:52 / /data/my\\040models rw - nfs4 server:/export rw
41 27 0:53 / /home/me/remote rw shared:1 - fuse.sshfs me@there:/ rw
42 27 8:17 / /old rw - ext4 /dev/sdb1 rw
43 27 0:60 / /work rw - overlay overlay rw
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine's mounts and disks."""
    (tmp_path / "mountinfo").write_text(MOUNTS)
    for name, rotational in (("pci0/sdb", "1"), ("virtio1/vda", "1")):
        (tmp_path / name / "queue").mkdir(parents=True)
        (tmp_path / name / "queue" / "rotational").write_text(rotational + "\n")
    (tmp_path / "pci0/sdb/sdb1").mkdir()
    (tmp_path / "block").mkdir()
    (tmp_path / "block/8:17").symlink_to(tmp_path / "pci0/sdb/sdb1")
    (tmp_path / "block/254:0").symlink_to(tmp_path / "virtio1/vda")
    monkeypatch.setattr(mounts, "MOUNTINFO", tmp_path / "mountinfo")
    monkeypatch.setattr(storage, "_BLOCK_DEVICES", tmp_path / "block")


@pytest.mark.parametrize(
    ("path", "device", "kind", "network"),
    [
        ("/data/my models/a.safetensors", (0, 52), "nfs4", True),
        ("/home/me/remote/a", (0, 53), "fuse.sshfs", True),
        ("/usr/a", (254, 0), "ext4", False),
        ("/work/a", (0, 99), "overlay", False),  # a device that stands in no line: the longest path
    ],
)
@pytest.mark.usefixtures("machine")
def test_the_file_system_is_that_of_the_mount(path: str, device: tuple[int, int], kind: str, network: bool) -> None:
    found = storage._file_system(Path(path), os.makedev(*device))
    assert found == kind
    assert (storage._NETWORK.fullmatch(found) is not None) == network


@pytest.mark.usefixtures("machine")
def test_a_partition_turns_as_its_disk_and_a_virtual_disk_does_not_tell() -> None:
    assert storage._rotational(os.makedev(8, 17)) is True
    assert storage._rotational(os.makedev(254, 0)) is None
    assert storage._rotational(os.makedev(9, 9)) is None


def test_this_machine_answers(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(9))
    found = storage_of(tmp_path / "a")
    assert not found.network
    assert found.direct_alignment is None or found.direct_alignment % 512 == 0


def test_a_folder_that_one_may_not_look_into_leaves_the_one_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = Path.stat

    def forbidden(path: Path, **options: bool) -> os.stat_result:
        if path.is_relative_to(tmp_path / "private"):
            raise PermissionError(13, "Permission denied")
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", forbidden)
    assert existing_parent(tmp_path / "private" / "cache") == tmp_path
    found = disk_under(tmp_path / "private" / "cache")
    assert found is not None
    assert found.path == tmp_path / "private" / "cache"


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        storage_of(tmp_path / "gone")


def test_many_files_of_one_device_are_asked_about_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.touch()
    asked = []
    monkeypatch.setattr(storage, "_direct_alignment", lambda path: asked.append(path) or 512)
    found = storages_of([*paths, tmp_path / "gone"])
    assert len(asked) == 1
    assert found[paths[0]] == found[paths[1]]
    assert found[tmp_path / "gone"] == Storage()
