"""GGUF headers: what is read, and one test for each way a header can lie."""

import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from gguf_builders import ARRAY, F16, STRING, U32, Gguf, Stored, Typed, text
from loadstone.checkpoint.gguf import read_gguf
from loadstone.checkpoint.values import Format
from loadstone.dtypes import GGML_BLOCKS, GGML_PLAIN
from loadstone.errors import (
    InvalidHeader,
    LoadstoneError,
    MissingShard,
    SourceNotFound,
    TruncatedFile,
    UnsupportedFormat,
)

Q4_1 = 3
ONE = {"a": Stored((4, 8))}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_table_is_that_of_gguf_py() -> None:
    theirs = {int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    blocks = {code: (block.name, block.block_numel, block.block_nbytes) for code, block in GGML_BLOCKS.items()}
    assert blocks.keys() | GGML_PLAIN.keys() >= theirs.keys()
    assert {code: row for code, row in theirs.items() if code not in GGML_PLAIN} == {
        code: row for code, row in blocks.items() if code in theirs
    }
    for code, dtype in GGML_PLAIN.items():
        assert theirs[code][1:] == (1, dtype.bits // 8)


def test_tensors_have_torch_shapes_dtypes_and_places(path: Path) -> None:
    tensors = {"plain": Stored((2, 3)), "half": Stored((5,), F16), "block": Stored((3, 64), Q4_1)}
    checkpoint = read_gguf(Gguf(tensors=tensors).write(path))
    reader = gguf.GGUFReader(path)
    assert checkpoint.format is Format.GGUF
    assert checkpoint.root == path.parent
    assert checkpoint.files[0].nbytes == path.stat().st_size
    assert list(checkpoint.tensors) == ["plain", "half", "block"]
    for theirs in reader.tensors:
        ours = checkpoint.tensors[theirs.name]
        assert (ours.offset, ours.nbytes) == (theirs.data_offset, theirs.n_bytes)
    assert checkpoint.tensors["plain"].shape == (2, 3)
    assert checkpoint.tensors["half"].dtype == "float16"
    block = checkpoint.tensors["block"]
    assert (block.dtype, block.encoding, block.shape) == ("float32", "Q4_1", (3, 64))
    assert checkpoint.config is None


def test_every_type_of_value_is_read_as_gguf_py_wrote_it(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    wanted = {
        "uint8": 200, "int8": -100, "uint16": 60000, "int16": -30000, "uint32": 4000000000, "int32": -2000000000,
        "uint64": 1 << 60, "int64": -(1 << 60), "float32": 0.5, "float64": 0.1, "bool": True, "string": "grün 🦙",
    }  # fmt: skip
    for name, value in wanted.items():
        getattr(writer, f"add_{name}")(f"x.{name}", value)
    arrays = {"x.ints": [1, -2, 3], "x.floats": [0.5, 1.5], "x.bools": [True, False], "x.strings": ["a", "", "ö"]}
    for key, values in arrays.items():
        writer.add_array(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = read_gguf(path).metadata
    assert {key.removeprefix("x."): value for key, value in metadata.items() if key[2:] in wanted} == wanted
    assert {key: metadata[key] for key in arrays} == arrays


def test_nested_arrays_are_read(path: Path) -> None:
    assert read_gguf(Gguf({"x": [[1, 2], [3]]}).write(path)).metadata["x"] == [[1, 2], [3]]


def test_version_2_is_read(path: Path) -> None:
    assert "a" in read_gguf(Gguf(tensors=ONE, version=2).write(path)).tensors


def test_alignment_of_the_file_is_kept(path: Path) -> None:
    tensors = {"a": Stored((3,)), "b": Stored((3,))}
    checkpoint = read_gguf(Gguf({"general.alignment": 64}, tensors, alignment=64).write(path))
    assert all(tensor.offset % 64 == 0 for tensor in checkpoint.tensors.values())
    assert checkpoint.tensors["b"].offset - checkpoint.tensors["a"].offset == 64


def test_header_larger_than_the_first_read_is_read(path: Path) -> None:
    tokens = [f"token {index}" * 3 for index in range(100_000)]
    assert read_gguf(Gguf({"t": tokens, "after": 7}, ONE).write(path)).metadata == {"t": tokens, "after": 7}


def test_rotary_factors_are_kept_beside_the_metadata(path: Path) -> None:
    data = np.array([1, 2, 8], np.float32).tobytes()
    metadata = read_gguf(Gguf(tensors={"rope_freqs.weight": Stored((3,), data=data)}).write(path)).metadata
    assert metadata["rope_freqs.weight"] == [1.0, 2.0, 8.0]


def split(folder: Path, count: int = 2) -> list[Path]:
    paths = [folder / f"m-{index:05d}-of-{count:05d}.gguf" for index in range(1, count + 1)]
    for index, path in enumerate(paths):
        metadata = {"split.count": count, "split.no": index} | ({"general.architecture": "llama"} if not index else {})
        Gguf(metadata, {f"t{index}": Stored((2,))}).write(path)
    return paths


def test_split_model_is_joined_from_any_part(tmp_path: Path) -> None:
    paths = split(tmp_path)
    for path in paths:
        checkpoint = read_gguf(path)
        assert [file.path for file in checkpoint.files] == paths
        assert [tensor.file for tensor in checkpoint.tensors.values()] == paths
        assert checkpoint.metadata["general.architecture"] == "llama"


def test_missing_part_is_named(tmp_path: Path) -> None:
    paths = split(tmp_path, 3)
    paths[1].unlink()
    with pytest.raises(MissingShard, match=r"1 of 3 parts are missing, the first is m-00002-of-00003\.gguf"):
        read_gguf(paths[0])


def test_renamed_part_is_refused(tmp_path: Path) -> None:
    renamed = split(tmp_path)[0].rename(tmp_path / "other.gguf")
    with pytest.raises(InvalidHeader, match=r"one of 2 parts, but its name does not end in -00001-of-00002\.gguf"):
        read_gguf(renamed)


def test_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    paths = split(tmp_path)
    Gguf({"split.count": 2}, {"t0": Stored((2,))}).write(paths[1])
    with pytest.raises(InvalidHeader, match=r"tensor 't0' is in m-00001-of-00002\.gguf too"):
        read_gguf(paths[0])


def test_missing_file_is_named(path: Path) -> None:
    with pytest.raises(SourceNotFound, match=r"model\.gguf: expected a file, found nothing there"):
        read_gguf(path)


def test_other_magic_is_refused(path: Path) -> None:
    with pytest.raises(UnsupportedFormat, match=r'begins with the bytes "GGUF", found b\'GGML\''):
        read_gguf(Gguf(tensors=ONE, magic=b"GGML").write(path))


def test_version_1_is_refused(path: Path) -> None:
    with pytest.raises(UnsupportedFormat, match="GGUF version 1; versions 2 and 3 are read"):
        read_gguf(Gguf(tensors=ONE, version=1).write(path))


def test_big_endian_is_refused(path: Path) -> None:
    with pytest.raises(UnsupportedFormat, match="a big-endian GGUF file; only little-endian ones are read"):
        read_gguf(Gguf(tensors=ONE, version=3 << 24).write(path))


def test_empty_file_is_truncated(path: Path) -> None:
    path.touch()
    with pytest.raises(TruncatedFile, match="ends at byte 0 in the middle of the magic"):
        read_gguf(path)


@pytest.mark.parametrize("lie", [{"num_tensors": 1 << 60}, {"num_pairs": 1 << 60}])
def test_impossible_count_is_refused_at_once(path: Path, lie: dict[str, int]) -> None:
    with pytest.raises(InvalidHeader, match=r"cannot lie in a file of \d+ bytes"):
        read_gguf(Gguf({"k": 1}, ONE, **lie).write(path))


def test_header_cut_anywhere_is_named(path: Path) -> None:
    metadata = {"general.architecture": "llama", "x.list": ["a", "b"], "x.ints": [1, 2, 3], "x.nested": [[1], [2]]}
    whole = Gguf(metadata, {"a": Stored((4, 8)), "b": Stored((64,), Q4_1)}).write(path).read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        if cut >= len(whole) - 24:  # only padding is missing
            read_gguf(path)
            continue
        with pytest.raises((TruncatedFile, InvalidHeader), match=r"model\.gguf"):
            read_gguf(path)


def test_any_flipped_byte_gives_a_named_error_or_a_checkpoint(path: Path) -> None:
    metadata = {"general.architecture": "llama", "x.list": ["a", "b"], "x.nested": [[1], [2]]}
    whole = Gguf(metadata, {"a": Stored((4, 8)), "b": Stored((64,), Q4_1)}).write(path).read_bytes()
    for position in range(len(whole) - 200):
        for flip in (0x01, 0x80, 0xFF):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ flip]) + whole[position + 1 :])
            try:
                read_gguf(path)
            except LoadstoneError as error:
                assert str(path.parent) in str(error)  # noqa: PT017 - most flips raise, some do not


def test_long_string_is_refused_before_it_is_read(path: Path) -> None:
    pair = text("k") + struct.pack("<IQ", STRING, 1 << 40)
    with pytest.raises(InvalidHeader, match=f"the value of 'k' at byte .* would take {1 << 40} bytes"):
        read_gguf(Gguf(extra_pairs=pair, num_extra_pairs=1).write(path))


def test_long_string_in_a_list_is_refused_before_it_is_read(path: Path) -> None:
    pair = text("k") + struct.pack("<IIQ", ARRAY, STRING, 1) + struct.pack("<Q", 1 << 40)
    with pytest.raises(InvalidHeader, match=f"a string of 'k' at byte .* would take {1 << 40} bytes"):
        read_gguf(Gguf(extra_pairs=pair, num_extra_pairs=1).write(path))


def test_long_array_is_refused_before_it_is_built(path: Path) -> None:
    pair = text("k") + struct.pack("<IIQ", ARRAY, U32, 1 << 50)
    with pytest.raises(InvalidHeader, match=f"the array 'k' of {1 << 50} elements does not fit into"):
        read_gguf(Gguf(extra_pairs=pair, num_extra_pairs=1).write(path))


def test_header_beyond_the_limit_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadstone.checkpoint.gguf.MAX_HEADER_BYTES", 1000)
    monkeypatch.setattr("loadstone.checkpoint.gguf.FIRST_READ_BYTES", 500)
    Gguf({"k": "x" * 2000}).write(path)
    with pytest.raises(InvalidHeader, match="the header is larger than 1000 bytes"):
        read_gguf(path)


def test_deep_nesting_is_refused(path: Path) -> None:
    pair = text("k") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 5000
    with pytest.raises(InvalidHeader, match="'k' nests arrays deeper than 4"):
        read_gguf(Gguf(extra_pairs=pair, num_extra_pairs=1).write(path))


def test_unknown_value_type_is_refused(path: Path) -> None:
    with pytest.raises(InvalidHeader, match="the metadata value 'k' has the unknown type 99"):
        read_gguf(Gguf({"k": Typed(99, bytes(64))}).write(path))


def test_duplicate_key_is_refused(path: Path) -> None:
    pair = text("k") + struct.pack("<II", U32, 1)
    with pytest.raises(InvalidHeader, match="the metadata key 'k' stands there twice"):
        read_gguf(Gguf(extra_pairs=pair * 2, num_extra_pairs=2).write(path))


def test_key_that_is_not_utf_8_is_refused(path: Path) -> None:
    pair = text(b"\xff\xfe") + struct.pack("<II", U32, 1)
    with pytest.raises(InvalidHeader, match=r"a metadata key at byte .* is not UTF-8"):
        read_gguf(Gguf(extra_pairs=pair, num_extra_pairs=1).write(path))


def test_duplicate_tensor_is_refused(path: Path) -> None:
    with pytest.raises(InvalidHeader, match="two tensors have the name 'a'"):
        read_gguf(Gguf(tensors=[("a", Stored((2,))), ("a", Stored((2,)))]).write(path))


@pytest.mark.parametrize("alignment", [0, 24, Typed(STRING, text("32"))])
def test_alignment_that_is_no_power_of_two_is_refused(path: Path, alignment: object) -> None:
    with pytest.raises(InvalidHeader, match=r"general\.alignment is .*, expected a power of two"):
        read_gguf(Gguf({"general.alignment": alignment}, ONE).write(path))


def test_five_dimensions_are_refused(path: Path) -> None:
    with pytest.raises(InvalidHeader, match="tensor 'a' has 5 dimensions, more than 4"):
        read_gguf(Gguf(tensors={"a": Stored((1, 1, 1, 1, 1))}).write(path))


def test_unaligned_offset_is_refused(path: Path) -> None:
    with pytest.raises(InvalidHeader, match="the offset 4 of tensor 'a' is not a multiple of 32"):
        read_gguf(Gguf(tensors={"a": Stored((8,), offset=4)}).write(path))


def test_offset_past_the_end_is_truncated(path: Path) -> None:
    with pytest.raises(TruncatedFile, match=r"tensor 'a' takes bytes \d+ to \d+, but the file has \d+ bytes"):
        read_gguf(Gguf(tensors={"a": Stored((8,), offset=1 << 40)}).write(path))


def test_data_cut_short_is_truncated(path: Path) -> None:
    with pytest.raises(TruncatedFile, match="tensor 'b' takes bytes"):
        read_gguf(Gguf(tensors={"a": Stored((8,)), "b": Stored((8,))}).write(path, cut=1))


def test_shape_whose_product_overflows_is_truncated(path: Path) -> None:
    with pytest.raises(TruncatedFile, match="tensor 'a' takes bytes"):
        read_gguf(Gguf(tensors={"a": Stored((1 << 40, 1 << 40, 1 << 40), data=b"")}).write(path))


def test_overlapping_tensors_are_refused(path: Path) -> None:
    tensors = {"a": Stored((64,)), "b": Stored((8,), offset=32)}
    with pytest.raises(InvalidHeader, match="tensors 'a' and 'b' overlap at byte"):
        read_gguf(Gguf(tensors=tensors).write(path))


def test_rows_that_are_not_whole_blocks_are_refused(path: Path) -> None:
    with pytest.raises(InvalidHeader, match=r"shape \(2, 48\) cannot be Q4_1: its rows are not whole blocks of 32"):
        read_gguf(Gguf(tensors={"a": Stored((2, 48), Q4_1)}).write(path))


def test_withdrawn_type_is_refused(path: Path) -> None:
    with pytest.raises(UnsupportedFormat, match="tensor 'a' has the ggml type 4, which is not known"):
        read_gguf(Gguf(tensors={"a": Stored((32,), 4)}).write(path))


def test_large_vocabulary_is_read_in_a_moment(path: Path) -> None:
    Gguf({"t": [f"token{index}" for index in range(200_000)]}).write(path)
    begin = time.perf_counter()
    read_gguf(path)
    assert time.perf_counter() - begin < 2  # 0.08 s on two cores; gguf-py takes about 3
