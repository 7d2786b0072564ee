"""Fused experts that come one by one: the hooks that hear what routers chose, and the operations that then compute.

transformers' experts compute in one of three ways: in a loop that takes one expert at a time, by copying what each
token chose, or by a product over groups of tokens. Each is done entry by entry with the same kernels on the same
operands, so that the numbers are the same bits, and nothing of the experts that were not chosen is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from loadstone.architecture.keymap import KeyMap, Target
from loadstone.checkpoint.values import TensorInfo
from loadstone.execute.expert_memory import EntryMemory, FarMemory, HostMemory
from loadstone.execute.expert_room import ExpertRoom
from loadstone.execute.foresight import Foresight
from loadstone.execute.outside_graphs import outside_graphs
from loadstone.execute.placeholder import StreamedParameter, with_elements
from loadstone.execute.residency import Residency
from loadstone.execute.values import Streaming
from loadstone.stream.entries import Entries, split
from loadstone.stream.rearrange import target_nbytes
from loadstone.stream.refill import Wanted
from loadstone.stream.sources import FileSource

_EXPERTS = ".experts."
_GROUPED = frozenset(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"))
_INTEGERS = (torch.int64, torch.int32)


@dataclass(slots=True)
class Experts:
    """Fused parameters whose entries come one by one.

    Attributes:
        tables: their entries, by fqn.
        kept: small parameters of the same modules, biases, which are loaded as ever.
        room_bytes: what the entries of all tables may take.
    """

    tables: dict[str, Entries] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    room_bytes: int = 0


def choose_experts(
    keymap: KeyMap, targets: Mapping[str, Target], tensors: Mapping[str, TensorInfo], streaming: Streaming
) -> Experts:
    """Find the fused experts that share a room.

    Args:
        keymap: what fills what.
        targets: shape and dtype by fqn.
        tensors: the checkpoint's.
        streaming: what is streamed.

    Returns:
        Their parameters; none where the room has no bytes.
    """
    chosen = Experts(room_bytes=streaming.expert_bytes)
    if not streaming.expert_bytes:
        return chosen
    small: dict[str, int] = {}
    for assignment in keymap.assignments:
        fqn = assignment.target
        in_units = any(fqn.startswith(f"{unit}.") for unit in streaming.units)
        in_room = any(part.source in streaming.expert_tensors for part in assignment.parts)
        if _EXPERTS not in fqn or not (in_room or (in_units and not streaming.expert_tensors)):
            continue
        wanted = Wanted(assignment=assignment, target=targets[fqn])
        entries = split(wanted, tensors)
        if entries is not None:
            chosen.tables[fqn] = entries
        elif len(wanted.target.shape) < 3:
            small[fqn] = target_nbytes(wanted.target)
    owners = {fqn.rpartition(".")[0] for fqn in chosen.tables}
    chosen.kept = {fqn for fqn in small if fqn.rpartition(".")[0] in owners}
    chosen.room_bytes -= sum(small[fqn] for fqn in chosen.kept)
    return chosen


@dataclass(slots=True)
class _Layer:
    """One experts module.

    Attributes:
        name: its path.
        number: in the room.
        tables: the numbers of its parameters in the room.
        room: has their entries.
        residency: whose turn it is.
        foresight: foretells its choices.
        following: the next one on the walk.
        taken: the last two parameters that were asked for.
        by_expert: it uses all parameters of an expert before the next expert.
    """

    name: str
    number: int
    tables: tuple[int, ...]
    room: ExpertRoom
    residency: Residency
    foresight: Foresight
    following: _Layer | None = None
    taken: tuple[int, int] = (-1, -1)
    by_expert: bool = False

    def before(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the forward of the module: take the turn, and begin to read what its router chose."""
        self.residency.hold(self.name)
        self.taken = (-1, -1)
        count = self.room.count(self.tables[0])
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.dtype in _INTEGERS and value.dim() == 2:
                chosen = value.reshape(-1).long().numpy(force=True)
                chosen = chosen[(chosen >= 0) & (chosen < count)]
                self.room.announce(self.number, chosen, len(value), by_expert=self.by_expert)
                self._foresee(args[0] if args else None, value)
                return

    def _foresee(self, values: Any, chosen: torch.Tensor) -> None:
        """Begin to read what the next layer's router will likely choose."""
        self.foresight.observe(values, chosen)
        if self.following is None:
            return
        number, foresight = self.following.number, self.following.foresight
        likely = foresight.guess(values, partial(self.room.missing, number))
        if foresight.is_useful:
            self.room.foresee(number, likely)

    def take(self, table: int, expert: int) -> torch.Tensor:
        """One entry of one of its parameters."""
        self.taken = (self.taken[1], table)
        if self.taken[0] != -1:
            self.by_expert = self.taken[0] != self.taken[1]
        return self.room.take(table, expert)


