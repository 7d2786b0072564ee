"""Pieces of new files, with slots so small that every tensor is cut."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gguf_builders import Gguf, Stored
from loadstone.architecture.gguf_layouts import (
    AddConstant,
    Chain,
    GroupHeads,
    GroupQkv,
    Layout,
    LogNegate,
    Transpose,
    UnpermuteHeads,
    Unsqueeze,
    apply_layout,
    shape_without,
)
from loadstone.architecture.keymap import Assignment, Part
from loadstone.checkpoint.gguf import read_gguf
from loadstone.checkpoint.torch_pickle import read_torch_pickle
from loadstone.checkpoint.write import NewTensor, plan_shards
from loadstone.hardware.pages import anonymous
from loadstone.stream.dequantize import dequantize
from loadstone.stream.host import FileMaps
from loadstone.stream.memory import Gatherer
from loadstone.stream.pieces import Room, pieces_of
from loadstone.stream.read import Reader
from loadstone.stream.source import ALIGNMENT

Q8_0, Q4_1 = 8, 3


def made(tensors, new, assignments=None, slot_bytes=96):
    """The tensors that the pieces of a file make up, by name; every byte must come exactly once."""
    assignments = assignments or {
        tensor.name: Assignment(target=tensor.name, parts=(Part(source=tensor.name),)) for tensor in new
    }
    (shard,) = plan_shards(new, 10**9)
    content = bytearray(shard.header + b"\xee" * (shard.nbytes - len(shard.header)))
    at, reader, gatherer = len(shard.header), Reader(), Gatherer()
    for piece in pieces_of(shard, assignments, tensors, slot_bytes):
        room = Room(slot=anonymous(slot_bytes + ALIGNMENT), reader=reader, maps=FileMaps(), gatherer=gatherer)
        room.slot[:] = 0xAB  # slots are used again and again
        data = piece.begin(room)()
        assert piece.offset == at
        content[at : at + data.size] = data.tobytes()
        at += data.size
    assert at == shard.nbytes
    reader.close()
    gatherer.close()
    from safetensors.torch import load

    return load(bytes(content))


@pytest.mark.parametrize("wanted", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32", "float64"])
def test_casts_are_those_of_torch(tmp_path: Path, stored: str, wanted: str) -> None:
    state = {f"t{n}": torch.randn(n, 3).to(getattr(torch, stored)) for n in (1, 5, 40)}
    torch.save(state, tmp_path / "m.bin")
    tensors, _ = read_torch_pickle(tmp_path / "m.bin")
    new = [NewTensor(name=name, dtype=wanted, shape=info.shape) for name, info in tensors.items()]
    found = made(tensors, new)
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor.to(getattr(torch, wanted)))


def test_views_become_contiguous(tmp_path: Path) -> None:
    base = torch.randn(40, 30)
    state = {
        "t": base.t(),
        "step": base[::3, ::2],
        "same": base[:1].expand(5, 30),
        "cube": base.view(4, 10, 30).permute(2, 0, 1),
    }
    torch.save(state, tmp_path / "m.bin")
    tensors, _ = read_torch_pickle(tmp_path / "m.bin")
    for dtype in (torch.float32, torch.bfloat16):
        new = [NewTensor(name=name, dtype=str(dtype)[6:], shape=info.shape) for name, info in tensors.items()]
        found = made(tensors, new, slot_bytes=1 << 16)
        for name, tensor in state.items():
            assert torch.equal(found[name], tensor.to(dtype)), name


def test_integers_booleans_and_empty_tensors_are_copied(tmp_path: Path) -> None:
    state = {"i": torch.arange(100), "b": torch.tensor([True, False]), "e": torch.empty(0, 3), "s": torch.tensor(7.0)}
    torch.save(state, tmp_path / "m.bin")
    tensors, _ = read_torch_pickle(tmp_path / "m.bin")
    new = [NewTensor(name=name, dtype=info.dtype, shape=info.shape) for name, info in tensors.items()]
    found = made(tensors, new)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """Two GGUF tensors of random blocks, and what they decode to."""
    random = np.random.default_rng(0)
    scales = np.float16([0.5, 0.25]).tobytes()
    q8 = b"".join(scales[:2] + random.bytes(32) for _ in range(64))
    q4 = b"".join(scales + random.bytes(16) for _ in range(64))
    path = tmp_path_factory.mktemp("blocks") / "m.gguf"
    Gguf({"general.architecture": "x"}, {"q8": Stored((64, 32), Q8_0, q8), "q4": Stored((64, 32), Q4_1, q4)}).write(
        path
    )
    floats = {}
    for name, raw, encoding in (("q8", q8, "Q8_0"), ("q4", q4, "Q4_1")):
        floats[name] = np.empty((64, 32), np.float32)
        dequantize(np.frombuffer(raw, np.uint8), encoding, floats[name])
    return read_gguf(path).tensors, floats


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_are_decoded_whole(blocks, dtype: str) -> None:
    tensors, floats = blocks
    found = made(tensors, [NewTensor(name=name, dtype=dtype, shape=(64, 32)) for name in floats], slot_bytes=300)
    for name, expected in floats.items():
        assert torch.equal(found[name], torch.from_numpy(expected).to(getattr(torch, dtype)))


LAYOUTS: tuple[Layout, ...] = (
    UnpermuteHeads(num_heads=4),
    AddConstant(value=-1.0),
    Transpose(),
    Unsqueeze(dim=1, ndim=3),
    LogNegate(),
    GroupQkv(num_heads=4, num_kv_heads=2),
    GroupHeads(num_groups=2, heads_per_group=2, head_dim=8, dim=1),
    Chain(layouts=(Transpose(), AddConstant(value=1.0), Unsqueeze(dim=0, ndim=3))),
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: type(layout).__name__)
def test_layouts_are_undone_in_float32(blocks, layout: Layout, dtype: str) -> None:
    tensors, floats = blocks
    with np.errstate(all="ignore"):
        expected = np.ascontiguousarray(apply_layout(layout, floats["q8"]))
        shape = shape_without(layout, (64, 32))
        assert shape == expected.shape
        entry = Assignment(target="t", parts=(Part(source="q8", layout=layout),))
        found = made(tensors, [NewTensor(name="t", dtype=dtype, shape=shape)], {"t": entry})["t"]
    wanted = torch.from_numpy(expected).to(getattr(torch, dtype))
    assert torch.equal(torch.nan_to_num(found), torch.nan_to_num(wanted))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("step", [1, 2])
def test_parts_are_joined(blocks, step: int, dtype: str) -> None:
    tensors, floats = blocks
    whole = np.empty((128, 32), np.float32)
    places = {"q8": slice(0, 64 * step, step), "q4": slice(1 if step == 2 else 64, 128, step)}
    layouts = {"q8": None, "q4": AddConstant(value=2.0)}
    for name, place in places.items():
        whole[place] = apply_layout(layouts[name], floats[name])
    parts = tuple(Part(source=name, index=(place,), layout=layouts[name]) for name, place in places.items())
    found = made(
        tensors, [NewTensor(name="t", dtype=dtype, shape=(128, 32))], {"t": Assignment(target="t", parts=parts)}
    )
    assert torch.equal(found["t"], torch.from_numpy(whole).to(getattr(torch, dtype)))
