"""Which parameters of a module are streamed, as far as their files can fill them again and again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import nn

from loadstone.architecture.keymap import KeyMap, Target
from loadstone.architecture.skeleton import find_owner
from loadstone.checkpoint.values import Checkpoint
from loadstone.execute.experts import Experts, choose_experts
from loadstone.execute.values import Streaming
from loadstone.stream.materialize import torch_dtype
from loadstone.stream.refill import Wanted, can_refill
from loadstone.stream.slices import can_slice
from loadstone.stream.transfer import torch_device


@dataclass(slots=True)
class Streamed:
    """The parameters that are not kept in memory.

    Attributes:
        units: the name of the unit of each, by fqn.
        wanted: what fills them, by fqn.
        stand_ins: tensors of their shapes and dtypes that take no memory, for as long as the module is put together.
        placed: the parameters that were made of them: a tie may give one of these new memory and keep it.
        notes: what was to be streamed and is not, and why.
        device: where the module computes.
        experts: those whose entries come one by one.
        slices: those that come in slices of their rows, by fqn, with the bytes of a slice.
    """

    units: dict[str, str] = field(default_factory=dict)
    wanted: dict[str, Wanted] = field(default_factory=dict)
    stand_ins: dict[str, torch.Tensor] = field(default_factory=dict)
    placed: dict[str, nn.Parameter] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    experts: Experts = field(default_factory=Experts)
    slices: dict[str, int] = field(default_factory=dict)

    def note_placed(self, module: nn.Module) -> None:
        """Remember which parameters the stand-ins became; for before the module is finished."""
        found = module.named_parameters(remove_duplicate=False) if self.stand_ins else ()
        self.placed = {fqn: parameter for fqn, parameter in found if fqn in self.stand_ins}

    def add(self, unit: str, wanted: Wanted) -> None:
        """Stream one more parameter."""
        self.wanted[wanted.fqn] = wanted
        self.stand_in(unit, wanted.fqn, wanted.target)

    def stand_in(self, unit: str, fqn: str, target: Target) -> torch.Tensor:
        """Stream a parameter that may come from anywhere; gives what stands for it meanwhile."""
        self.units[fqn] = unit
        nothing = torch.zeros(1, dtype=torch_dtype(target.dtype), device=self.device)
        self.stand_ins[fqn] = nothing.expand(target.shape)
        return self.stand_ins[fqn]


def choose_streamed(
    module: nn.Module, keymap: KeyMap, targets: Mapping[str, Target], checkpoint: Checkpoint, streaming: Streaming
) -> Streamed:
    """Find the parameters of the units that are to be streamed.

    Args:
        module: the module on meta.
        keymap: what fills what.
        targets: shape and dtype by fqn.
        checkpoint: where it comes from.
        streaming: the units.

    Returns:
        Those that can be read anew in each pass; the notes name the others, which are loaded as ever.
    """
    experts = choose_experts(keymap, targets, checkpoint.tensors, streaming)
    chosen = Streamed(device=torch_device(streaming.device), experts=experts)
    computed = {unit for conversion in keymap.conversions if (unit := unit_of_name(conversion.name, streaming))}
    chosen.notes += [f"{unit} is kept in memory as far as transformers has to compute it" for unit in sorted(computed)]
    parameters = {fqn for fqn, _ in module.named_parameters(remove_duplicate=False)}
    kept = {unit: reason for unit in streaming.units if (reason := _reason_to_keep(module, unit))}
    chosen.notes += [f"{unit} is kept in memory: {reason}" for unit, reason in kept.items()]
    for assignment in keymap.assignments:
        fqn = assignment.target
        unit = unit_of_name(fqn, streaming)
        if fqn in chosen.experts.tables:
            chosen.add(fqn.rpartition(".")[0], chosen.experts.tables[fqn].wanted)
            continue
        if (
            fqn in chosen.experts.kept
            or unit is None
            or unit in kept
            or fqn not in parameters
            or not prod(targets[fqn].shape)
        ):
            continue
        if streaming.unit_of and not any(part.source in streaming.unit_of for part in assignment.parts):
            continue
        wanted = Wanted(assignment=assignment, target=targets[fqn])
        if isinstance(find_owner(module, fqn)[0], nn.RNNBase):
            chosen.notes.append(f"{fqn} is kept in memory: its class holds on to it")
        elif not can_refill(wanted, checkpoint.tensors):
            chosen.notes.append(f"{fqn} is kept in memory: only torch can convert it")
        else:
            chosen.add(unit, wanted)
            window_bytes = _window_bytes(wanted, unit, streaming)
            if not window_bytes:
                continue
            if can_slice(wanted, checkpoint.tensors, window_bytes):
                chosen.slices[fqn] = window_bytes
            else:
                chosen.notes.append(f"{fqn} comes whole, not in slices: its rows cannot be read by themselves")
    return chosen


def _window_bytes(wanted: Wanted, unit: str, streaming: Streaming) -> int:
    """How much of a parameter comes at a time; 0 where it comes whole."""
    names = (streaming.unit_of.get(part.source, unit) for part in wanted.assignment.parts)
    return max((streaming.slices.get(name, 0) for name in names), default=0)


def by_modules(keymap: KeyMap, streaming: Streaming) -> Streaming:
    """The same, told by modules: a unit is the module that the plan names, or else the owner of each parameter.

    Args:
        keymap: what fills what.
        streaming: tensors by their names in the checkpoint.
    """
    units: dict[str, None] = {}
    for assignment in keymap.assignments:
        unit = next((unit for part in assignment.parts if (unit := streaming.unit_of.get(part.source))), None)
        if unit is not None:
            units[_module_of(assignment.target, unit)] = None
    return replace(streaming, units=tuple(units))


def _module_of(fqn: str, unit: str) -> str:
    """The path that ends as the unit is called: a checkpoint of a base model names its blocks without the prefix."""
    *owners, _ = fqn.split(".")
    paths = [".".join(owners[:end]) for end in range(1, len(owners) + 1)]
    return next((path for path in paths if path == unit or path.endswith(f".{unit}")), paths[-1] if paths else "")


def unit_of_name(fqn: str, streaming: Streaming) -> str | None:
    """The innermost unit that a name belongs to."""
    return max((unit for unit in streaming.units if fqn.startswith(f"{unit}.")), key=len, default=None)


def _reason_to_keep(module: nn.Module, unit: str) -> str | None:
    try:
        found = module.get_submodule(unit)
    except AttributeError:
        return "it is no module"
    # Containers are not called, so that nothing tells when their parameters are needed.
    is_container = isinstance(found, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)
    return "it is a container of modules" if is_container else None
