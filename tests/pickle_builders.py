"""Torch pickles for tests: as torch.save writes them, changed afterwards, or hostile."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loadstone.checkpoint.torch_pickle import read_torch_pickle
from loadstone.checkpoint.values import TensorInfo
from loadstone.errors import InvalidHeader

BOTH = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(folder: Path, value: object, zipped: bool = True, protocol: int = 2) -> Path:
    path = folder / "pytorch_model.bin"
    torch.save(value, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return path


def read(info: TensorInfo) -> torch.Tensor:
    """The tensor that (file, offset, nbytes, strides) describe."""
    with info.file.open("rb") as file:
        file.seek(info.offset)
        data = bytearray(file.read(info.nbytes))
    assert len(data) == info.nbytes
    if not data:
        return torch.empty(info.shape, dtype=getattr(torch, info.dtype))
    flat = torch.frombuffer(data, dtype=torch.uint8).view(getattr(torch, info.dtype))
    return flat.reshape(info.shape) if info.strides is None else flat.as_strided(info.shape, info.strides)


def refused(path: Path, message: str, kind: type[Exception] = InvalidHeader) -> None:
    with pytest.raises(kind, match=message) as caught:
        read_torch_pickle(path)
    assert str(path) in str(caught.value)


def zoo() -> dict[str, torch.Tensor]:
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "contiguous": base,
        "tied": base,
        "transposed": base.T,
        "slice": base[1:3, 2:5],
        "row": base[2],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "parameter": torch.nn.Parameter(torch.randn(2, 3)),
        "half": torch.randn(5).half(),
        "bf16": torch.randn(5).bfloat16(),
        "double": torch.randn(5).double(),
        "long": torch.arange(5),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "complex": torch.randn(3, dtype=torch.complex64),
        "float8": torch.randn(6).to(torch.float8_e4m3fn),
        "uint16": torch.arange(6).to(torch.uint16),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 7),
        "rows of nothing": torch.empty(4, 0, 5)[1:],
        "one_row": torch.randn(1, 4).as_strided((1, 4), (99, 1)),
    }


class Evil:
    """Becomes a call of `function` when it is unpickled."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def repack(path: Path, change: Callable[[str, bytes], bytes | None], method: int = zipfile.ZIP_STORED) -> Path:
    """Write a zip file anew, each entry changed or dropped."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in content.items():
            if (changed := change(name, data)) is not None:
                archive.writestr(name, changed)
    return path
