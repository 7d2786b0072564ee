"""What torch pickles hold: every tensor as torch.load gives it, and nothing that runs."""

from __future__ import annotations

import os
import pickle
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loadstone.checkpoint.torch_pickle import read_torch_pickle
from loadstone.errors import NotACheckpoint, UnsafePickle, UnsupportedFormat
from pickle_builders import BOTH, Evil, read, refused, save, zoo


@BOTH
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_every_tensor_has_the_bytes_of_the_reference(tmp_path: Path, zipped: bool, protocol: int) -> None:
    tensors = zoo()
    path = save(tmp_path, tensors, zipped, protocol)
    found, notes = read_torch_pickle(path)
    # torch cannot load its own legacy files of float8 and uint16.
    reference = torch.load(path, weights_only=False) if zipped else tensors
    assert notes == ()
    assert found.keys() == reference.keys()
    for name, tensor in reference.items():
        value = read(found[name])
        assert value.dtype == tensor.dtype
        assert value.shape == tensor.shape
        assert value.contiguous().view(-1).view(torch.uint8).tolist() == (
            tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()
        )
    assert [info.offset for info in found.values()] == sorted(info.offset for info in found.values())


@BOTH
def test_tied_tensors_share_their_place(tmp_path: Path, zipped: bool) -> None:
    found, _ = read_torch_pickle(save(tmp_path, zoo(), zipped))
    assert found["tied"].offset == found["contiguous"].offset
    assert found["row"].offset == found["contiguous"].offset + 12 * 4


@BOTH
def test_strides_only_where_they_matter(tmp_path: Path, zipped: bool) -> None:
    found, _ = read_torch_pickle(save(tmp_path, zoo(), zipped))
    strides = {name: info.strides for name, info in found.items() if info.strides is not None}
    assert strides == {"transposed": (1, 6), "slice": (6, 1), "expanded": (0, 1)}
    assert found["expanded"].nbytes == 8
    assert found["slice"].nbytes == (6 + 3) * 4


@BOTH
def test_state_dict_of_a_module(tmp_path: Path, zipped: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    found, notes = read_torch_pickle(save(tmp_path, module.state_dict(), zipped))
    assert found.keys() == module.state_dict().keys()
    assert notes == ()


def test_parameter_and_tensor_with_attributes(tmp_path: Path) -> None:
    parameter, tensor = torch.nn.Parameter(torch.ones(2)), torch.ones(3)
    parameter.note = "kept"  # type: ignore[attr-defined]
    tensor.note = "kept"  # type: ignore[attr-defined]
    found, _ = read_torch_pickle(save(tmp_path, {"a": parameter, "b": tensor}))
    assert found["a"].shape == (2,)
    assert found["b"].shape == (3,)


@BOTH
@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model_state", "model", "module"])
def test_wrapped_state_dict(tmp_path: Path, zipped: bool, key: str) -> None:
    found, notes = read_torch_pickle(save(tmp_path, {"epoch": 3, key: {"a": torch.ones(2)}}, zipped))
    assert list(found) == ["a"]
    assert notes == (f"pytorch_model.bin: the tensors lie under {key!r}; left out beside it: 'epoch'",)


def test_checkpoint_of_a_trainer(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    content = {
        "optimizer": optimizer.state_dict(),
        "losses": defaultdict(list, {"train": [1.0]}),
        "size": torch.Size([1, 2]),
        "seen": {1, 2},
        "raw": b"abc",
        "big": 2**80,
        "device": torch.device("cpu"),
        "state_dict": {"model": {**module.state_dict(), "step": 7, "dtype": torch.bfloat16}},
    }
    found, notes = read_torch_pickle(save(tmp_path, content))
    assert list(found) == ["weight", "bias"]
    assert len(notes) == 3
    assert "left out beside it: 'optimizer', 'losses', 'size', 'seen', 'raw' and 2 more" in notes[0]
    assert notes[1] == "pytorch_model.bin: the tensors lie under 'model'"
    assert notes[2] == "pytorch_model.bin: 2 entries are no tensors and were left out: 'step', 'dtype'"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2), "expected a dictionary of tensors, found a single tensor"),
        ([torch.ones(2)], "expected a dictionary of tensors, found a single list"),
        ({}, "found an empty dictionary"),
        ({"net": {"a": torch.ones(1)}, "epoch": 1}, "found 'net', 'epoch'; save the state_dict alone"),
        ({1: torch.ones(1)}, "found an empty dictionary"),
    ],
)
def test_no_tensors_by_name(tmp_path: Path, value: object, message: str) -> None:
    refused(save(tmp_path, value), message, NotACheckpoint)


def test_dictionary_that_wraps_itself(tmp_path: Path) -> None:
    value: dict[str, Any] = {}
    value["model"] = value
    refused(save(tmp_path, value), "found 'model'; save the state_dict alone", NotACheckpoint)


@BOTH
@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_pickle_that_runs_a_command_is_refused_and_runs_nothing(tmp_path: Path, zipped: bool, protocol: int) -> None:
    witness = tmp_path / "ran"
    if protocol < 2 and not zipped:
        path = tmp_path / "pytorch_model.bin"
        path.write_bytes(pickle.dumps(Evil(os.system, f"touch {witness}"), protocol))
    else:
        path = save(tmp_path, {"a": torch.ones(1), "b": Evil(os.system, f"touch {witness}")}, zipped, max(protocol, 2))
    refused(path, "found a reference to 'posix.system'; nothing was run. Use a safetensors version", UnsafePickle)
    assert not witness.exists()


@pytest.mark.parametrize(
    "function", [eval, exec, getattr, open, __import__, os.remove, pickle.loads, torch.load, torch.hub.load]
)
def test_pickle_that_refers_to_code(tmp_path: Path, function: Callable[..., object]) -> None:
    refused(save(tmp_path, {"a": Evil(function, "x")}), f"found a reference to '.*{function.__name__}'", UnsafePickle)


def test_whole_module_is_refused(tmp_path: Path) -> None:
    refused(save(tmp_path, torch.nn.Linear(1, 1)), "reference to 'torch.nn.modules.linear.Linear'", UnsafePickle)


def test_numpy_scalar_is_left_out(tmp_path: Path) -> None:
    import numpy as np

    found, notes = read_torch_pickle(save(tmp_path, {"loss": np.float64(1), "a": torch.ones(1)}))
    assert list(found) == ["a"]
    assert notes == ("pytorch_model.bin: 1 entries are no tensors and were left out: 'loss'",)


def test_numpy_array_is_refused(tmp_path: Path) -> None:
    """It would be a weight that is silently left out."""
    import numpy as np

    refused(save(tmp_path, {"a": np.ones(3)}), "reference to 'numpy.*_reconstruct'", UnsafePickle)


def test_control_characters_of_a_name_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"\x80\x02c\x1b[2Jos\nsystem\n.")
    refused(path, r"'\\x1b\[2Jos.system'", UnsafePickle)


def test_dtype_that_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"\x80\x02ctorch\nQInt8Storage\n.")
    refused(path, "found 'QInt8Storage', which is not read; save the model with another", UnsupportedFormat)
