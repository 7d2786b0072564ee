"""What was loaded to stay, found when it is to go for the first time: until then it has no hooks and no threads."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import nn

from loadstone.architecture.keymap import Target
from loadstone.checkpoint.values import Checkpoint, TensorInfo
from loadstone.events import ignore
from loadstone.execute.attach import attach
from loadstone.execute.grouping import Grouping
from loadstone.execute.kept import Home, Unit
from loadstone.execute.placeholder import StreamedParameter
from loadstone.execute.residency import Adopt, Residency
from loadstone.execute.states import Adopted
from loadstone.execute.streamed import Streamed
from loadstone.execute.values import NUM_SLOTS, Streaming
from loadstone.hardware.storage import storages_of
from loadstone.stream.host import FileMaps, is_mappable, stretches
from loadstone.stream.materialize import as_tensor
from loadstone.stream.memory_source import MemorySource
from loadstone.stream.prefault import Prefault
from loadstone.stream.refill import Wanted, can_refill
from loadstone.stream.sources import FileSource
from loadstone.stream.spill import wanted_from
from loadstone.stream.transfer import torch_device

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where the parameters of a module came from, as much of it as is needed to read them again.

    Attributes:
        checkpoint: their files.
        wanted: what fills each, by fqn.
        homes: those that were loaded to stay, as they were when the load was over.
    """

    checkpoint: Checkpoint
    wanted: Mapping[str, Wanted]
    homes: Mapping[str, Home]


def homes_of(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, Home]:
    """The parameters of a module that are what was loaded, not replaced by a tie, a cast or a move.

    Args:
        module: a module that is complete.
        tensors: what was loaded, by fqn.
    """
    found: dict[int, tuple[str, Home]] = {}
    for fqn, parameter in module.named_parameters(remove_duplicate=False):
        loaded = tensors.get(fqn)
        if loaded is None or isinstance(parameter, StreamedParameter) or id(parameter) in found:
            continue
        plain = not parameter.is_inference() and parameter.numel()
        if plain and parameter.data_ptr() == loaded.data_ptr() and parameter.dtype == loaded.dtype:
            found[id(parameter)] = fqn, Home.of(parameter)
    return dict(found.values())


def adopting(module: nn.Module, origin: Origin, source: FileSource) -> Adopt:
    """What `Residency` calls when units that were loaded to stay are to go; it does not keep the module alive."""
    return partial(_adopted, weakref.ref(module), origin, source)


def residency_for(module: nn.Module, origin: Origin, device: str) -> Residency:
    """What can let a model go that is wholly on a device; it does nothing until it is asked."""
    streaming = Streaming(units=(), num_slots=NUM_SLOTS, device=device)
    return attach(
        module,
        Streamed(device=torch_device(device)),
        origin.checkpoint,
        streaming,
        ignore,
        partial(adopting, module, origin),
    )


def _adopted(
    reference: weakref.ref[nn.Module], origin: Origin, source: FileSource, residency: Residency, taken: Collection[str]
) -> Adopted:
    module = reference()
    if module is None:
        return Adopted()
    present = {id(parameter): (path, owner, parameter) for path, owner, parameter in _parameters(module)}
    chosen, changed = Streamed(), []
    fqn_by_id: dict[int, str] = {}
    for fqn, home in origin.homes.items():
        parameter = home.parameter()
        if parameter is None or id(parameter) not in present:
            changed += [fqn] if _is_there(module, fqn) else []
            continue
        place = present[id(parameter)]
        wanted = origin.wanted[fqn]
        if not home.is_unchanged(parameter):
            changed.append(fqn)
        elif _is_on(parameter, source.device) and _can_go(*place) and can_refill(wanted, origin.checkpoint.tensors):
            chosen.units[fqn], chosen.wanted[fqn] = _unit_of(module, place[0]), wanted
            fqn_by_id[id(parameter)] = fqn
    source.add(chosen.wanted)
    units = _units(module, chosen, fqn_by_id, source, residency, taken)
    _keep(units, origin, source)
    fixed_bytes = _fixed_bytes(module, fqn_by_id, source.device)
    return Adopted(units=units, fixed_bytes=fixed_bytes, changed=tuple(changed))


def shelving(module: nn.Module, source: MemorySource) -> Adopt:
    """The same as `adopting` for what no file holds: it goes to the host's memory, as it is then."""
    return partial(_shelved, weakref.ref(module), source)


def _shelved(
    reference: weakref.ref[nn.Module], source: MemorySource, residency: Residency, taken: Collection[str]
) -> Adopted:
    module = reference()
    if module is None:
        return Adopted()
    chosen, targets, fqn_by_id = Streamed(), {}, {}
    for fqn, path, parameter in _going(module):
        fqn_by_id[id(parameter)] = fqn
        chosen.units[fqn] = _unit_of(module, path)
        targets[fqn] = Target(shape=tuple(parameter.shape), dtype=str(parameter.dtype).removeprefix("torch."))
    source.know(targets)
    units = _units(module, chosen, fqn_by_id, source, residency, taken)
    for unit in units:
        unit.is_kept, unit.shelf = True, source
    return Adopted(units=units, fixed_bytes=_fixed_bytes(module, fqn_by_id, source.device))


def spilling(module: nn.Module, source: FileSource, spill: Callable[[Mapping[str, torch.Tensor]], Checkpoint]) -> Adopt:
    """The same as `adopting` for what no file holds yet: `spill` writes it when it is to go for the first time."""
    return partial(_spilled, weakref.ref(module), source, spill)


