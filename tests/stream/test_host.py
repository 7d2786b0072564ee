from pathlib import Path

import numpy as np
import pytest

from loadstone.checkpoint.values import Checkpoint, CheckpointFile, Format, TensorInfo
from loadstone.errors import TruncatedFile, UnreadableFile
from loadstone.events import ignore
from loadstone.hardware.storage import Storage
from loadstone.stream import host
from loadstone.stream.host import Ahead, FileMaps, fill_for, is_mappable, lost


def info(path: Path, **changes: object) -> TensorInfo:
    values: dict[str, object] = {
        "name": "a",
        "dtype": "bfloat16",
        "shape": (4,),
        "file": path,
        "offset": 0,
        "nbytes": 8,
    }
    return TensorInfo(**{**values, **changes})  # type: ignore[arg-type]


def test_only_plain_aligned_contiguous_tensors_of_the_same_dtype_are_mapped(tmp_path: Path) -> None:
    path = tmp_path / "w"
    assert is_mappable(info(path), "bfloat16")
    assert not is_mappable(info(path), "float32")
    assert not is_mappable(info(path, offset=1), "bfloat16")
    assert not is_mappable(info(path, strides=(2,)), "bfloat16")
    assert not is_mappable(info(path, encoding="Q4_1"), "bfloat16")


def test_a_file_cut_short_after_it_was_opened_is_an_error_not_a_signal(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(bytes(10))
    with pytest.raises(TruncatedFile, match=r"w: a ends at byte 108, but the file now has 10"):
        FileMaps().bytes_of(info(path, offset=100))


def test_mapped_bytes_that_are_lost_are_told_by_what_became_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(bytes(8))
    for change, fault, message in (
        (lambda: None, UnreadableFile, "found: Input/output error"),
        (lambda: path.write_bytes(bytes(5)), TruncatedFile, "a ends at byte 8, but the file now has 5"),
        (path.unlink, UnreadableFile, "found: No such file or directory"),
    ):
        change()
        with pytest.raises(fault, match=message):
            raise lost(info(path))


def test_what_numpy_cannot_cast_is_left_to_torch(tmp_path: Path) -> None:
    assert fill_for(info(tmp_path, strides=(2,)), "bfloat16", np.empty(0, np.uint8)) is None
    assert fill_for(info(tmp_path), "float8_e4m3fn", np.empty(0, np.uint8)) is None


def test_ahead_casts_at_once_and_leaves_experts_to_the_key_map(tmp_path: Path) -> None:
    path = tmp_path / "w"
    words = np.array([0x3F80, 0x4000, 0xC000, 0x0001], np.uint16)
    path.write_bytes(words.tobytes() * 2)
    infos = [info(path), info(path, name="layers.0.experts.3.up", offset=8)]
    checkpoint = Checkpoint(
        format=Format.SAFETENSORS,
        root=tmp_path,
        files=(CheckpointFile(path=path, nbytes=16),),
        tensors={one.name: one for one in infos},
    )
    ahead = Ahead(ignore)
    ahead.begin(checkpoint, lambda _: "float32", decode=True)
    ahead.wait()
    assert list(ahead.decoded) == ["a"]
    assert ahead.decoded["a"].data.view(np.float32).tolist()[:3] == [1.0, 2.0, -2.0]
    assert ahead.read_bytes == 8


def test_what_is_turned_over_is_not_taken_for_the_tensor_of_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(bytes(8))
    infos = [info(path, shape=(2, 2)), info(path, name="turned", shape=(2, 2), strides=(1, 2))]
    checkpoint = Checkpoint(
        format=Format.TORCH_PICKLE,
        root=tmp_path,
        files=(CheckpointFile(path=path, nbytes=8),),
        tensors={one.name: one for one in infos},
    )
    ahead = Ahead(ignore)
    ahead.begin(checkpoint, lambda _: "float32", decode=True)
    ahead.wait()
    assert list(ahead.decoded) == ["a"]
    ahead.close()


def test_ahead_only_brings_mapped_bytes_in_where_nothing_changes(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(bytes(8))
    checkpoint = Checkpoint(
        format=Format.SAFETENSORS,
        root=tmp_path,
        files=(CheckpointFile(path=path, nbytes=8),),
        tensors={"a": info(path)},
    )
    ahead = Ahead(ignore)
    ahead.begin(checkpoint, lambda _: "bfloat16", decode=True)
    ahead.wait()
    assert ahead.decoded == {}
    ahead.close()


def test_files_on_a_network_are_read_and_never_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w"
    path.write_bytes(bytes(range(8)))
    nfs = Storage(file_system="nfs4", network=True)
    monkeypatch.setattr(host, "storages_of", lambda paths: dict.fromkeys(paths, nfs))
    checkpoint = Checkpoint(
        format=Format.SAFETENSORS,
        root=tmp_path,
        files=(CheckpointFile(path=path, nbytes=8),),
        tensors={"a": info(path)},
    )
    ahead = Ahead(ignore)
    ahead.begin(checkpoint, lambda _: "bfloat16", decode=True)
    ahead.wait()
    assert not ahead.is_mappable(info(path), "bfloat16")
    assert ahead.decoded["a"].data.tolist() == list(range(8))
    ahead.close()


def test_ahead_leaves_what_is_to_be_skipped_alone(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(bytes(3 * 100_000))
    infos = [info(path, name=name, offset=100_000 * i, nbytes=100_000, shape=(50_000,)) for i, name in enumerate("abc")]
    checkpoint = Checkpoint(
        format=Format.SAFETENSORS,
        root=tmp_path,
        files=(CheckpointFile(path=path, nbytes=300_000),),
        tensors={one.name: one for one in infos},
    )
    casting = Ahead(ignore)
    casting.begin(checkpoint, lambda _: "float32", decode=True, skip={"b"})
    casting.wait()
    assert (set(casting.decoded), casting.read_bytes) == ({"a", "c"}, 200_000)
    casting.close()
