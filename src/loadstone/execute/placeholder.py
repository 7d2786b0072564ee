"""What stands where a streamed parameter would: it tells its shape, dtype and device.

In the forward of its own module a plain parameter takes its place. Elsewhere in a forward of the model, where a block
uses the weight of a module inside it directly, the elements are read for the one operation that wants them; outside of
any forward they are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol, Self

import torch
from torch import nn
from torch.nn import functional

from loadstone.errors import StreamedModel

# What is known of a tensor without its elements.
_FACTS = frozenset(
    (
        *("__get__", "__len__", "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride"),
        *("storage_offset", "is_floating_point", "is_complex", "is_signed", "is_contiguous", "get_device"),
        *("requires_grad_", "_has_compatible_shallow_copy_type"),
    )
)

_HOST = torch.device("cpu")
_SET_DATA = vars(torch._C.TensorBase)["data"].__set__
_SET_FACTS = tuple(vars(torch._C.TensorBase)[name].__set__ for name in ("grad", "requires_grad"))

Take = Callable[[torch.Tensor], torch.Tensor]


class Lender(Protocol):
    """Who lends the elements of units."""

    def can_lend(self, group: str) -> bool:
        """Whether a group's elements can be had now: its model is parked, or one of its forwards is under way."""

    def lend(self, group: str, work: Callable[[], Any]) -> Any:
        """Run `work` with the parameters of a group in place; gives what it returns."""


Lookup = Callable[[torch.Tensor, Take], torch.Tensor]
Multiply = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


class Entrywise(Protocol):
    """Who has the entries of a parameter one by one, where they do not come together."""

    def answer(self, func: Any, args: Any, kwargs: Any, placeholder: StreamedParameter) -> Any:
        """What an operation gives; `NotImplemented` where no forward is under way."""


class StreamedParameter(nn.Parameter):
    """A parameter without elements.

    Attributes:
        fqn: its name in the module.
        unit: what it is read with.
        group: the part of the unit that comes at once with it.
        lookup: where its rows can be read one by one: reads those of the given numbers, and gives what is taken from
            the table that then holds them.
        product: where it comes in slices of its rows: `torch.nn.functional.linear` with it, given values and bias.
        entries: where its entries come one by one, as experts do: who has them.
        lender: has the elements in place while something else than their own module uses them.
        holder: the parameter dict of a module that it stands in, and its name there.
    """

    fqn: str
    unit: str
    group: str
    lookup: Lookup | None
    product: Multiply | None
    entries: Entrywise | None
    lender: Lender | None
    holder: tuple[dict[str, Any], str]

    def __new__(cls, like: torch.Tensor, *, fqn: str, unit: str) -> Self:
        """One that has the shape, dtype and device of `like`."""
        with torch.inference_mode(False):  # whether it has gradients may be set later, in or outside of that mode
            nothing = torch.zeros(1, dtype=like.dtype, device=like.device).expand(like.shape)
            made = torch.Tensor._make_subclass(cls, nothing, like.requires_grad)
        made.fqn, made.unit, made.group = fqn, unit, unit
        made.lookup, made.product, made.entries, made.lender, made.holder = None, None, None, None, ({}, "")
        return made

    @property
    def comes_in_parts(self) -> bool:
        """Whether its rows or slices of it are had while it is not there."""
        return self.lookup is not None or self.product is not None

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Its facts; it has nothing else to show."""
        del tensor_contents
        return f"StreamedParameter({self.fqn}, {list(self.shape)}, {self.dtype}, streamed with {self.unit})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what can be answered without elements; refuse the rest."""
        kwargs = kwargs or {}
        found = _in_parts(func, args, kwargs)
        if found is not None:
            return found
        name = getattr(func, "__name__", "")
        if name in _FACTS or _sets_nothing(func, args) or _moves_nothing(name, args, kwargs):
            with torch._C.DisableTorchFunctionSubclass():
                answer = func(*args, **kwargs)
            if isinstance(answer, cls) or not isinstance(answer, torch.Tensor):
                return answer
        first = next(_placeholders((*args, *kwargs.values())))
        if first.entries is not None:
            answer = first.entries.answer(func, args, kwargs, first)
            if answer is not NotImplemented:
                return answer
        if first.lender is not None and first.lender.can_lend(first.group):
            work = partial(_computed, func, args, kwargs, first)
            return first.lender.lend(first.group, work)
        raise StreamedModel(
            f"{first.fqn}: expected its elements for {name}, found a parameter that is read from its file only while "
            f"{first.unit} computes; load the model with more memory, in the dtype and on the device that you want, or "
            "lift its limit with loadstone.of(model).limit(None), to copy, convert, save or change its weights."
        )