def _spilled(
    reference: weakref.ref[nn.Module],
    source: FileSource,
    spill: Callable[[Mapping[str, torch.Tensor]], Checkpoint],
    residency: Residency,
    taken: Collection[str],
) -> Adopted:
    module = reference()
    if module is None:
        return Adopted()
    going = {fqn: parameter for fqn, _, parameter in _going(module)}
    checkpoint = spill(going)
    source.know(checkpoint)
    targets = {fqn: Target(shape=info.shape, dtype=info.dtype) for fqn, info in checkpoint.tensors.items()}
    homes = {fqn: Home.of(parameter) for fqn, parameter in going.items()}
    origin = Origin(checkpoint=checkpoint, wanted=wanted_from(checkpoint, targets), homes=homes)
    return _adopted(reference, origin, source, residency, taken)


def _units(
    module: nn.Module,
    chosen: Streamed,
    fqn_by_id: Mapping[int, str],
    source: FileSource | MemorySource,
    residency: Residency,
    taken: Collection[str],
) -> tuple[Unit, ...]:
    """Units of what was loaded to stay and can go."""
    grouping = Grouping(module, chosen, lambda parameter: fqn_by_id.get(id(parameter)), source, taken)
    return tuple(grouping.units(source.more({**grouping.walked, **grouping.tables}), residency))


def _fixed_bytes(module: nn.Module, fqn_by_id: Mapping[int, str], device: torch.device) -> int:
    """What the parameters take, of a device, that stay whatever happens."""
    there = (parameter for _, _, parameter in _parameters(module) if _is_on(parameter, device))
    return sum(parameter.nbytes for parameter in there if id(parameter) not in fqn_by_id)


def _going(module: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """The name of each parameter that can go, the path of the module that it stands in first, and itself."""
    names = {id(parameter): fqn for fqn, parameter in module.named_parameters()}
    for path, owner, parameter in _parameters(module):
        if _can_go(path, owner, parameter):
            yield names[id(parameter)], path, parameter


def _can_go(path: str, owner: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether a module can do without a parameter, and one that is made of its elements is the same.

    The whole model keeps its own, torch's RNNs hold on to theirs, and classes of other libraries hold more than that.
    """
    plain = type(parameter) is nn.Parameter and parameter.is_contiguous() and parameter.numel() > 0
    return plain and bool(path) and not isinstance(owner, nn.RNNBase)


def _keep(units: Sequence[Unit], origin: Origin, source: FileSource) -> None:
    """Say of units that they are there to stay, and how they came."""
    storages = storages_of(file.path for file in origin.checkpoint.files)
    remote = {path for path, storage in storages.items() if storage.network}
    for unit in units:
        filled = [origin.wanted[member.placeholder.fqn] for member in unit.members]
        infos = [origin.checkpoint.tensors[one.assignment.parts[0].source] for one in filled]
        unit.is_kept = True
        unit.homes = tuple(origin.homes[one.fqn] for one in filled)
        if source.is_direct and all(
            _is_mapped(one, info) and info.file not in remote for one, info in zip(filled, infos, strict=True)
        ):
            unit.maps = partial(_mapped, infos, [one.target for one in filled])


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Each parameter that has elements, with the module that it stands in first."""
    seen: set[int] = set()
    for path, owner in module.named_modules():
        for parameter in owner._parameters.values():
            if parameter is None or isinstance(parameter, StreamedParameter) or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            yield path, owner, parameter


def _is_on(parameter: nn.Parameter, device: torch.device) -> bool:
    """Whether a parameter is on a device; one without a number is the only one of its kind."""
    return parameter.device.type == device.type and device.index in (None, parameter.device.index)


def _is_there(module: nn.Module, fqn: str) -> bool:
    """Whether something stands where a parameter did."""
    path, _, name = fqn.rpartition(".")
    try:
        return module.get_submodule(path)._parameters.get(name) is not None
    except AttributeError:
        return False


def _unit_of(module: nn.Module, path: str) -> str:
    """The block that a module is in: the first on its path that a list holds; else the module itself."""
    above, walked = module, []
    for name in path.split("."):
        walked.append(name)
        found = above._modules[name]
        if found is None:
            break
        if isinstance(above, _CONTAINERS) and not isinstance(found, _CONTAINERS):
            return ".".join(walked)
        above = found
    return path


def _is_mapped(wanted: Wanted, info: TensorInfo) -> bool:
    """Whether a parameter is used where it lies in its file; the same rule as that of a load."""
    whole = len(wanted.assignment.parts) == 1 and wanted.assignment.is_plain
    return whole and info.numel == prod(wanted.target.shape) and is_mappable(info, wanted.target.dtype)


def _mapped(infos: Sequence[TensorInfo], targets: Sequence[Target]) -> list[torch.Tensor]:
    """Parameters where they lie in their files, brought in."""
    maps = FileMaps()
    arrays = [maps.bytes_of(info) for info in infos]
    ranges = [(path, maps.whole(path)[begin:end]) for path, begin, end in stretches(infos)]
    Prefault(ranges, beside_imports=False, observer=ignore).wait()
    with torch.inference_mode(False):
        return [as_tensor(array, target.dtype, target.shape) for array, target in zip(arrays, targets, strict=True)]
