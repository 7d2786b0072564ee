"""What was loaded to stay, found when it is to go for the first time: until then it has no hooks and no threads."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import nn

from loadstone.architecture.keymap import Assignment, Target
from loadstone.checkpoint.values import Checkpoint
from loadstone.events import ignore
from loadstone.execute.attach import Streamed, attach, make_units
from loadstone.execute.kept import Home
from loadstone.execute.placeholder import StreamedParameter
from loadstone.execute.residency import Adopt, Residency
from loadstone.execute.states import Adopted
from loadstone.hardware.storage import storages_of
from loadstone.stream.host import is_mappable
from loadstone.stream.refill import Refill, Wanted, can_refill

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
# As many as a plan takes where it can: one unit is read while another computes.
_NUM_SLOTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where the parameters of a module came from, as much of it as is needed to read them again.

    Attributes:
        checkpoint: their files.
        assignments: what fills each, by fqn.
        targets: shape and dtype of each.
        homes: those in host memory, as they were when the load was over.
    """

    checkpoint: Checkpoint
    assignments: Mapping[str, Assignment]
    targets: Mapping[str, Target]
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
        plain = parameter.device.type == "cpu" and not parameter.is_inference() and parameter.numel()
        if plain and parameter.data_ptr() == loaded.data_ptr() and parameter.dtype == loaded.dtype:
            found[id(parameter)] = fqn, Home.of(parameter)
    return dict(found.values())


def adopting(module: nn.Module, origin: Origin) -> Adopt:
    """What `Residency` calls when units that were loaded to stay are to go; it does not keep the module alive."""
    return partial(_adopted, weakref.ref(module), origin)


def residency_for(module: nn.Module, origin: Origin) -> Residency:
    """What can let a model go that is wholly in memory; it does nothing until it is asked."""
    return attach(module, Streamed(), origin.checkpoint, _NUM_SLOTS, ignore, adopting(module, origin))


def _adopted(
    reference: weakref.ref[nn.Module], origin: Origin, residency: Residency, taken: Collection[str]
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
        path, owner, _ = present[id(parameter)]
        wanted = Wanted(assignment=origin.assignments[fqn], target=origin.targets[fqn])
        if not home.is_unchanged(parameter):
            changed.append(fqn)
        elif path and not isinstance(owner, nn.RNNBase) and can_refill(wanted, origin.checkpoint.tensors):
            chosen.units[fqn], chosen.wanted[fqn] = _unit_of(module, path), wanted
            fqn_by_id[id(parameter)] = fqn
    units = make_units(module, chosen, lambda parameter: fqn_by_id.get(id(parameter)), residency, taken)
    remote = {path for path, storage in storages_of(residency.refill.files.manners).items() if storage.network}
    for unit in units:
        unit.is_kept = True
        unit.homes = tuple(origin.homes[member.wanted.fqn] for member in unit.members)
        unit.is_mapped = all(
            _is_mapped(member.wanted, residency.refill) and residency.refill.info(member.wanted).file not in remote
            for member in unit.members
        )
    fixed = (parameter for ident, (_, _, parameter) in present.items() if ident not in fqn_by_id)
    return Adopted(
        units=tuple(units),
        fixed_bytes=sum(parameter.nbytes for parameter in fixed),
        changed=tuple(changed),
    )


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Each parameter that has elements, with the module that it stands in first."""
    seen: set[int] = set()
    for path, owner in module.named_modules():
        for parameter in owner._parameters.values():
            if parameter is None or isinstance(parameter, StreamedParameter) or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            yield path, owner, parameter


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


def _is_mapped(wanted: Wanted, refill: Refill) -> bool:
    """Whether a parameter is used where it lies in its file; the same rule as that of a load."""
    info = refill.info(wanted)
    whole = len(wanted.assignment.parts) == 1 and wanted.assignment.is_plain
    return whole and info.numel == prod(wanted.target.shape) and is_mappable(info, wanted.target.dtype)
