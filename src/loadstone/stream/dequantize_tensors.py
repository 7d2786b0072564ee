"""The operations of the decoders of GGUF blocks on torch's tensors, of any device; see `dequantize_ops.Ops`.

Every operation on floats is one that IEEE 754 defines to the last bit, and each is an operation of its own, so that
nothing is fused: a device gives the bits that the host gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from loadstone.dtypes import GGML_BLOCKS_BY_NAME
from loadstone.stream.dequantize import KERNELS
from loadstone.stream.dequantize_ops import Table

_WORDS = {2: (torch.int16, torch.int32, 0xFFFF), 4: (torch.int32, torch.int64, 0xFFFFFFFF)}


def dequantize(raw: torch.Tensor, encoding: str) -> torch.Tensor:
    """Decode whole blocks.

    Args:
        raw: the blocks, one after the other, uint8 of shape (nbytes,).
        encoding: ggml's name for their format, one of `KERNELS`.

    Returns:
        Their values, float32 of shape (numel,), where the blocks are.
    """
    block = GGML_BLOCKS_BY_NAME[encoding]
    blocks = raw.reshape(-1, block.block_nbytes)
    out = torch.empty((len(blocks), block.block_numel), dtype=torch.float32, device=raw.device)
    KERNELS[encoding](_OPS, blocks, out)
    return out.reshape(-1)


class _Tensors:
    """The operations."""

    def half(self, blocks: torch.Tensor, offset: int) -> torch.Tensor:
        return self.field(blocks, offset, 2).view(torch.float16).float()

    def field(self, blocks: torch.Tensor, offset: int, nbytes: int) -> torch.Tensor:
        return blocks[:, offset : offset + nbytes].contiguous()

    def words(self, packed: torch.Tensor, nbytes: int) -> torch.Tensor:
        narrow, wide, mask = _WORDS[nbytes]
        return packed.view(narrow).to(wide) & mask

    def bytes_of(self, words: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack(list(words), dim=1).to(torch.int32).view(torch.uint8)

    def as_half(self, words: torch.Tensor) -> torch.Tensor:
        return words.to(torch.int16).view(torch.float16).float()

    def floats(self, values: torch.Tensor) -> torch.Tensor:
        return values.float()

    def signed(self, values: torch.Tensor) -> torch.Tensor:
        return values.view(torch.int8)

    def wide(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(torch.int32)

    def stack(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack(list(values), dim=-1)

    def join(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(values), dim=-1)

    def digits(self, packed: torch.Tensor, width: int) -> torch.Tensor:
        return self.spread(packed, tuple(range(0, 8, width)), (1 << width) - 1, 1)

    def repeat(self, values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(16, dim=1)

    def spread(self, packed: torch.Tensor, shifts: tuple[int, ...], mask: int, item: int) -> torch.Tensor:
        runs = packed.reshape(len(packed), -1, 1, item)
        return (runs >> _shifts_on_device(shifts, packed.device)).bitwise_and_(mask).view(len(packed), -1)

    def spread_high(self, packed: torch.Tensor, shifts: tuple[int, ...], mask: int, item: int) -> torch.Tensor:
        runs = packed.reshape(len(packed), -1, item)
        both = torch.stack([runs << 4, runs], dim=2).reshape(len(packed), -1)
        return self.spread(both, shifts, mask, item)

    def merge(self, low: torch.Tensor, high: torch.Tensor, shift: int = 0) -> torch.Tensor:
        return low.bitwise_or_(high << shift)

    def centre(self, quants: torch.Tensor, zero: int) -> torch.Tensor:
        return quants.view(torch.int8).sub_(zero)

    def take(self, table: Table, index: torch.Tensor) -> torch.Tensor:
        rows = _on_device(table, index.device).index_select(0, index.to(torch.int32).reshape(-1))
        return rows.reshape(*index.shape, *table.entries.shape[1:])

    def look_up(self, codes: torch.Tensor, values: Sequence[int], out: torch.Tensor) -> None:
        table = _floats_on_device(tuple(values), codes.device)
        torch.index_select(table, 0, codes.to(torch.int32).reshape(-1), out=out.view(-1))

    def scale(self, quants: torch.Tensor, out: torch.Tensor, factor: torch.Tensor) -> None:
        # Numbers of both kinds in one operation: on accelerators nothing lies in between.
        torch.mul(_groups(quants, factor), factor.unsqueeze(-1), out=_groups(out, factor))

    def scale_in_place(self, out: torch.Tensor, factor: torch.Tensor) -> None:
        _groups(out, factor).mul_(factor.unsqueeze(-1))

    def lift(self, out: torch.Tensor, values: torch.Tensor) -> None:
        _groups(out, values).add_(values.unsqueeze(-1))

    def lower(self, out: torch.Tensor, values: torch.Tensor) -> None:
        _groups(out, values).sub_(values.unsqueeze(-1))


_OPS = _Tensors()


def _groups(out: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return out.reshape(len(out), values.shape[1], -1)


@cache
def _on_device(table: Table, device: torch.device) -> torch.Tensor:
    return _arrived(torch.from_numpy(table.entries.copy()), device)


@cache
def _floats_on_device(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return _arrived(torch.tensor(values, dtype=torch.float32), device)


@cache
def _shifts_on_device(shifts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return _arrived(torch.tensor(shifts, dtype=torch.uint8).view(-1, 1), device)


def _arrived(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on a device, there for whichever of its streams uses it."""
    with torch.inference_mode(False):
        made = values.to(device)
    made[:1].cpu()  # returns when it is over
    return made
