"""Every dtype and format beside the reference readers, bit by bit, on generated files and through every way of reading.

The references are safetensors, `torch.load` and gguf-py; what they write is read by them and by the engine.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import loadstone
from loadstone.checkpoint.open import open_checkpoint
from loadstone.checkpoint.packed import in_torch_pairs
from loadstone.checkpoint.values import Checkpoint, TensorInfo
from loadstone.dtypes import DTYPES, GGML_BLOCKS, GGML_PLAIN
from loadstone.events import ignore
from loadstone.hardware.storage import Storage
from loadstone.stream import host, read
from loadstone.stream.host import Ahead
from loadstone.stream.materialize import Materializer
from loadstone.stream.source import Manner, Mode

Tensors = dict[str, torch.Tensor]


class Way(Enum):
    """How bytes come out of a file."""

    MAPPED = "used where they lie"
    BUFFERED = "read through the page cache"
    DIRECT = "read past the page cache"


MODES = {Way.BUFFERED: Mode.BUFFERED, Way.DIRECT: Mode.DIRECT}
# What torch counts in bytes, and safetensors has too.
WHOLE = tuple(name for name, dtype in DTYPES.items() if dtype.bits >= 8 and hasattr(torch, name))
IN_SAFETENSORS = tuple(name for name in WHOLE if name != "complex128")
FLOATS = tuple(name for name in WHOLE if name.startswith(("float", "bfloat")) and not name.startswith("float4"))
CAST_TO = ("float16", "bfloat16", "float32", "float64")
# torch can write other dtypes to a legacy file, and then not read them.
LEGACY = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "complex64")
BLOCKS = {block.name: block for block in GGML_BLOCKS.values() if block.name not in ("Q8_1", "Q8_K", "Q1_0")}

# What fails is small already; making it smaller takes minutes.
many = partial(settings, deadline=None, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate))


@contextmanager
def forced(way: Way) -> Iterator[None]:
    """Let the engine read in one way, whatever the file lies on."""
    with pytest.MonkeyPatch.context() as patch:
        if way is not Way.MAPPED:
            manner = Manner(mode=MODES[way], num_threads=2, reason="a test asks for it")
            # Files on a network are never mapped.
            remote = Storage(file_system="nfs4", network=True)
            patch.setattr(host, "storages_of", lambda paths: dict.fromkeys(paths, remote))
            patch.setattr(read, "manners_of", lambda paths: dict.fromkeys(paths, manner))
        yield


def engine(checkpoint: Checkpoint, way: Way, dtype: Callable[[TensorInfo], str] = lambda info: info.dtype) -> Tensors:
    """Every tensor of a checkpoint as our engine reads it."""
    checkpoint = in_torch_pairs(checkpoint)
    with forced(way):
        ahead = Ahead(ignore)
        try:
            if way is not Way.MAPPED:
                ahead.begin(checkpoint, dtype, decode=True)
                ahead.wait()
            materializer = Materializer(checkpoint, ahead, torch.device("cpu"))
            return {name: materializer.source(name, dtype(info)).clone() for name, info in checkpoint.tensors.items()}
        finally:
            ahead.close()


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).numpy().tobytes()


def assert_same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert (name, ours[name].dtype, ours[name].shape) == (name, expected.dtype, expected.shape)
        assert bits(ours[name]) == bits(expected), name


def assert_same_numbers(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """The same bits, but for what a NaN carries: in torch it differs from path to path."""
    nan = torch.isnan(theirs)
    assert torch.equal(torch.isnan(ours), nan)
    assert bits(ours[~nan]) == bits(theirs[~nan])


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any bits at all: NaNs, infinities and subnormal numbers too."""
    if 0 in shape:
        return torch.empty(shape, dtype=getattr(torch, dtype))
    width = max(1, DTYPES[dtype].bits // 8)
    raw = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)) * width, dtype=np.uint8)
    if dtype == "bool":
        raw &= 1
    return torch.from_numpy(raw).view(getattr(torch, dtype)).view(shape)


names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
seeds = st.integers(0, 2**32 - 1)


def tensors_of(dtypes: tuple[str, ...], shapes: st.SearchStrategy[tuple[int, ...]] = shapes) -> Any:
    one = st.builds(random_tensor, st.sampled_from(dtypes), shapes, seeds)
    return st.dictionaries(names, one, min_size=1, max_size=6)


ways = st.sampled_from(list(Way))


