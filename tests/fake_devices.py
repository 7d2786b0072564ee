"""Accelerators that are not there: `fake:0`, `fake:1`, ... with numbers of their own, which may not be mixed.

torch lets a backend be written in Python. This one keeps every tensor in host memory, says that it is elsewhere, and
refuses whatever mixes tensors of two devices, as CUDA does. So what moves a model's inputs from device to device is
tested with real numbers where there is no accelerator.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

from loadstone.hardware.spec import Machine

NAME = "fake"
HOST = torch.device("cpu")
COUNT = 4
# Copies from one device to another since the last `clear`, by (from, to).
COPIES: Counter[tuple[str, str]] = Counter()

# What torch would make in two steps, of which the second resizes, or without asking subclasses: `torch.tensor`.
_MADE_WHOLE = (
    *("arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace", "randperm"),
    *("empty.memory_format", "empty_strided", "_to_copy", "copy_"),
)
_BETWEEN_DEVICES = frozenset(("copy_", "_to_copy", "to"))


class Elsewhere(torch.Tensor):
    """A tensor of a fake device.

    Attributes:
        inner: its elements, on the host.
    """

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> Elsewhere:
        with torch.inference_mode(False):
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                inner.size(),
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=device,
            )
        made.inner = inner
        return made

    def tolist(self) -> Any:
        """The numbers, which torch would look for in memory."""
        return self.inner.tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.inner!r} on {self.device}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, *args, **(kwargs or {}))


class _Module(backend_registration._DummyBackendModule):
    """What `torch.fake` answers."""

    def device_count(self) -> int:
        return COUNT

    def empty_cache(self) -> None:
        """Nothing is kept."""


class _Hooks(backend_registration._DummyPrivateUse1Hook):
    """Says that no accelerator is there to whoever asks for any, so that other tests see the machine as it is."""

    def is_available(self) -> bool:
        return False


_LIBRARIES: list[torch.library.Library] = []


@cache
def register() -> None:
    """Have torch know the devices, once in a process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module(), hook=_Hooks())
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(_run, "PrivateUse1")
    whole = torch.library.Library("aten", "IMPL")
    for name in _MADE_WHOLE:
        packet, _, overload = name.partition(".")
        whole.impl(name, partial(_run, getattr(getattr(torch.ops.aten, packet), overload or "default")), "PrivateUse1")
    _LIBRARIES.extend((everything, whole))


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute on the host what a fake device was asked for."""
    leaves = tree_leaves((args, kwargs))
    given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    name = func.overloadpacket.__name__
    wanted = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
    if func is torch.ops.aten.to.other:
        wanted = args[1].device
    # As on CUDA, a single number of the host may meet tensors of any device.
    devices = {tensor.device for tensor in given if tensor.dim() or tensor.device.type == NAME}
    if name in _BETWEEN_DEVICES:
        source = args[1] if name == "copy_" else args[0]
        target = args[0].device if name == "copy_" else wanted or source.device
        if source.device != target:
            COPIES[str(source.device), str(target)] += 1
    else:
        indexing = name in {"index", "index_put", "index_put_"}  # by numbers of the host: CUDA takes them too
        if indexing:
            devices = {tensor.device for tensor in given if tensor.device.type == NAME}
        if len(devices) > 1:
            places = ", ".join(sorted(map(str, devices)))
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two: {places} ({func})"
            )
        target = wanted if wanted is not None else next(iter(devices), HOST)
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    if name == "histc":  # of whole numbers, which only accelerators know
        inner_args = tree_map(lambda one: one.float() if isinstance(one, torch.Tensor) else one, inner_args)
    result = func(*inner_args, **inner_kwargs)
    if name == "histc":
        result = result.to(given[0].dtype)
    if target.type != NAME:
        return result
    same = {id(_inner(tensor)): tensor for tensor in given}

    def elsewhere(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return same.get(id(value)) if id(value) in same else Elsewhere(value, target)

    return tree_map(elsewhere, result)


def _inner(value: Any) -> Any:
    if isinstance(value, torch.device):
        return HOST
    return value.inner if isinstance(value, Elsewhere) else value


def pretend(patch: pytest.MonkeyPatch, count: int = 3) -> Machine:
    """Have Loadstone see them as `cuda:0` and so on, for as long as the patch lasts."""
    from loadstone.api import assemble, load, planned
    from loadstone.hardware.probe import probe
    from loadstone.hardware.spec import Device
    from loadstone.stream import transfer

    register()
    here = probe()
    ids = [f"cuda:{index}" for index in range(count)]
    gpus = [Device(id=name, kind="cuda", name=NAME, total_bytes=8 << 30, free_bytes=8 << 30) for name in ids]
    machine = replace(here, devices=(*gpus, here.host))
    for name in ids:
        patch.setitem(transfer.STAND_INS, name, name.replace("cuda", NAME))
    patch.setattr(planned, "probe", lambda *_: machine)
    patch.setattr(assemble, "devices_here", lambda: machine.devices)
    for module in (planned, load):
        patch.setattr(module, "may_have_accelerator", lambda: True)
    return machine


def in_parts(folder: Path, machine: Machine, count: int = 3) -> dict[str, str]:
    """A device map that cuts the walk wherever a third of it ends."""
    import loadstone

    units = [one.unit for one in loadstone.plan(folder, machine=machine, device="cuda:0").placements]
    return {unit: f"cuda:{count * number // len(units)}" for number, unit in enumerate(units)}
