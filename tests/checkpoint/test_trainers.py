"""What trainers save: the weights among much else, of which nothing must be taken for a weight."""

from __future__ import annotations

import argparse
import sys
import types
from pathlib import Path

import pytest
import torch

from loadstone.checkpoint.torch_pickle import read_torch_pickle

BOTH = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(folder: Path, value: object, zipped: bool = True) -> Path:
    path = folder / "last.ckpt"
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, name: str, base: type = object) -> type:
    """A class that pickles under this name, as if that package were installed."""
    made = type(name, (base,), {"__module__": module})
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        parent = ".".join(parts[:end])
        if parent not in sys.modules:
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    setattr(sys.modules[module], name, made)
    return made


@BOTH
def test_lightning_checkpoint_gives_the_model_and_not_the_optimizer(
    tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = stand_in(monkeypatch, "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    settings = stand_in(monkeypatch, "pytorch_lightning.utilities.parsing", "AttributeDict", dict)
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    content = {
        "epoch": 3,
        "global_step": torch.tensor(7),
        "pytorch-lightning_version": "1.4.0",
        "state_dict": {f"model.{name}": tensor for name, tensor in module.state_dict().items()},
        "callbacks": {callback: {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        "hyper_parameters": settings(lr=1e-3, args=argparse.Namespace(batch=4)),
    }
    found, notes = read_torch_pickle(save(tmp_path, content, zipped))
    assert sorted(found) == ["model.bias", "model.weight"]
    assert notes[0].startswith("last.ckpt: the tensors lie under 'state_dict'; left out beside it: 'epoch'")


@BOTH
def test_wrapper_goes_before_tensors_beside_it(tmp_path: Path, zipped: bool) -> None:
    content = {"step": torch.tensor(5), "model": {"state_dict": {"a": torch.ones(2)}}, "ema_decay": torch.tensor(0.9)}
    found, notes = read_torch_pickle(save(tmp_path, content, zipped))
    assert list(found) == ["a"]
    assert "left out beside it: 'step', 'ema_decay'" in notes[0]


def test_empty_wrapper_does_not_hide_the_tensors_beside_it(tmp_path: Path) -> None:
    assert list(read_torch_pickle(save(tmp_path, {"module": {}, "a": torch.ones(2)}))[0]) == ["a"]