@many(max_examples=60)
@given(tensors=tensors_of(IN_SAFETENSORS), way=ways)
def test_safetensors_of_any_dtype_has_the_bits_of_safetensors(tensors: Tensors, way: Way) -> None:
    # A packed dtype has no last dimension to unpack.
    tensors = {name: t for name, t in tensors.items() if t.dim() or t.dtype != torch.float4_e2m1fn_x2}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        safetensors.torch.save_file(tensors, path)
        assert_same(engine(open_checkpoint(path), way), safetensors.torch.load_file(path))


@many(max_examples=20)
@given(shards=st.lists(tensors_of(("float32", "bfloat16", "int64")), min_size=2, max_size=4), way=ways)
def test_sharded_safetensors_have_the_bits_of_safetensors(shards: list[Tensors], way: Way) -> None:
    with tempfile.TemporaryDirectory() as folder:
        weight_map, expected = {}, {}
        for number, shard in enumerate(shards):
            file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
            own = {f"{number}.{name}": tensor for name, tensor in shard.items()}
            safetensors.torch.save_file(own, Path(folder, file))
            weight_map |= dict.fromkeys(own, file)
            with safetensors.safe_open(Path(folder, file), "pt") as opened:
                expected |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        index = {"metadata": {}, "weight_map": weight_map}
        Path(folder, "model.safetensors.index.json").write_text(json.dumps(index))
        assert_same(engine(open_checkpoint(folder), way), expected)


def view_of(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """What people save: parts and turns of one storage."""
    views: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "whole": lambda t: t,
        "transposed": lambda t: t.permute(tuple(reversed(range(t.dim())))),
        "flat": lambda t: t.reshape(-1),
        "every second": lambda t: t.reshape(-1)[1::2],
        "first": lambda t: t.reshape(-1)[:1],
        "scalar": lambda t: t.reshape(-1)[-1] if t.numel() else t,
        "rows": lambda t: t[1:] if t.dim() else t,
        "last columns": lambda t: t[..., 1:] if t.dim() else t,
        "expanded": lambda t: t.unsqueeze(0).expand(3, *t.shape),
    }
    return views[kind](tensor)


KINDS = ("whole", "transposed", "flat", "every second", "first", "scalar", "rows", "last columns", "expanded")


@many(max_examples=80)
@given(
    bases=st.data(),
    zipped=st.booleans(),
    wrapper=st.sampled_from([None, "state_dict", "model"]),
    way=ways,
)
def test_pickles_of_views_have_the_bits_of_torch_load(
    bases: st.DataObject, zipped: bool, wrapper: str | None, way: Way
) -> None:
    drawn = bases.draw(tensors_of(WHOLE if zipped else LEGACY))
    saved = {
        f"{name}.{kind}": view_of(tensor, kind)
        for name, tensor in drawn.items()
        for kind in bases.draw(st.sets(st.sampled_from(KINDS), min_size=1, max_size=3))
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pytorch_model.bin")
        whole = saved if wrapper is None else {wrapper: saved, "epoch": 3}
        torch.save(whole, path, _use_new_zipfile_serialization=zipped)
        expected = torch.load(path, weights_only=True)
        assert_same(engine(open_checkpoint(path), way), expected if wrapper is None else expected[wrapper])


def write_gguf(path: Path, tensors: Mapping[str, tuple[str, np.ndarray[Any, Any]]]) -> None:
    writer = GGUFWriter(path, "llama")
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_py(path: Path) -> Tensors:
    """What gguf-py makes of a file: blocks and bfloat16 decoded, the rest as stored."""
    found = {}
    for tensor in GGUFReader(path).tensors:
        data = tensor.data
        if tensor.tensor_type.name in BLOCKS or tensor.tensor_type.name == "BF16":
            with np.errstate(all="ignore"):
                data = gguf.dequantize(data, tensor.tensor_type)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        found[tensor.name] = torch.from_numpy(np.array(data)).view(shape)
    return found


PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "BF16": "u1"}


