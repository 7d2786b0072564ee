"""Products with a matrix of which only a slice is in memory at a time."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from loadstone.execute.placeholder import StreamedParameter
from loadstone.execute.slots import Ring
from loadstone.hardware.pages import Bytes
from loadstone.plan.values import NUM_WINDOWS
from loadstone.stream.materialize import as_tensor
from loadstone.stream.slices import Slices

# Kinds of products of which it is known whether slices give the same; with some more it is found out anew.
_MAX_KNOWN = 4096


class Sliced:
    """A parameter that is multiplied with slice by slice while it is not kept.

    Which bits a product has can depend on how many rows the matrix has: libraries divide large ones in other ways than
    small ones. So a slice is multiplied with alone only where that was found to give the very bits that the whole
    matrix gives, for values of that shape; the first time, and where it gives others, the whole is multiplied with,
    which takes time but no memory.

    Args:
        placeholder: what stands for it.
        window_bytes: the memory of a slice.
        make: gives the slices.
    """

    def __init__(self, placeholder: StreamedParameter, window_bytes: int, make: Callable[[], Slices]) -> None:
        self.memory_bytes = NUM_WINDOWS * window_bytes
        self.pass_bytes = placeholder.numel() * placeholder.element_size()
        self._placeholder = placeholder
        self._make = make
        self._made: Slices | None = None
        self._is_same: dict[tuple[object, ...], bool] = {}

    def multiply(self, values: torch.Tensor, bias: torch.Tensor | None, ring: Ring) -> torch.Tensor:
        """The same as `torch.nn.functional.linear` with the whole matrix.

        Args:
            values: shape (..., columns).
            bias: shape (rows,), or None.
            ring: counts what was read and waited for.

        Returns:
            Shape (..., rows).
        """
        if self._made is None:
            self._made = self._make()
        slices, found = self._made, None
        before, begin = slices.read_bytes, time.perf_counter()
        for rows, memory in slices.each():
            what = f"{self._placeholder.fqn}[{rows.start}:{rows.stop}]"
            ring.waited(what, begin, slices.read_bytes - before)
            part = self._product(values, self._seen(slices, memory), bias, rows)
            if found is None:
                found = part.new_empty((*part.shape[:-1], slices.target.shape[0]))
            found[..., rows.start : rows.stop] = part
            before, begin = slices.read_bytes, time.perf_counter()
        if found is None:
            raise RuntimeError(f"{self._placeholder.fqn}: a matrix without rows is not read in slices")
        return found

    def drop(self) -> None:
        """Keep nothing."""
        made, self._made = self._made, None
        if made is not None:
            made.close()

    def doubt(self) -> None:
        """Use nothing of what was read: a file was another one meanwhile."""
        if self._made is not None:
            self._made.drop()

    def _product(
        self, values: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, rows: range
    ) -> torch.Tensor:
        alone = self._parameter(matrix[rows.start : rows.stop])
        own = None if bias is None else bias[rows.start : rows.stop]
        facts = (alone.requires_grad, bias is None, torch.get_num_threads())
        kind = (rows.start, values.shape, values.stride(), values.dtype, *facts)
        is_same = self._is_same.get(kind)
        if is_same:
            return functional.linear(values, alone, own)
        whole = functional.linear(values, self._parameter(matrix), bias)[..., rows.start : rows.stop]
        if is_same is None:
            if len(self._is_same) >= _MAX_KNOWN:
                self._is_same.clear()
            self._is_same[kind] = _same_bits(whole, functional.linear(values, alone, own))
        return whole

    @staticmethod
    def _seen(slices: Slices, memory: Bytes) -> torch.Tensor:
        with torch.inference_mode(False):
            return as_tensor(memory[slices.begin :], slices.target.dtype, slices.target.shape)

    def _parameter(self, tensor: torch.Tensor) -> nn.Parameter:
        """As it would be in its module: torch multiplies in another way with what has no gradient.

        Of values that do not lie one after another it would copy the whole matrix.
        """
        with torch.inference_mode(False):
            return nn.Parameter(tensor.detach(), requires_grad=self._placeholder.requires_grad)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
