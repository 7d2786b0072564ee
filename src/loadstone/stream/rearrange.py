"""Tensors that lie otherwise in their file than in the module, put right by the threads that read them.

A `Rearranged` is the kernel of such a tensor: its chunks are decoded into memory beside the slot's parameters, in any
order and by any thread, and whichever thread delivers the last of them moves the whole to where it belongs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadstone.architecture.gguf_layouts import apply_layout, moves_rows
from loadstone.architecture.keymap import Part, Target
from loadstone.checkpoint.values import TensorInfo
from loadstone.dtypes import DTYPES, nbytes_of
from loadstone.stream.convert import Bytes, Kernel, copy, kernel_for
from loadstone.stream.host import fill_for
from loadstone.stream.spans import Fill

Array = NDArray[Any]
_NOWHERE = np.empty(0, np.uint8)
# numpy lacks some of torch's dtypes; what is only moved is moved as integers of the same width.
_AS_INTEGERS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def decoded_dtype(part: Part, info: TensorInfo, target: Target) -> str:
    """What a part is decoded to before it is rearranged: what a layout adds must not be rounded twice."""
    if part.layout is not None:
        return "float32"
    return info.dtype if info.strides is not None else target.dtype


def decoded_nbytes(part: Part, info: TensorInfo, target: Target) -> int:
    """How much memory that takes."""
    if info.strides is not None:
        return info.nbytes
    return nbytes_of(DTYPES[decoded_dtype(part, info, target)], info.numel)


def rearranging_fill(part: Part, info: TensorInfo, target: Target) -> Fill | None:
    """How a part that must be rearranged is read into memory of its own; its destination is still nowhere.

    Returns:
        None where numpy cannot do it.
    """
    dtype = decoded_dtype(part, info, target)
    if kernel_for(dtype, target.dtype) is None or DTYPES[target.dtype].bits not in _AS_INTEGERS:
        return None
    if info.strides is not None:
        if part.layout is not None or DTYPES[info.dtype].bits not in _AS_INTEGERS:
            return None
        return Fill(file=info.file, offset=info.offset, nbytes=info.nbytes, destination=_NOWHERE, fresh=False)
    return fill_for(info, dtype, _NOWHERE, fresh=False)


class Rearranged:
    """A kernel that counts what has been decoded, and places the tensor when it is whole.

    Args:
        decode: turns stored bytes into decoded ones.
        nbytes: how many stored bytes there are.
        place: moves the decoded tensor.
    """

    def __init__(self, decode: Kernel, nbytes: int, place: Callable[[], None]) -> None:
        self._decode = decode
        self._nbytes = self._left_bytes = nbytes
        self._place = place
        self._lock = threading.Lock()

    def __call__(self, source: Bytes, destination: Bytes) -> None:
        """Decode a chunk."""
        self._decode(source, destination)
        with self._lock:
            self._left_bytes -= source.size
            whole = self._left_bytes == 0
        if whole:
            self._place()

    def restart(self) -> None:
        """Begin anew; what was read before may have been given up half-way."""
        self._left_bytes = self._nbytes


def placer(part: Part, info: TensorInfo, target: Target, decoded: Bytes, whole: Bytes) -> Callable[[], None]:
    """What moves a decoded part to its place.

    Args:
        part: which stretch or slice of the target it fills, and how it is laid out.
        info: the tensor.
        target: what the module wants.
        decoded: the memory it was decoded into.
        whole: the target's bytes.
    """
    dtype = decoded_dtype(part, info, target)
    numbers = _AS_INTEGERS[DTYPES[target.dtype].bits]
    if part.index is None:
        begin = nbytes_of(DTYPES[target.dtype], part.start)
        place = whole[begin : begin + nbytes_of(DTYPES[target.dtype], info.numel)].view(numbers)
    else:
        place = whole.view(numbers).reshape(target.shape)[part.index]
    rows = _row_order(part, info)
    if rows is not None and dtype == target.dtype and part.index is None:
        return _row_mover(decoded.view(numbers).reshape(len(rows), -1), rows, place)
    arranged = _arranger(part, info, dtype, decoded)
    cast = kernel_for(dtype, target.dtype) or copy

    def move() -> None:
        values = arranged()
        if dtype != target.dtype:
            made = np.empty(nbytes_of(DTYPES[target.dtype], info.numel), np.uint8)
            cast(np.ascontiguousarray(values).reshape(-1).view(np.uint8), made)
            values = made
        np.copyto(place, np.ascontiguousarray(values).reshape(-1).view(numbers).reshape(place.shape))

    return move


def _row_mover(source: Array, rows: Array, place: Array) -> Callable[[], None]:
    destination = place.reshape(source.shape)

    def move() -> None:
        # Without a mode, `take` would gather into memory of its own first.
        np.take(source, rows, axis=0, out=destination, mode="clip")

    return move


def _row_order(part: Part, info: TensorInfo) -> Array | None:
    """Which stored row each row is, where the layout only changes their order."""
    layout = part.layout
    if not moves_rows(layout) or info.strides is not None:
        return None
    order: Array = apply_layout(layout, np.arange(info.shape[0]).reshape(-1, 1)).reshape(-1)
    return order


def _arranger(part: Part, info: TensorInfo, dtype: str, decoded: Bytes) -> Callable[[], Array]:
    if info.strides is not None:
        elements = decoded.view(_AS_INTEGERS[DTYPES[dtype].bits])
        strides = [stride * elements.itemsize for stride in info.strides]
        return lambda: np.lib.stride_tricks.as_strided(elements, info.shape, strides, writeable=False)
    if part.layout is None:
        return lambda: decoded
    floats = decoded.view(np.float32).reshape(info.shape)
    return lambda: apply_layout(part.layout, floats)


def is_rearranged(part: Part, info: TensorInfo) -> bool:
    """Whether a part cannot be read straight into its place."""
    return part.layout is not None or part.index is not None or info.strides is not None


def target_nbytes(target: Target) -> int:
    """What the target takes in memory."""
    return nbytes_of(DTYPES[target.dtype], prod(target.shape))