@st.composite
def gguf_tensors(draw: st.DrawFn) -> dict[str, tuple[str, np.ndarray[Any, Any]]]:
    made = {}
    for name in draw(st.lists(names, min_size=1, max_size=6, unique=True)):
        kind = draw(st.sampled_from([*BLOCKS, *PLAIN]))
        rows = draw(st.lists(st.integers(1, 3), max_size=2))
        count = draw(st.integers(1, 4))
        random = np.random.default_rng(draw(seeds))
        if kind in BLOCKS:
            count *= BLOCKS[kind].block_nbytes
        elif kind == "BF16":
            count *= 2
        width = np.dtype(PLAIN.get(kind, "u1")).itemsize
        raw = random.integers(0, 256, (*rows, count * width), dtype=np.uint8)
        made[name] = (kind, raw.view(PLAIN.get(kind, "u1")))
    return made


@many(max_examples=80)
@given(tensors=gguf_tensors(), way=ways)
def test_gguf_of_any_format_has_the_bits_of_gguf_py(
    tensors: dict[str, tuple[str, np.ndarray[Any, Any]]], way: Way
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        write_gguf(path, tensors)
        # gguf-py knows no bfloat16 but as float32.
        ours = engine(open_checkpoint(path), way, lambda info: info.dtype.replace("bfloat16", "float32"))
        assert_same(ours, gguf_py(path))


def test_every_code_of_gguf_is_among_those_compared() -> None:
    names_of_codes = {GGMLQuantizationType(code).name for code in (*GGML_BLOCKS, *GGML_PLAIN)}
    assert names_of_codes - {*BLOCKS, *PLAIN} == {"Q8_1", "Q8_K", "Q1_0"}


@pytest.mark.parametrize("way", Way)
@pytest.mark.parametrize("wanted", CAST_TO)
def test_every_cast_has_the_numbers_of_torch(tmp_path: Path, way: Way, wanted: str) -> None:
    path = tmp_path / "model.safetensors"
    stored = {name: random_tensor(name, (8, 1031), 7) for name in FLOATS}
    safetensors.torch.save_file(stored, path)
    ours = engine(open_checkpoint(path), way, lambda _: wanted)
    for name, tensor in safetensors.torch.load_file(path).items():
        assert ours[name].dtype == getattr(torch, wanted)
        assert_same_numbers(ours[name], tensor.to(getattr(torch, wanted)))


@pytest.mark.parametrize("way", Way)
@pytest.mark.parametrize("wanted", CAST_TO)
def test_gguf_in_every_dtype_has_the_numbers_of_gguf_py(tmp_path: Path, way: Way, wanted: str) -> None:
    path = tmp_path / "model.gguf"
    random = np.random.default_rng(3)
    blocks = {
        name: (name, random.integers(0, 256, (4, 3 * block.block_nbytes), dtype=np.uint8))
        for name, block in BLOCKS.items()
    }
    write_gguf(path, blocks)
    ours = engine(open_checkpoint(path), way, lambda _: wanted)
    for name, tensor in gguf_py(path).items():
        assert_same_numbers(ours[name], tensor.to(getattr(torch, wanted)))


@pytest.mark.parametrize("way", Way)
def test_large_tensors_at_odd_places_are_cut_and_joined_right(tmp_path: Path, way: Way) -> None:
    path = tmp_path / "model.safetensors"
    stored = {
        "small": random_tensor("uint8", (3,), 0),
        "large": random_tensor("uint8", (20_000_001,), 1),
        "cast": random_tensor("bfloat16", (1_700_001,), 2),
    }
    safetensors.torch.save_file(stored, path)
    ours = engine(open_checkpoint(path), way, lambda info: info.dtype.replace("bfloat16", "float32"))
    assert_same(ours, {**stored, "cast": stored["cast"].float()})


class Holder(torch.nn.Module):
    """A place for each tensor of a file."""

    def __init__(self, names: list[str], shape: tuple[int, ...]) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, torch.nn.Parameter(torch.empty(shape)))


@pytest.mark.parametrize("wanted", CAST_TO)
def test_load_into_a_module_has_the_numbers_of_gguf_py(tmp_path: Path, wanted: str) -> None:
    path = tmp_path / "model.gguf"
    random = np.random.default_rng(5)
    rows = {name: random.integers(0, 256, (2, 1024 // b.block_numel * b.block_nbytes), dtype=np.uint8)
            for name, b in BLOCKS.items()}  # fmt: skip
    write_gguf(path, {name: (name, data) for name, data in rows.items()})
    module = loadstone.load(path, into=Holder, config={"names": list(rows), "shape": (2, 1024)}, dtype=wanted)
    for name, tensor in gguf_py(path).items():
        assert_same_numbers(module.state_dict()[name], tensor.to(getattr(torch, wanted)))
