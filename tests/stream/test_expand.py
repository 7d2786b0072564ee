"""Blocks that are decoded where they are computed with: torch's kernels against numpy's, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_dequantize import BLOCKS, ODD_HALVES, OWN
from torch.profiler import ProfilerActivity, profile

import fake_devices
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
    ordering_bytes,
    shape_without,
)
from loadstone.architecture.gguf_layouts import Part as Slice
from loadstone.architecture.keymap import Assignment, Part, Target
from loadstone.checkpoint.values import TensorInfo
from loadstone.plan.reserve import STRIP_BYTES
from loadstone.stream import expand as expanding
from loadstone.stream.dequantize import dequantize
from loadstone.stream.dequantize_tensors import dequantize as dequantize_tensor
from loadstone.stream.expand import expand
from loadstone.stream.stored import Stored, stored_form


def by_numpy(raw: np.ndarray, encoding: str) -> torch.Tensor:
    block = BLOCKS[encoding]
    out = np.empty(raw.size // block.block_nbytes * block.block_numel, np.float32)
    dequantize(np.ascontiguousarray(raw).reshape(-1), encoding, out)
    return torch.from_numpy(out)


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    numbers = {4: torch.int32, 2: torch.int16}[ours.element_size()]
    return torch.equal(ours.contiguous().view(numbers), theirs.contiguous().view(numbers))


def random_blocks(encoding: str, count: int, seed: int = 0) -> np.ndarray:
    size = (count, BLOCKS[encoding].block_nbytes)
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


@pytest.mark.parametrize("encoding", OWN)
def test_tensors_are_decoded_as_arrays_are(encoding: str) -> None:
    raw = random_blocks(encoding, 700)
    found = dequantize_tensor(torch.from_numpy(raw).view(-1), encoding)
    expected = by_numpy(raw, encoding)
    numbers = ~expected.isnan()
    assert same_bits(found[numbers], expected[numbers])
    assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("encoding", OWN)
def test_odd_scales_are_decoded_as_arrays_are(encoding: str) -> None:
    raw = random_blocks(encoding, len(ODD_HALVES) ** 2)
    pairs = np.array([(one, other) for one in ODD_HALVES for other in ODD_HALVES], "<u2").view(np.uint8)
    for start in (0, raw.shape[1] - 4):
        raw[:, start : start + 4] = pairs
    found = dequantize_tensor(torch.from_numpy(raw).view(-1), encoding)
    torch.testing.assert_close(found, by_numpy(raw, encoding), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("encoding", OWN)
def test_all_of_it_is_done_on_the_device(encoding: str) -> None:
    """One that refuses tensors of the host beside its own."""
    fake_devices.register()
    raw = torch.from_numpy(random_blocks(encoding, 40)).view(-1)
    found: Any = dequantize_tensor(raw.to("fake:1"), encoding)
    assert str(found.device) == "fake:1"
    torch.testing.assert_close(found.inner, dequantize_tensor(raw, encoding), rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("encoding", OWN)
def test_a_real_device_decodes_as_the_host_does(encoding: str) -> None:
    raw = torch.from_numpy(random_blocks(encoding, 700)).view(-1)
    found = dequantize_tensor(raw.cuda(), encoding).cpu()
    torch.testing.assert_close(found, dequantize_tensor(raw, encoding), rtol=0, atol=0, equal_nan=True)


def stored_of(
    encoding: str | None, shape: tuple[int, ...], part: Part, target: Target, dtype: str = "float32"
) -> Stored | None:
    if encoding is None:
        nbytes = prod(shape) * {"bfloat16": 2, "float16": 2, "float32": 4}[dtype]
    else:
        nbytes = prod(shape) // BLOCKS[encoding].block_numel * BLOCKS[encoding].block_nbytes
    info = TensorInfo(
        name=part.source, dtype=dtype, shape=shape, file=Path("x.gguf"), offset=64, nbytes=nbytes, encoding=encoding
    )
    return stored_form(Assignment(target="weight", parts=(part,)), target, {part.source: info})


LAYOUTS: list[tuple[Layout | None, tuple[int, ...]]] = [
    (None, (12, 256)),
    (UnpermuteHeads(num_heads=2), (12, 256)),
    (UnpermuteHeads(num_heads=2), (12, 2, 256)),
    (GroupQkv(num_heads=4, num_kv_heads=2), (16, 256)),
    (GroupHeads(num_groups=2, heads_per_group=3, head_dim=2, offset=4), (16, 256)),
    (GroupHeads(num_groups=2, heads_per_group=4, head_dim=32, dim=1), (3, 256)),
    (Transpose(), (12, 256)),
    (Transpose(), (3, 12, 256)),
    (Unsqueeze(dim=1, ndim=3), (12, 256)),
    (AddConstant(value=-1.0), (12, 256)),
    (Chain(layouts=(UnpermuteHeads(num_heads=2), Transpose())), (12, 256)),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("layout", "shape"), LAYOUTS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("encoding", ["Q8_0", "Q4_K"])
def test_layouts_are_undone_over_there(
    encoding: str, layout: Layout | None, shape: tuple[int, ...], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expanding, "STRIP_NUMEL", 512)
    raw = random_blocks(encoding, prod(shape) // BLOCKS[encoding].block_numel, seed=5)
    raw[:, :4] = 1  # small scales, no NaN
    target = Target(shape=shape_without(layout, shape), dtype=dtype)
    stored = stored_of(encoding, shape, Part(source="x", layout=layout), target)
    assert stored is not None
    data, out = torch.from_numpy(raw).reshape(-1), torch.empty(target.shape, dtype=getattr(torch, dtype))
    assert stored.nbytes == data.numel()
    expand(stored, data, out)
    arranged = np.ascontiguousarray(apply_layout(layout, by_numpy(raw, encoding).numpy().reshape(shape)))
    assert same_bits(out, torch.from_numpy(arranged).reshape(target.shape).to(out.dtype))


@pytest.mark.parametrize(("layout", "shape"), LAYOUTS, ids=lambda value: type(value).__name__)
def test_layouts_are_undone_on_the_device(layout: Layout | None, shape: tuple[int, ...]) -> None:
    fake_devices.register()
    raw = random_blocks("Q8_0", prod(shape) // 32)
    raw[:, :2] = 1
    target = Target(shape=shape_without(layout, shape), dtype="bfloat16")
    stored = stored_of("Q8_0", shape, Part(source="x", layout=layout), target)
    assert stored is not None
    data = torch.from_numpy(raw).reshape(-1)
    out = torch.empty(target.shape, dtype=torch.bfloat16)
    far: Any = torch.zeros(target.shape, dtype=torch.bfloat16).to("fake:1")
    expand(stored, data, out)
    expand(stored, data, far)
    assert torch.equal(far.inner, out)


@pytest.mark.parametrize(
    "index",
    [
        Slice(dim=0, start=2, stop=8).index,
        Slice(dim=1, start=1, stop=3).index,
        Slice(dim=1, start=0, stop=4, step=2).index,
        Slice(dim=2, start=0, stop=256).index,
    ],
    ids=str,
)
def test_slices_are_filled_over_there(index: tuple[slice, ...]) -> None:
    whole = torch.full((8, 4, 512), 7.0)
    shape = tuple(whole[index].shape)
    stored = stored_of("Q8_0", shape, Part(source="x", index=index), Target(shape=(8, 4, 512), dtype="float32"))
    assert stored is not None
    raw = random_blocks("Q8_0", prod(shape) // 32, seed=6)
    raw[:, :2] = 1
    expected = whole.clone()
    expected[index] = by_numpy(raw, "Q8_0").reshape(shape)
    expand(stored, torch.from_numpy(raw).reshape(-1), whole)
    assert torch.equal(whole, expected)


def test_parts_of_several_encodings_fill_one_parameter() -> None:
    shapes = {"Q4_0": (2, 256), "Q6_K": (3, 256), None: (1, 256)}
    infos, parts, raws, begin = {}, [], [], 0
    for encoding, shape in shapes.items():
        raw = random_blocks(encoding, prod(shape) // BLOCKS[encoding].block_numel) if encoding else np.arange(512)
        raw = raw.astype(np.uint8)
        infos[str(encoding)] = TensorInfo(
            name=str(encoding), dtype="float32" if encoding else "float16", shape=shape, file=Path("x"), offset=begin,
            nbytes=raw.size, encoding=encoding,
        )  # fmt: skip
        parts.append(Part(source=str(encoding), start=begin))
        raws.append(raw)
        begin += prod(shape)
    target = Target(shape=(6, 256), dtype="float32")
    stored = stored_form(Assignment(target="weight", parts=tuple(parts)), target, infos)
    assert stored is not None
    data = torch.zeros(stored.nbytes, dtype=torch.uint8)
    expected = []
    for one, raw, encoding in zip(stored.parts, raws, shapes, strict=True):
        assert one.begin % 64 == 0
        data[one.begin : one.begin + raw.size] = torch.from_numpy(raw.reshape(-1))
        expected.append(by_numpy(raw, encoding) if encoding else torch.from_numpy(raw).view(torch.float16).float())
    out = torch.empty(6, 256)
    expand(stored, data, out)
    torch.testing.assert_close(out.view(-1), torch.cat(expected), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("encoding", "stored_dtype", "dtype", "layout"),
    [
        ("Q8_0", "float32", "int8", None),  # which nobody can make of it
        (None, "float32", "bfloat16", None),  # wider than what is wanted
        ("Q8_0", "float32", "float32", LogNegate()),  # other bits on each device
    ],
)
def test_what_another_device_cannot_make_travels_as_it_is_wanted(
    encoding: str | None, stored_dtype: str, dtype: str, layout: Layout | None
) -> None:
    part = Part(source="x", layout=layout)
    assert stored_of(encoding, (4, 256), part, Target(shape=(4, 256), dtype=dtype), stored_dtype) is None


def peak_bytes_of(run: Callable[[], Any]) -> int:
    """The most that torch allocates at a time while something runs."""
    run()  # what is kept from now on, tables, is there
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [one for one in profiled.profiler.kineto_results.events() if one.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("encoding", OWN)
def test_a_strip_takes_what_plans_count(encoding: str) -> None:
    numel = 1 << 16
    raw = torch.from_numpy(random_blocks(encoding, numel // BLOCKS[encoding].block_numel)).view(-1)
    # Over there it is beside its blocks, of which a copy is made.
    peak = peak_bytes_of(lambda: dequantize_tensor(raw, encoding)) + raw.numel()
    assert 6 * numel < peak <= STRIP_BYTES * numel, peak / numel


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (UnpermuteHeads(num_heads=4), (512, 1024)),
        (GroupQkv(num_heads=4, num_kv_heads=2), (512, 1024)),
        (GroupHeads(num_groups=2, heads_per_group=4, head_dim=64), (512, 1024)),
        (GroupHeads(num_groups=2, heads_per_group=4, head_dim=128, dim=1), (512, 1024)),
        (Transpose(), (512, 1024)),
        (Chain(layouts=(UnpermuteHeads(num_heads=4), AddConstant(value=1.0))), (512, 1024)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_putting_in_order_takes_what_plans_count(
    layout: Layout, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expanding, "STRIP_NUMEL", 1 << 12)
    target = Target(shape=shape_without(layout, shape), dtype="float32")
    stored = stored_of("Q8_0", shape, Part(source="x", layout=layout), target)
    assert stored is not None
    data, out = torch.zeros(stored.nbytes, dtype=torch.uint8), torch.empty(target.shape)
    counted = ordering_bytes(layout, None, stored.nbytes, prod(shape))
    peak = peak_bytes_of(lambda: expand(stored, data, out))
    assert 0.4 * counted < peak <= counted + (STRIP_BYTES << 12)
    assert stored.expanding_bytes == counted + STRIP_BYTES * prod(shape)
