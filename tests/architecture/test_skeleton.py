import threading

import pytest
import torch
from torch import nn

from loadstone.architecture.skeleton import build, slots_of, tied_groups


class Everything(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.linear = nn.Linear(width, width)
        self.token = nn.Parameter(torch.randn(1, width))
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight
        shared = nn.Parameter(torch.ones(3))
        self.one, self.two = shared, shared
        nn.init.trunc_normal_(self.linear.weight)
        nn.init.orthogonal_(self.linear.weight)
        self.linear.weight.data.normal_()
        self.register_buffer("frequency", 1.0 / 10.0 ** torch.arange(0, width, 2), persistent=False)


def test_parameters_are_on_meta_and_buffers_are_computed() -> None:
    module = build(Everything, {"width": 4})
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    assert torch.equal(module.frequency, 1.0 / 10.0 ** torch.arange(0, 4, 2))
    assert torch.equal(module.norm.running_var, torch.ones(4))


def test_no_initialiser_draws_a_number() -> None:
    before = torch.get_rng_state()
    build(Everything, None)
    assert torch.equal(torch.get_rng_state(), before)


def test_ties_survive_however_they_were_made() -> None:
    module = build(Everything, None)
    assert set(map(frozenset, tied_groups(module))) == {
        frozenset({"embed.weight", "head.weight"}),
        frozenset({"one", "two"}),
    }


def test_slots_tell_shape_dtype_and_kind() -> None:
    slots = slots_of(build(Everything, None))
    assert slots["embed.weight"].shape == (11, 8)
    assert slots["norm.num_batches_tracked"].dtype == "int64"
    assert slots["norm.running_mean"].is_buffer
    assert "frequency" not in slots


def test_other_threads_build_real_parameters_meanwhile() -> None:
    made: list[nn.Module] = []

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            thread = threading.Thread(target=lambda: made.append(nn.Linear(2, 2)))
            thread.start()
            thread.join()
            self.inner = nn.Linear(2, 2)

    module = build(Outer, None)
    assert module.inner.weight.is_meta
    assert not made[0].weight.is_meta
    assert made[0].weight.abs().sum() > 0


def test_a_factory_that_makes_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"into= must be an nn\.Module class"):
        build(dict, {"a": 1})
