"""Split GGUF models as gguf-py writes them, opened by any of their names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from gguf_builders import Gguf, Stored
from loadstone.checkpoint.gguf import read_gguf
from loadstone.checkpoint.open import open_checkpoint
from loadstone.errors import InvalidHeader, MissingShard


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    writer = GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    writer.add_block_count(1)
    for index in range(5):
        writer.add_tensor(f"t{index}", np.full((4, 2), index, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = sorted(tmp_path.glob("m-*.gguf"))
    assert len(found) == 3
    return found


@pytest.mark.parametrize(
    "source",
    [
        lambda parts: parts[0].parent,
        lambda parts: parts[0],
        lambda parts: parts[2],
        lambda parts: parts,
        lambda parts: parts[::-1],
        lambda parts: parts[1:2],
    ],
    ids=["folder", "first", "last", "list", "reversed", "list of one"],
)
def test_all_parts_are_one_checkpoint(parts: list[Path], source: Callable[[list[Path]], Path | list[Path]]) -> None:
    checkpoint = open_checkpoint(source(parts))  # type: ignore[arg-type]
    assert [file.path for file in checkpoint.files] == parts
    assert checkpoint.metadata["general.architecture"] == "llama"
    expected = {tensor.name: tensor for part in parts for tensor in GGUFReader(part).tensors}
    assert checkpoint.tensors.keys() == expected.keys()
    for name, info in checkpoint.tensors.items():
        data = info.file.read_bytes()[info.offset : info.offset + info.nbytes]
        assert data == expected[name].data.tobytes()


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_part_is_named(parts: list[Path], missing: int) -> None:
    parts[missing].unlink()
    with pytest.raises(MissingShard, match=f"found 2: number {missing + 1} is missing"):
        open_checkpoint(parts[0].parent)
    with pytest.raises(MissingShard, match=rf"1 of 3 parts are missing, the first is {parts[missing].name}"):
        open_checkpoint(parts[missing - 1])


def test_parts_under_each_others_names_are_refused(parts: list[Path]) -> None:
    second, third = parts[1].read_bytes(), parts[2].read_bytes()
    parts[1].write_bytes(third)
    parts[2].write_bytes(second)
    with pytest.raises(InvalidHeader, match=r"expected part 1 of 3, counted from 0, .*found part 2 of 3 in its header"):
        read_gguf(parts[0])


def test_a_part_of_another_model_is_refused(parts: list[Path]) -> None:
    Gguf({"split.count": 4, "split.no": 1}, {"x": Stored((2,))}).write(parts[1])
    with pytest.raises(InvalidHeader, match="found part 1 of 4 in its header"):
        read_gguf(parts[0])


def test_fewer_tensors_than_promised_are_refused(parts: list[Path]) -> None:
    Gguf({"split.count": 3, "split.no": 1}, {"x": Stored((2,))}).write(parts[1])
    with pytest.raises(InvalidHeader, match="expected 5 tensors in its 3 parts, as the header says, found 4"):
        read_gguf(parts[0])