@dataclass(frozen=True, slots=True)
class _Table:
    """One fused parameter: answers operations on its placeholder.

    Attributes:
        number: in the room.
        layer: its module.
        is_turned: the last two dimensions are swapped.
    """

    number: int
    layer: _Layer
    is_turned: bool = False

    @property
    def count(self) -> int:
        """How many entries it has."""
        return self.layer.room.count(self.number)

    def answer(self, func: Any, args: Any, kwargs: Any, placeholder: StreamedParameter) -> Any:
        """What an operation gives, done entry by entry where that is possible, else with all of them."""
        name = getattr(func, "__name__", "").partition(".")[0]
        if name == "transpose" and args[0] is placeholder and _swaps_last(args[1:], placeholder.dim()):
            return self._turned(placeholder)
        if not self.layer.residency.is_computing():
            return NotImplemented
        if name == "__getitem__" and args[0] is placeholder:
            found = self._indexed(args[1])
            if found is not None:
                return found
        groups = name in _GROUPED and len(args) == 2 and args[1] is placeholder and kwargs.get("bias") is None
        if groups and kwargs.get("offs") is not None:
            return self._grouped(func, args[0], kwargs)
        whole = self._gathered(range(self.count))
        return func(*with_elements(args, placeholder, whole), **with_elements(kwargs, placeholder, whole))

    def entry(self, number: int) -> torch.Tensor:
        """One entry."""
        taken = self.layer.take(self.number, number)
        return taken.transpose(-2, -1) if self.is_turned else taken

    def _turned(self, placeholder: StreamedParameter) -> StreamedParameter:
        one = torch.empty(1, dtype=placeholder.dtype, device=placeholder.device)
        like = one.expand(*placeholder.shape[:-2], *placeholder.shape[:-3:-1])
        turned = StreamedParameter(like, fqn=placeholder.fqn, unit=placeholder.unit)
        turned.entries = _Table(self.number, self.layer, not self.is_turned)
        return turned

    def _indexed(self, index: Any) -> torch.Tensor | None:
        """What one number, or a list of numbers, takes; None for other indices."""
        numbers = range(self.count)  # which knows negative numbers, and refuses those that are none
        if isinstance(index, torch.Tensor) and index.dtype in _INTEGERS:
            if index.dim() == 0:
                return self.entry(numbers[int(index)])
            if index.dim() == 1 and index.numel():
                return self._gathered([numbers[one] for one in index.tolist()])
        if isinstance(index, int) and not isinstance(index, bool):
            return self.entry(numbers[index])
        return None

    def _gathered(self, numbers: Sequence[int]) -> torch.Tensor:
        """Copies of some entries, one after another, so that no more than one of them is in use at a time."""
        places: dict[int, list[int]] = {}
        for place, number in enumerate(numbers):
            places.setdefault(number, []).append(place)
        gathered = torch.empty(0)
        for number in sorted(places):
            entry = self.entry(number)
            if not gathered.numel():
                gathered = entry.new_empty((len(numbers), *entry.shape))
            gathered[places[number]] = entry
            del entry
        return gathered

    def _grouped(self, func: Callable[..., torch.Tensor], rows: torch.Tensor, kwargs: Mapping[str, Any]) -> Any:
        """The products of groups of rows, each with its own entry: `offs` are where the groups end."""
        made: list[torch.Tensor] = []
        ends, begin = kwargs["offs"], 0
        for number, end in enumerate(ends.tolist()):
            if end > begin:
                one = ends.new_tensor([end - begin])
                made.append(func(rows[begin:end], self.entry(number).unsqueeze(0), **{**kwargs, "offs": one}))
                begin = end
        if begin < len(rows):
            # Rows of no group; the kernels leave them as they find them.
            width = made[0].shape[-1] if made else self.entry(0).shape[-1]
            made.append(rows.new_zeros((len(rows) - begin, width)))
        return torch.cat(made)


def _swaps_last(dims: Sequence[int], num_dims: int) -> bool:
    return sorted(dim % num_dims for dim in dims) == [num_dims - 2, num_dims - 1]


def attach_experts(
    placeholders: Mapping[str, Sequence[tuple[nn.Module, StreamedParameter]]],
    experts: Experts,
    source: FileSource,
    residency: Residency,
    find: Callable[[str], nn.Module],
) -> Iterator[RemovableHandle]:
    """Have fused experts come one by one.

    Args:
        placeholders: by fqn, what stands for them, and the modules that it stands in.
        experts: their entries.
        source: their files.
        residency: whose turn it is.
        find: gives a module by its path.

    Yields:
        The hooks that do it, which are made as they are asked for.
    """
    layers: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for fqn, found in placeholders.items():
        layers.setdefault(id(found[0][0]), []).append(fqn)
        modules |= {id(module): module for module, _ in found}
    if not layers:
        return
    tables = [[experts.tables[fqn] for fqn in fqns] for fqns in layers.values()]
    room = ExpertRoom(tables, _memory([table for layer in tables for table in layer], source), experts.room_bytes)
    residency.have_room(room)
    first = 0
    before_it: _Layer | None = None
    for number, (ident, fqns) in enumerate(layers.items()):
        name = fqns[0].rpartition(".")[0]
        foresight = Foresight(find(name.rpartition(".")[0]))
        layer = _Layer(name, number, tuple(range(first, first + len(fqns))), room, residency, foresight)
        if before_it is not None:
            before_it.following = layer
        before_it = layer
        first += len(fqns)
        for table, fqn in zip(layer.tables, fqns, strict=True):
            for _, placeholder in placeholders[fqn]:
                placeholder.entries = _Table(table, layer)
        before, after = outside_graphs(layer.before), outside_graphs(partial(residency.leave, name))
        yield modules[ident].register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        yield modules[ident].register_forward_hook(after, always_call=True)


def _memory(tables: Sequence[Entries], source: FileSource) -> EntryMemory:
    """Where the entries go that are chosen."""
    if source.is_direct and source.refill is not None:
        return HostMemory(tables, source.refill)
    return FarMemory(*source.entries(tables))
