"""Forwards that graphs leave alone are put in place and taken away again without a trace."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from loadstone.errors import StreamedModel
from loadstone.execute.outside_graphs import UntracedForward

VALUES = torch.ones(2, 3)


class Scaled(nn.Module):
    """Takes a keyword."""

    def forward(self, values: torch.Tensor, *, by: float = 1.0) -> torch.Tensor:
        return values * by


class Around(nn.Module):
    """Computes before and after another module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.inner(values + 1) - 1


def test_a_forward_computes_as_before_and_comes_back() -> None:
    module = Scaled()
    untraced = UntracedForward(module)
    assert "forward" in vars(module)
    assert torch.equal(module(VALUES, by=3.0), 3 * VALUES)
    untraced.remove()
    assert "forward" not in vars(module)
    untraced.remove()  # once more does nothing


def test_a_forward_that_somebody_put_there_is_called_and_stays() -> None:
    module: Any = Scaled()
    before = module.forward = lambda values: values + 1
    untraced = UntracedForward(module)
    assert torch.equal(module(VALUES), VALUES + 1)
    untraced.remove()
    assert module.forward is before
    untraced = UntracedForward(module)
    after = module.forward = lambda values: values + 2
    untraced.remove()
    assert module.forward is after


def test_it_does_not_keep_its_module() -> None:
    module = Scaled()
    reference, untraced = weakref.ref(module), UntracedForward(module)
    del module
    assert reference() is None
    untraced.remove()


def test_a_copy_that_would_compute_with_the_original_is_refused() -> None:
    module = Scaled()
    untraced = UntracedForward(module)
    with pytest.raises(StreamedModel, match="copy the whole model"):
        copy.deepcopy(module)
    untraced.remove()
    assert torch.equal(copy.deepcopy(module)(VALUES), VALUES)


def test_graphs_end_before_it() -> None:
    torch._dynamo.reset()
    inner, graphs = Scaled(), []

    def backend(graph: Any, inputs: Any) -> Any:
        del inputs
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    outer = Around(inner)
    untraced = UntracedForward(inner)
    assert torch.equal(torch.compile(outer, backend=backend)(VALUES), VALUES)
    assert len(graphs) == 2
    assert not any("mul" in target for graph in graphs for target in graph)
    untraced.remove()
