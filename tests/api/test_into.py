"""Any nn.Module: `load(source, into=..., config=..., rename=..., convert=...)`."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import loadstone
from loadstone.errors import CheckpointMismatch

WIDTH = 16


class Net(nn.Module):
    """A converter's target: a tied pair, a non-persistent buffer, a batch norm."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("angles", torch.arange(width, dtype=torch.float32) / 3, persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.embed(tokens) + self.angles)
        return self.head(self.query(hidden) * self.key(hidden))


def trained() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    for tensor in net.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else tensor)
    net.norm.running_var.abs_()
    return net


def write_old_names(net: Net, folder: Path) -> list[Path]:
    """Two files in the names and the layout of an older version: query and key fused, everything under `net.`."""
    state = net.state_dict()
    first = {"net.embedding.weight": state["embed.weight"], "net.norm.num_batches": state["norm.num_batches_tracked"]}
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        first[f"net.norm.{leaf}"] = state[f"norm.{leaf}"]
    second = {
        "net.qk.weight": torch.cat([state["query.weight"], state["key.weight"]]),
        "net.qk.bias": torch.cat([state["query.bias"], state["key.bias"]]),
        "optimizer.moments": torch.zeros(1000),
    }
    for name, tensors in (("one", first), ("two", second)):
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    return [folder / "one.safetensors", folder / "two.safetensors"]


def split_and_drop(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made = {name: state[name] for name in state if not name.startswith(("qk.", "optimizer."))}
    for leaf in ("weight", "bias"):
        made[f"query.{leaf}"], made[f"key.{leaf}"] = state[f"qk.{leaf}"].chunk(2)
    return made


RENAME = [(r"^net\.", ""), (r"^embedding\.", "embed."), (r"num_batches$", "num_batches_tracked")]


def test_a_converted_renamed_tied_module_equals_load_state_dict(tmp_path: Path) -> None:
    expected = trained()
    before = torch.get_rng_state()
    model = loadstone.load(
        write_old_names(expected, tmp_path), into=Net, config={"width": WIDTH}, rename=RENAME, convert=split_and_drop
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert torch.equal(model.angles, expected.angles)
    assert model.head.weight is model.embed.weight
    assert not model.training
    tokens = torch.arange(10)
    assert torch.equal(model(tokens), expected(tokens))


def test_no_initialiser_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_old_names(trained(), tmp_path)
    filled: list[torch.Size] = []
    real = torch.Tensor.uniform_

    def spy(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        filled.append(tensor.shape)
        return real(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "uniform_", spy)
    nn.Linear(2, 2)
    assert filled, "the spy sees what initialises a real Linear"
    filled.clear()
    loadstone.load(files, into=Net, rename=RENAME, convert=split_and_drop)
    assert filled == []


def test_what_the_converter_does_not_touch_is_not_made(tmp_path: Path) -> None:
    touched: list[str] = []

    def convert(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert "optimizer.moments" in state
        made = split_and_drop(state)
        touched.extend(state._given)  # type: ignore[attr-defined]
        return made

    loadstone.load(write_old_names(trained(), tmp_path), into=Net, rename=RENAME, convert=convert)
    assert "optimizer.moments" not in touched


def test_a_factory_function_is_as_good_as_a_class(tmp_path: Path) -> None:
    save_file({"0.weight": torch.ones(3, 2), "0.bias": torch.zeros(3)}, tmp_path / "a.safetensors")
    model = loadstone.load(
        tmp_path / "a.safetensors", into=lambda size: nn.Sequential(nn.Linear(*size)), config={"size": (2, 3)}
    )
    assert torch.equal(model(torch.ones(1, 2)), torch.full((1, 3), 2.0))


def test_wrapper_prefixes_are_dropped_and_noted(tmp_path: Path) -> None:
    state = {f"module._orig_mod.{name}": tensor.clone() for name, tensor in trained().state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    model = loadstone.load(tmp_path / "a.safetensors", into=Net)
    assert any('began with "module._orig_mod."' in note for note in loadstone.of(model).report.notes)


def test_dtype_casts_parameters_and_leaves_buffers(tmp_path: Path) -> None:
    save_file({name: tensor.clone() for name, tensor in trained().state_dict().items()}, tmp_path / "a.safetensors")
    model = loadstone.load(tmp_path / "a.safetensors", into=Net, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.norm.running_mean.dtype == model.angles.dtype == torch.float32
    assert model.norm.num_batches_tracked.dtype == torch.int64


def test_a_missing_tensor_names_the_nearest(tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in trained().state_dict().items()}
    state["querry.weight"] = state.pop("query.weight")
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"1 tensors belong to nothing .*: querry\.weight") as caught:
        loadstone.load(tmp_path / "a.safetensors", into=Net)
    assert "nearest: query.weight" in str(caught.value)
    del state["querry.weight"]
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"1 parameters are in no file: query\.weight") as caught:
        loadstone.load(tmp_path / "a.safetensors", into=Net)
    assert caught.value.missing == ("query.weight",)


def test_a_missing_tensor_that_is_allowed_gets_its_initial_value(tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in trained().state_dict().items() if not name.startswith("query")}
    save_file(state, tmp_path / "a.safetensors")
    model = loadstone.load(tmp_path / "a.safetensors", into=Net, allow_missing=["query.*"])
    assert model.query.weight.abs().sum() > 0
    assert any("query.bias, query.weight" in note for note in loadstone.of(model).report.notes)


def test_nothing_that_fits_is_always_an_error(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointMismatch, match="none of its 1 tensors belongs to the module"):
        loadstone.load(tmp_path / "a.safetensors", into=Net, strict=False)


def test_a_wrong_shape_says_expected_and_found(tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in trained().state_dict().items()}
    state["key.bias"] = torch.zeros(3)
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"key\.bias \(expected \[16\], found \[3\] in key\.bias\)"):
        loadstone.load(tmp_path / "a.safetensors", into=Net)


def test_config_without_into_is_misuse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config= needs into="):
        loadstone.load(tmp_path, config={"a": 1})


def test_architecture_with_into_is_misuse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="architecture= names something of transformers"):
        loadstone.load(tmp_path, into=Net, architecture="LlamaModel")


def test_a_random_buffer_that_no_file_holds_is_refused(tmp_path: Path) -> None:
    class Projection(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("noise", torch.randn(3), persistent=False)

    save_file({"linear.weight": torch.ones(2, 2), "linear.bias": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointMismatch, match="the buffer noise is drawn at random"):
        loadstone.load(tmp_path / "a.safetensors", into=Projection)
