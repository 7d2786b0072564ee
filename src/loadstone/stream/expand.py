"""Stored parameters -> what is computed with, where that is: blocks are decoded, numbers cast and put in their order.

A parameter is expanded a strip at a time, so that what is needed beside it stays small, and in the order in which the
host does it: decoded to float32, put in order, cast. So the numbers are the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from loadstone.architecture.gguf_layouts import apply_layout, computes, moves_rows
from loadstone.checkpoint.values import TensorInfo
from loadstone.plan.reserve import STRIP_NUMEL
from loadstone.stream.dequantize_tensors import dequantize
from loadstone.stream.stored import Stored, StoredPart


def expand(stored: Stored, data: torch.Tensor, out: torch.Tensor, *, late: bool = False) -> None:
    """Make a parameter of what its files hold.

    Args:
        stored: what that is.
        data: its bytes, of any device, uint8 of shape (stored.nbytes,).
        out: the parameter, contiguous.
        late: the device of `out` may do it when this has returned.
    """
    for one in stored.parts:
        _expand(one, data[one.begin : one.begin + one.info.nbytes], out, late=late)


def _expand(one: StoredPart, raw: torch.Tensor, out: torch.Tensor, *, late: bool) -> None:
    info, layout = one.info, one.part.layout
    stretch = slice(one.part.start, one.part.start + info.numel)
    place = out.view(-1)[stretch] if one.part.index is None else out[one.part.index]
    if layout is not None and moves_rows(layout):  # of blocks as well as of numbers: a block is of one row
        rows = raw.to(out.device, non_blocking=late).view(info.shape[0], -1)
        raw, layout = apply_layout(layout, rows).reshape(-1), None
    pieces = _contiguous(place) if layout is None else ()
    if pieces:
        nbytes = info.nbytes // len(pieces)
        for number, piece in enumerate(pieces):
            _decode(info, raw[number * nbytes : (number + 1) * nbytes], piece.view(-1), late=late)
        return
    whole = torch.empty(info.shape, dtype=torch.float32 if computes(layout) else out.dtype, device=out.device)
    _decode(info, raw, whole.view(-1), late=late)
    place.copy_(apply_layout(layout, whole).reshape(place.shape))


def _contiguous(place: torch.Tensor) -> Sequence[torch.Tensor]:
    """A place in pieces that are contiguous, in order and all alike: itself, or its entries; none for other places."""
    if place.is_contiguous():
        return (place,)
    return tuple(place) if place.dim() > 2 and place[0].is_contiguous() else ()


def _decode(info: TensorInfo, raw: torch.Tensor, values: torch.Tensor, *, late: bool) -> None:
    """A stretch of a tensor, into the memory of its numbers."""
    for begin in range(0, values.numel(), STRIP_NUMEL):
        strip = values[begin : begin + STRIP_NUMEL]
        first, end = (count * info.nbytes // info.numel for count in (begin, begin + strip.numel()))
        strip.copy_(_numbers(info, raw[first:end].to(values.device, non_blocking=late)))


def _numbers(info: TensorInfo, near: torch.Tensor) -> torch.Tensor:
    if info.encoding is not None:
        return dequantize(near, info.encoding)
    dtype: Any = getattr(torch, info.dtype)
    return near.view(dtype)