def _in_parts(func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
    """What can be had of a parameter that comes in parts: products with it, rows of it; None for all else."""
    if func is functional.linear and not kwargs and len(args) >= 2 and isinstance(args[1], StreamedParameter):
        matrix = args[1]
        if matrix.product is not None and not any(isinstance(one, StreamedParameter) for one in (args[0], *args[2:])):
            return matrix.product(args[0], args[2] if len(args) > 2 else None)
    return _looked_up(func, args, kwargs)


def _looked_up(func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
    """Rows of a table that are looked up, by `torch.nn.functional.embedding` or by an index; None for all else."""
    if func is functional.embedding and kwargs.get("max_norm") is None and len(args) == 2:
        ids, table = args
        if isinstance(table, StreamedParameter) and table.lookup is not None:
            there = ids.to(_HOST)  # the table is on the host, wherever the model computes

            def take(rows: torch.Tensor) -> torch.Tensor:
                return functional.embedding(there.to(rows.device), rows, **kwargs)

            return table.lookup(there, take).to(ids.device)
    if func is torch.Tensor.__getitem__ and args[0].lookup is not None:
        table, index = args
        ids = torch.arange(len(table))[index[0] if isinstance(index, tuple) else index]
        # A copy: the table's rows go when others are wanted.
        taken = table.lookup(ids.reshape(-1), lambda rows: rows[index].clone())
        return taken.to(table.device)  # type: ignore[no-any-return]
    return None


def _computed(func: Any, args: Any, kwargs: Any, first: StreamedParameter) -> Any:
    owner, name = first.holder
    parameter = owner[name]  # which is in place now
    return func(*with_elements(args, first, parameter), **with_elements(kwargs, first, parameter))


def with_elements(value: Any, placeholder: StreamedParameter, elements: torch.Tensor) -> Any:
    """Arguments with a tensor that has elements in the place of the placeholder."""
    if value is placeholder:
        return elements
    if isinstance(value, list | tuple):
        return type(value)(with_elements(one, placeholder, elements) for one in value)
    if isinstance(value, dict):
        return {key: with_elements(one, placeholder, elements) for key, one in value.items()}
    return value


def _placeholders(values: Any) -> Iterator[StreamedParameter]:
    for value in values:
        if isinstance(value, StreamedParameter):
            yield value
        elif isinstance(value, list | tuple):
            yield from _placeholders(value)


def _sets_nothing(func: Any, args: Any) -> bool:
    """Whether `data`, `grad` or `requires_grad` is set to what changes no element."""
    if func == _SET_DATA:
        return args[0] is args[1]
    return func in _SET_FACTS


def _moves_nothing(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a conversion is one to what the tensor is already, so that torch gives it back as it is."""
    if name == "cpu":
        return bool(args[0].device.type == "cpu")
    if name != "to" or kwargs.get("copy"):
        return False
    device, dtype, _, _ = torch._C._nn._parse_to(*args[1:], **kwargs)
    own = args[0].device
    same = device is None or (device.type == own.type and (own.index is None or device.index in (None, own.index)))
    return bool(same) and dtype in (None, args[0].dtype)
