"""Units come from their files as they should lie in memory: cast, decoded, rearranged, and past the page cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadstone.architecture.gguf_layouts import (
    AddConstant,
    Chain,
    GroupQkv,
    Layout,
    LogNegate,
    Transpose,
    UnpermuteHeads,
)
from loadstone.architecture.keymap import Assignment, Part, Target
from loadstone.checkpoint.files import open_regular
from loadstone.checkpoint.values import Checkpoint, CheckpointFile, Format, TensorInfo
from loadstone.errors import FileChanged, TruncatedFile
from loadstone.hardware.pages import anonymous
from loadstone.stream.convert import float32_to_bfloat16
from loadstone.stream.filler import slot_sizes
from loadstone.stream.from_files import FromFiles
from loadstone.stream.memory import cached_part, map_file
from loadstone.stream.read import Reader
from loadstone.stream.refill import Refill, Wanted, can_refill
from loadstone.stream.rows import Rows, has_rows
from loadstone.stream.source import ALIGNMENT

Array = np.ndarray[Any, Any]
RANDOM = np.random.default_rng(0)


class Files:
    """A weight file that is written tensor by tensor."""

    def __init__(self, path: Path, begin: int = 0) -> None:
        self.path = path
        self.content = bytearray(begin)
        self.tensors: dict[str, TensorInfo] = {}

    def add(self, name: str, array: Array, dtype: str, *, gap: int = 0, **more: Any) -> None:
        self.content += bytes(gap)
        facts = {"shape": array.shape, "dtype": dtype, **more}
        self.tensors[name] = TensorInfo(
            name=name, file=self.path, offset=len(self.content), nbytes=array.nbytes, **facts
        )
        self.content += array.tobytes()

    def write(self) -> Checkpoint:
        self.path.write_bytes(self.content)
        with open_regular(self.path) as file:
            version, nbytes = file.version, file.nbytes
        return Checkpoint(
            format=Format.SAFETENSORS,
            root=self.path.parent,
            files=(CheckpointFile(path=self.path, nbytes=nbytes, version=version),),
            tensors=self.tensors,
        )


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "weights")


def wanted(fqn: str, shape: tuple[int, ...], dtype: str, *parts: Part) -> Wanted:
    return Wanted(
        assignment=Assignment(target=fqn, parts=parts or (Part(source=fqn),)), target=Target(shape=shape, dtype=dtype)
    )


def filled(refill: Refill, unit: str = "unit") -> dict[str, Array]:
    """The unit's parameters as bytes, read twice into a slot that is not clean."""
    recipe = refill.recipes[unit]
    slot = anonymous(max(1, recipe.nbytes))
    found: list[dict[str, Array]] = []
    for _ in range(2):
        slot[:] = 0xAA
        refill.fill(unit, slot).wait()
        found.append({place.fqn: slot[place.begin :].copy() for place in recipe.places})
    assert all(np.array_equal(found[0][fqn], found[1][fqn]) for fqn in found[0])
    return found[1]


def refilled(checkpoint: Checkpoint, *units: Wanted) -> dict[str, Array]:
    refill = Refill({"unit": units}, checkpoint)
    try:
        return filled(refill)
    finally:
        refill.close()


def words(count: int) -> Array:
    return RANDOM.integers(0, 1 << 15, count, dtype=np.uint16) & 0xBFFF  # no infinities among them as bfloat16


