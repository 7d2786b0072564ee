"""Every dtype of safetensors through `load`: the bits of safetensors' own reader, aligned in the file or not."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loadstone
from loadstone.dtypes import DTYPES, SAFETENSORS_DTYPES
from loadstone.errors import UnsupportedDtype
from loadstone.stream.memory import map_file

CODES = [code for code, dtype in SAFETENSORS_DTYPES.items() if code != "BOOL" and not code.startswith("F6")]
# In the file's own counting; four-bit elements fill whole bytes with each.
SHAPES: dict[str, tuple[int, ...]] = {"odd": (3, 5, 2), "empty": (0, 4), "row": (6,), "one": (1, 2)}


def write(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], *, misaligned_by: int = 0) -> Path:
    """Random bits in the order given; the data begin that many bytes past a multiple of 8."""
    header, data = {}, b""
    generator = torch.Generator().manual_seed(0)
    for name, (code, shape) in tensors.items():
        bits = SAFETENSORS_DTYPES[code].bits * torch.Size(shape).numel()
        raw = torch.randint(0, 2 if code == "BOOL" else 256, (bits // 8,), generator=generator, dtype=torch.uint8)
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [len(data), len(data) + bits // 8]}
        data += bytes(raw.tolist())
    text = json.dumps(header).encode()
    text += b" " * ((misaligned_by - len(text)) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


class Holder(nn.Module):
    """Any tensors, by name, as buffers."""

    def __init__(self, like: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in like.items():
            self.register_buffer(name, torch.empty(tensor.shape, dtype=tensor.dtype))


def raw(tensor: torch.Tensor) -> list[int]:
    return tensor.reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []


@pytest.mark.parametrize("misaligned_by", [0, 1, 2, 4])
@pytest.mark.parametrize("code", CODES)
def test_bits_are_those_of_the_reference(tmp_path: Path, code: str, misaligned_by: int) -> None:
    path = write(
        tmp_path / "a.safetensors",
        {name: (code, shape) for name, shape in SHAPES.items()}
        | ({"scalar": (code, ())} if SAFETENSORS_DTYPES[code].bits >= 8 else {}),
        misaligned_by=misaligned_by,
    )
    expected = load_file(path)
    model = loadstone.load(path, into=Holder, config={"like": expected}, device="cpu")
    for name, tensor in expected.items():
        found = model.get_buffer(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert raw(found) == raw(tensor), name


@pytest.mark.parametrize(("misaligned_by", "mapped"), [(0, True), (8, True), (2, False)])
def test_a_tensor_off_its_alignment_is_copied_not_viewed(tmp_path: Path, misaligned_by: int, mapped: bool) -> None:
    path = write(tmp_path / "a.safetensors", {"x": ("F32", (64,))}, misaligned_by=misaligned_by)
    model = loadstone.load(path, into=Holder, config={"like": {"x": torch.empty(64)}}, device="cpu")
    assert model.x.data_ptr() % 4 == 0
    assert (loadstone.of(model).report.mapped_bytes == 256) is mapped
    assert raw(model.x) == raw(load_file(path)["x"])


def test_a_transformers_class_loads_from_unaligned_data(tmp_path: Path, llama_folder: Path) -> None:
    expected = loadstone.load(llama_folder).state_dict()
    source = map_file(llama_folder / "model.safetensors").tobytes()
    (nbytes,) = struct.unpack("<Q", source[:8])
    unaligned = struct.pack("<Q", nbytes + 3) + source[8 : 8 + nbytes] + b"   " + source[8 + nbytes :]
    (tmp_path / "model.safetensors").write_bytes(unaligned)
    (tmp_path / "config.json").write_bytes((llama_folder / "config.json").read_bytes())
    model = loadstone.load(tmp_path, device="cpu")
    assert loadstone.of(model).report.mapped_bytes == 0
    for name, tensor in expected.items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("code", ["F6_E2M3", "F6_E3M2"])
def test_a_dtype_that_torch_lacks_is_named_and_can_be_inspected(tmp_path: Path, code: str) -> None:
    path = write(tmp_path / "a.safetensors", {"w": (code, (8, 4)), "x": ("F32", (2,))})
    name = SAFETENSORS_DTYPES[code].name
    assert loadstone.inspect(path).checkpoint.tensors["w"].dtype == name
    like = {"w": torch.empty(8, 4), "x": torch.empty(2)}
    with pytest.raises(UnsupportedDtype, match=rf"a\.safetensors, tensor 'w': torch .* does not have its dtype {name}"):
        loadstone.load(path, into=Holder, config={"like": like})
    rest = loadstone.load(path, into=Holder, config={"like": {"x": like["x"]}}, select="x")
    assert raw(rest.x) == list(path.read_bytes()[-8:])


def test_four_bit_elements_that_make_no_pairs_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"w": ("F4", (4, 1))})
    assert loadstone.inspect(path).checkpoint.num_parameters == 4
    with pytest.raises(UnsupportedDtype, match=r"tensor 'w': expected an even last dimension.*found shape \[4, 1\]"):
        loadstone.load(path, into=Holder, config={"like": {"w": torch.empty(4, 1)}})


def test_every_dtype_that_torch_has_is_in_the_table() -> None:
    """One of torch's that a file can hold under a code must not be missing."""
    for dtype in SAFETENSORS_DTYPES.values():
        assert hasattr(torch, dtype.name) or dtype.name in {"float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"}
    assert DTYPES["float4_e2m1fn_x2"].bits == 8 * torch.float4_e2m1fn_x2.itemsize


def test_a_buffer_of_a_dtype_that_no_file_has_is_cast(tmp_path: Path) -> None:
    stored = torch.tensor([1 + 2j, -3j, 0.5], dtype=torch.complex64)
    save_file({"w": stored}, tmp_path / "a.safetensors")
    like = {"w": torch.empty(3, dtype=torch.complex128)}
    model = loadstone.load(tmp_path / "a.safetensors", into=Holder, config={"like": like})
    assert torch.equal(model.w, stored.to(torch.complex128))
