"""What a module is given follows it to its device: rules, and what is remembered of copies."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fake_devices
from loadstone.execute import dispatch as dispatching
from loadstone.execute.dispatch import dispatch, moved

FIRST, SECOND = "fake:0", "fake:1"
Pair = namedtuple("Pair", ("left", "right"))


@pytest.fixture(autouse=True)
def devices() -> Iterator[None]:
    fake_devices.register()
    with torch.no_grad():
        yield
    assert not dispatching._ORIGINS.of


class Block(nn.Module):
    """Adds to what it is given, on its own device."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(4), persistent=False)

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor) -> torch.Tensor:
        return x + (self.inner(x) + self.shift) * mask


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 8)
        self.bias = nn.Parameter(torch.arange(4.0))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        x = self.table(ids) + self.bias
        for layer in self.layers:
            x = layer(x, mask=mask)
        return {"scores": self.head(x), "mask": mask, "count": 3}


def built() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def test_every_module_computes_where_its_parameters_are() -> None:
    ids, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3, 1)
    expected = built()(ids, mask)["scores"]
    model = built()
    model.table.to(SECOND)
    model.layers[0].to(FIRST)
    model.layers[1].to(SECOND)
    model.layers[2].to("cpu")
    model.head.to(SECOND)
    assert dispatch(model) == torch.device(FIRST)
    assert model.bias.device == torch.device(FIRST)  # what the model itself holds is where its code works
    given = ids.to(SECOND)
    found = model(given, mask)
    torch.testing.assert_close(found["scores"].cpu(), expected)
    assert found["scores"].device == given.device
    assert found["mask"].device == given.device
    assert found["count"] == 3


def test_a_model_on_one_device_is_left_alone() -> None:
    model = built()
    assert dispatch(model) is None
    assert not model._forward_pre_hooks
    assert not model.layers[0]._forward_pre_hooks


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    model = built()
    model.layers[1].to(SECOND)
    dispatch(model)
    mask = torch.ones(1, 3, 1)
    with pytest.raises(IndexError):
        model(torch.tensor([[99, 1, 2]]), mask)
    dispatching._ORIGINS.of.clear()  # a forward that ended in an error is forgotten with the next one
    assert model(torch.tensor([[1, 1, 2]]), mask)["scores"].shape == (1, 3, 8)


def test_a_tensor_that_was_changed_travels_again() -> None:
    source = torch.zeros(3)
    first = moved(source, torch.device(FIRST))
    assert moved(source, torch.device(FIRST)) is first
    source += 1
    second = moved(source, torch.device(FIRST))
    assert second is not first
    assert second.tolist() == [1, 1, 1]


def test_a_copy_that_was_changed_is_not_given_to_others() -> None:
    source = torch.zeros(3)
    moved(source, torch.device(FIRST)).add_(1)
    assert moved(source, torch.device(FIRST)).tolist() == [0, 0, 0]


def test_a_copy_knows_its_original_while_both_are_unchanged() -> None:
    source = torch.zeros(3)
    there = moved(source, torch.device(FIRST))
    assert moved(there, torch.device("cpu")) is source
    source += 1
    assert moved(there, torch.device("cpu")).tolist() == [0, 0, 0]
    there = moved(source, torch.device(FIRST))
    there += 1
    assert moved(there, torch.device("cpu")).tolist() == [2, 2, 2]


def test_copies_are_forgotten_with_their_tensors() -> None:
    before = len(dispatching._ELSEWHERE)
    source = torch.zeros(3)
    there = moved(source, torch.device(FIRST))
    assert len(dispatching._ELSEWHERE) == before + 2
    del source, there
    assert len(dispatching._ELSEWHERE) == before


def test_nothing_is_remembered_where_changes_cannot_be_seen() -> None:
    with torch.inference_mode():
        source = torch.zeros(3)
        first = moved(source, torch.device(FIRST))
        source += 1
        assert moved(source, torch.device(FIRST)).tolist() == [1, 1, 1]
        assert first.tolist() == [0, 0, 0]


def test_gradients_flow_back_through_copies() -> None:
    with torch.enable_grad():
        source = torch.ones(3, requires_grad=True)
        moved(source, torch.device("meta"))
        assert moved(source, torch.device("meta")).requires_grad


def test_containers_are_what_they_were() -> None:
    here, device = torch.zeros(2), torch.device(FIRST)
    value = Pair([here, 1], {"a": (here, None), "b": "text"})
    found = moved(value, device)
    assert isinstance(found, Pair)
    assert found.left[0].device == device
    assert found.right["a"][0] is found.left[0]
    assert found.right["b"] == "text"
    assert value.left[0] is here
    assert moved(found, device) is found