def floats(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


def as_bfloat16(array: Array) -> Array:
    made = np.empty(array.size * 2, np.uint8)
    float32_to_bfloat16(np.ascontiguousarray(array).reshape(-1).view(np.uint8), made)
    return made


def test_what_only_moves_is_read_in_one_go_to_blocks_like_the_files(files: Files) -> None:
    files.content = bytearray(1000)
    arrays = {name: words(count) for name, count in (("a", 5000), ("b", 300_000), ("c", 7))}
    for name, array in arrays.items():
        files.add(name, array, "bfloat16", gap=4 if name == "c" else 0)
    checkpoint = files.write()
    refill = Refill({"unit": [wanted(name, array.shape, "bfloat16") for name, array in arrays.items()]}, checkpoint)
    for place in refill.recipes["unit"].places:
        assert place.begin % ALIGNMENT == checkpoint.tensors[place.fqn].offset % ALIGNMENT
    prepared, _ = refill.recipes["unit"].prepare(anonymous(refill.recipes["unit"].nbytes))
    assert len(prepared.pieces) == 1
    for fqn, data in filled(refill).items():
        assert data[: arrays[fqn].nbytes].tobytes() == arrays[fqn].tobytes()
    refill.close()


def test_neighbours_that_are_cast_alike_are_read_as_one(files: Files) -> None:
    arrays = {name: words(64 * count) for name, count in (("a", 10), ("b", 300), ("c", 1))}
    for name, array in arrays.items():
        files.add(name, array, "bfloat16")
    units = [wanted(name, array.shape, "float32") for name, array in arrays.items()]
    refill = Refill({"unit": units}, files.write())
    prepared, _ = refill.recipes["unit"].prepare(anonymous(refill.recipes["unit"].nbytes))
    assert len(prepared.pieces) == 1
    for fqn, data in filled(refill).items():
        expected = arrays[fqn].astype(np.uint32) << 16
        assert np.array_equal(data[: expected.nbytes].view(np.uint32), expected)
    refill.close()


def test_what_lies_askew_is_moved_to_where_it_can_be_used(files: Files) -> None:
    files.content = bytearray(3)
    array = words(3000)
    files.add("a", array, "bfloat16")
    for dtype, expected in (("bfloat16", array), ("float32", array.astype(np.uint32) << 16)):
        data = refilled(files.write(), wanted("a", array.shape, dtype))["a"]
        assert data.ctypes.data % 4 == 0
        assert np.array_equal(data[: expected.nbytes].view(expected.dtype), expected)


def test_experts_become_slices_of_one_tensor(files: Files) -> None:
    experts = [words(6 * 8).reshape(6, 8) for _ in range(4)]
    for number in (2, 0, 3, 1):
        files.add(f"e{number}", experts[number], "bfloat16", gap=10)
    parts = [Part(source=f"e{number}", start=48 * number, shape=(6, 8)) for number in range(4)]
    data = refilled(files.write(), wanted("experts", (4, 6, 8), "bfloat16", *parts))["experts"]
    assert np.array_equal(data[: 2 * 192].view(np.uint16).reshape(4, 6, 8), np.stack(experts))


LAYOUTS: Mapping[str, tuple[Layout, Callable[[Array], Array]]] = {
    "heads": (UnpermuteHeads(num_heads=2), lambda a: a.reshape(2, 4, 2, 24).swapaxes(1, 2).reshape(16, 24)),
    "qkv": (
        GroupQkv(num_heads=4, num_kv_heads=2),
        lambda a: a[[0, 1, 2, 3, 8, 9, 12, 13, 4, 5, 6, 7, 10, 11, 14, 15]],
    ),
    "transposed": (Transpose(), np.transpose),
    "norm": (AddConstant(value=-1.0), lambda a: a + np.float32(-1)),
    "chain": (
        Chain(layouts=(AddConstant(value=-9.0), LogNegate(), Transpose())),
        lambda a: np.log(-(a + np.float32(-9))).T,
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_undone_in_float32(files: Files, name: str, dtype: str) -> None:
    layout, undo = LAYOUTS[name]
    array = floats(16, 24)
    files.add("a", array, "float32")
    expected = np.ascontiguousarray(undo(array))
    unit = wanted("w", expected.shape, dtype, Part(source="a", layout=layout))
    data = refilled(files.write(), unit)["w"]
    made = expected.view(np.uint8).reshape(-1) if dtype == "float32" else as_bfloat16(expected)
    assert np.array_equal(data[: made.size], made)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_halves_are_put_side_by_side(files: Files, dtype: str) -> None:
    halves = [floats(3, 5), floats(3, 5)]
    for number, half in enumerate(halves):
        files.add(f"h{number}", half, "float32")
    slices = [(slice(None), slice(number, 10, 2)) for number in range(2)]
    parts = [Part(source=f"h{number}", index=slices[number]) for number in range(2)]
    data = refilled(files.write(), wanted("w", (3, 10), dtype, *parts))["w"]
    expected = np.stack(halves, axis=-1).reshape(3, 10)
    made = expected.reshape(-1).view(np.uint8) if dtype == "float32" else as_bfloat16(expected)
    assert np.array_equal(data[: made.size], made)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_views_of_a_pickle_are_gathered(files: Files, dtype: str) -> None:
    array = floats(6, 4)
    files.add("a", array, "float32", shape=(4, 6), strides=(1, 4))
    data = refilled(files.write(), wanted("a", (4, 6), dtype))["a"]
    expected = np.ascontiguousarray(array.T)
    made = expected.reshape(-1).view(np.uint8) if dtype == "float32" else as_bfloat16(expected)
    assert np.array_equal(data[: made.size], made)


def test_what_numpy_cannot_cast_cannot_be_refilled(files: Files) -> None:
    files.add("a", np.zeros(4, np.uint8), "float8_e4m3fn")
    assert can_refill(wanted("a", (4,), "float8_e4m3fn"), files.tensors)
    assert not can_refill(wanted("a", (4,), "int32"), files.tensors)
    assert not can_refill(wanted("a", (4,), "int32", Part(source="a", layout=Transpose())), files.tensors)


def test_a_fill_that_was_given_up_leaves_the_next_whole(files: Files) -> None:
    array = floats(2048, 512)
    files.add("a", array, "float32")
    unit = wanted("w", (512, 2048), "float32", Part(source="a", layout=Transpose()))
    refill = Refill({"unit": [unit]}, files.write())
    slot = anonymous(refill.recipes["unit"].nbytes)
    for _ in range(5):
        refill.fill("unit", slot).cancel()
    refill.fill("unit", slot).wait()
    begin = refill.recipes["unit"].places[0].begin
    assert np.array_equal(slot[begin : begin + array.nbytes].view(np.float32).reshape(512, 2048), array.T)
    refill.close()


def test_nothing_is_prepared_or_probed_twice(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    array = words(5000)
    files.add("a", array, "bfloat16")
    refill = Refill({"unit": [wanted("a", array.shape, "bfloat16")]}, files.write())
    slot = anonymous(refill.recipes["unit"].nbytes)
    refill.fill("unit", slot).wait()
    for name in (
        "loadstone.stream.refill.prepare",
        "loadstone.stream.read.manners_of",
        "loadstone.stream.source.Source",
    ):
        monkeypatch.setattr(name, None)
    refill.fill("unit", slot).wait()
    refill.close()


def test_reads_go_past_the_page_cache(files: Files) -> None:
    array = words(2_000_000)
    files.add("a", array, "bfloat16")
    checkpoint = files.write()
    with files.path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_part(map_file(files.path)):
        pytest.skip("a file system in memory")
    refill = Refill({"unit": [wanted("a", array.shape, "bfloat16")]}, checkpoint)
    if not refill.files.source(files.path).is_direct:
        pytest.skip("a file system without direct reads")
    filled(refill)
    refill.close()
    assert cached_part(map_file(files.path)) == 0


def test_a_changed_file_is_named(files: Files) -> None:
    array = words(50_000)
    files.add("a", array, "bfloat16")
    refill = Refill({"unit": [wanted("a", array.shape, "bfloat16")]}, files.write())
    refill.check("unit")
    os.truncate(files.path, 60_000)
    with pytest.raises(TruncatedFile, match="weights: expected"):
        refill.fill("unit", anonymous(refill.recipes["unit"].nbytes)).wait()
    with pytest.raises(FileChanged, match="weights: expected the file of 100,000 bytes"):
        refill.check("unit")
    refill.close()


def test_any_units_find_room_at_once(files: Files) -> None:
    for name, count in (("small", 100), ("large", 9000), ("middle", 3000)):
        files.add(name, words(count), "bfloat16")
    units = {name: [wanted(name, info.shape, "float32")] for name, info in files.tensors.items()}
    refill = Refill(units, files.write())
    assert slot_sizes(FromFiles(refill), refill.recipes, 2) == [36_000, 12_000]
    assert slot_sizes(FromFiles(refill), refill.recipes, 9) == [36_000, 12_000, 400]
    refill.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_only_rows_that_are_looked_up_are_read(files: Files, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = words(1000 * 48).reshape(1000, 48)
    files.add("w", table, "bfloat16")
    checkpoint = files.write()
    unit = wanted("w", table.shape, dtype)
    assert has_rows(unit, checkpoint.tensors)
    refill = Refill({}, checkpoint)
    rows = Rows(unit, checkpoint.tensors["w"], refill)
    batches: list[int] = []
    real = Reader.repeat
    monkeypatch.setattr(
        Reader,
        "repeat",
        lambda self, prepared, *a, **k: (batches.append(len(prepared.pieces)), real(self, prepared, *a, **k))[1],
    )
    ids = np.array([[999, 3, 4], [5, 3, 700]])
    rows.bring(ids)
    rows.bring(np.array([4, 700, -1, 1000]))  # known ones, and numbers that are none
    assert (rows.read_bytes, batches) == (5 * 96, [3])  # 3 to 5 in one go
    expected = table if dtype == "bfloat16" else table.astype(np.uint32) << 16
    found = rows.data.view(expected.dtype).reshape(table.shape)
    assert np.array_equal(found[ids], expected[ids])
    assert not found[6:700].any()
    refill.close()


def test_a_row_does_not_wait_for_what_the_readers_threads_are_in_the_midst_of(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = RANDOM.integers(0, 2**16, (64, 96), dtype=np.uint16)
    files.add("w", table, "bfloat16")
    checkpoint = files.write()
    refill = Refill({}, checkpoint)
    rows = Rows(wanted("w", table.shape, "bfloat16"), checkpoint.tensors["w"], refill)
    monkeypatch.setattr(refill.reader, "repeat", lambda *_, **__: pytest.fail("the threads were asked"))
    rows.bring(np.array([7, 40]))
    found = rows.data.view(np.uint16).reshape(table.shape)
    assert np.array_equal(found[[7, 40]], table[[7, 40]])
    assert rows.read_bytes == 2 * 2 * 96
    refill.close()


def test_rows_are_dropped_when_they_are_many(files: Files) -> None:
    table = words(2000 * 2048).reshape(2000, 2048)
    files.add("w", table, "bfloat16")
    checkpoint = files.write()
    refill = Refill({}, checkpoint)
    rows = Rows(wanted("w", table.shape, "bfloat16"), checkpoint.tensors["w"], refill)
    rows.bring(np.arange(100))
    rows.trim()
    assert rows.data[:4096].any()
    rows.bring(np.arange(2000))
    rows.trim()
    assert not rows.data.any()
    rows.bring(np.array([7]))
    assert np.array_equal(rows.data.view(np.uint16).reshape(table.shape)[7], table[7])
    refill.close()


def test_rows_that_split_blocks_or_are_rearranged_cannot_be_looked_up(files: Files) -> None:
    files.add("q", np.zeros(34 * 3, np.uint8), "float32", shape=(2, 48), encoding="Q8_0")
    files.add("w", floats(4, 4), "float32")
    assert not has_rows(wanted("q", (2, 48), "float32"), files.tensors)
    assert not has_rows(wanted("w", (4, 4), "float32", Part(source="w", layout=Transpose())), files.tensors)
    assert not has_rows(wanted("w", (16,), "float32"), files.tensors)
