"""A module that is already built, divided into what can come and go: its blocks, and what stands around them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from loadstone.plan.values import Unit, UnitKind

# Modules that are not called, so that nothing tells when what is in them is needed.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Parameters that come and go together.

    Attributes:
        unit: the path of the module whose forward needs them.
        kind: what it is in the walk over the model.
        fqns: their names, each once.
    """

    unit: str
    kind: UnitKind
    fqns: tuple[str, ...]


def divided(module: nn.Module) -> tuple[Part, ...]:
    """Find what can come and go, in the order in which it is defined.

    Blocks are what lists and sequences of modules hold, the outermost ones. What is in none of them is divided by the
    modules that own it. Parameters of the module itself, or of what is never called, belong to no part.
    """
    blocks = set(_blocks(module, ""))
    found: dict[str, list[str]] = {}
    uses = Counter(id(one) for owner in module.modules() for one in owner._parameters.values())
    tied = {fqn.rpartition(".")[0] for fqn, parameter in module.named_parameters() if uses[id(parameter)] > 1}
    for fqn, parameter in module.named_parameters():
        owner = fqn.rpartition(".")[0]
        unit = next((path for path in _prefixes(owner) if path in blocks), owner)
        if unit and parameter.numel() and _is_called(module, unit) and not _is_held(module, owner):
            found.setdefault(unit, []).append(fqn)
    return tuple(
        Part(unit=unit, kind=_kind(module, unit, blocks, tied), fqns=tuple(fqns)) for unit, fqns in found.items()
    )


def as_units(
    parts: Collection[Part],
    module: nn.Module,
    kept_bytes: Mapping[str, int],
    computed_bytes: Mapping[str, int],
    rearranged_bytes: Mapping[str, int],
) -> tuple[Unit, ...]:
    """The same as the planner takes it.

    Args:
        parts: of the module.
        module: the module.
        kept_bytes: what each parameter takes where it is kept, by fqn.
        computed_bytes: what it takes where it is computed with.
        rearranged_bytes: what putting it in order takes beside that, where it comes in another order.
    """
    parameters = dict(module.named_parameters())
    units = []
    for order, part in enumerate(parts):
        sizes = [computed_bytes[fqn] for fqn in part.fqns]
        rows = parameters[part.fqns[0]].shape[0] if part.kind is UnitKind.EMBEDDING else 1
        units.append(
            Unit(
                name=part.unit,
                kind=part.kind,
                order=order,
                tensors=part.fqns,
                num_parameters=sum(parameters[fqn].numel() for fqn in part.fqns),
                stored_bytes=sum(kept_bytes[fqn] for fqn in part.fqns),
                memory_bytes=sum(sizes),
                mappable_bytes=0,
                largest_bytes=max(sizes),
                use_share=1 / rows,
                rearranged_bytes=sum(rearranged_bytes.get(fqn, 0) for fqn in part.fqns),
            )
        )
    return tuple(units)


def _blocks(module: nn.Module, path: str) -> Iterator[str]:
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if isinstance(module, nn.ModuleList | nn.Sequential) and not isinstance(child, _CONTAINERS):
            yield inner
        else:
            yield from _blocks(child, inner)


def _prefixes(path: str) -> Iterator[str]:
    names = path.split(".")
    return (".".join(names[:end]) for end in range(1, len(names) + 1))


def _is_called(module: nn.Module, unit: str) -> bool:
    return not isinstance(module.get_submodule(unit), _CONTAINERS)


def _is_held(module: nn.Module, owner: str) -> bool:
    """Whether a class keeps its own list of its weights, which goes on holding what is taken out of it."""
    return isinstance(module.get_submodule(owner), nn.RNNBase)


def _kind(module: nn.Module, unit: str, blocks: Collection[str], tied: Collection[str]) -> UnitKind:
    """What it is; only a table that nothing else multiplies with needs no more than the rows that are looked up."""
    if unit in blocks:
        return UnitKind.BLOCK
    is_table = isinstance(module.get_submodule(unit), nn.Embedding) and unit not in tied
    return UnitKind.EMBEDDING if is_table else UnitKind.OTHER
