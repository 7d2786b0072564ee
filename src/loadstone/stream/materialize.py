"""From host bytes to the module's tensors: views of the file where nothing changes, decoded memory otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch

from loadstone.architecture.gguf import apply_layout
from loadstone.architecture.keymap import Assignment, Conversion, KeyMap, Part, Target
from loadstone.checkpoint.values import Checkpoint, TensorInfo
from loadstone.dtypes import DTYPES, nbytes_of
from loadstone.errors import UnsupportedDtype
from loadstone.hardware.pages import Bytes
from loadstone.stream.host import Ahead, fill_for
from loadstone.stream.read import Batch, Reader
from loadstone.stream.spans import Fill
from loadstone.stream.transfer import NUM_THREADS, Link, LockedStaging, device_fill, link_for


@dataclass(slots=True)
class Materialized:
    """The tensors of the module.

    Attributes:
        tensors: by fqn, on the device.
        mapped_bytes: how many bytes are used where they lie in the file.
        read_bytes: how many were read and decoded.
        read_s: how long that took, imports that ran meanwhile included.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    mapped_bytes: int = 0
    read_bytes: int = 0
    read_s: float = 0.0


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of that name.

    Raises:
        UnsupportedDtype: this torch has none.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedDtype(f"dtype {name}: torch {torch.__version__} does not have it; a newer torch may.")
    return dtype


def _check_dtype(info: TensorInfo) -> None:
    if not hasattr(torch, info.dtype):
        raise UnsupportedDtype(
            f"{info.file}, tensor {info.name!r}: torch {torch.__version__} does not have its dtype {info.dtype}; a "
            "newer torch may. Leave the tensor out with select=, or use another version of this checkpoint."
        )


def as_tensor(data: Bytes, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """A tensor over bytes that are kept alive by it; nothing is copied."""
    if data.size == 0:
        return torch.empty(tuple(shape), dtype=torch_dtype(dtype))
    return torch.frombuffer(data, dtype=torch_dtype(dtype)).view(tuple(shape))


class Materializer:
    """Makes the tensors of one load.

    Args:
        checkpoint: where they come from.
        ahead: what was begun before.
        device: where they go that are not said to go elsewhere.
    """

    def __init__(self, checkpoint: Checkpoint, ahead: Ahead, device: torch.device) -> None:
        self._tensors = checkpoint.tensors
        self._ahead = ahead
        self._device = device
        self._elsewhere: Mapping[str, torch.device] = {}
        self._links: dict[torch.device, Link | None] = {}
        self._made = Materialized()

    def know(self, checkpoint: Checkpoint) -> None:
        """Make tensors from a checkpoint that holds more than the one before."""
        self._tensors = checkpoint.tensors

    def run(
        self, keymap: KeyMap, targets: Mapping[str, Target], elsewhere: Mapping[str, torch.device] | None = None
    ) -> Materialized:
        """Make every tensor of the key map.

        Args:
            keymap: what fills what; shapes were checked.
            targets: by fqn.
            elsewhere: where those go that go to another device than most, by fqn, or by the name of a conversion.

        Returns:
            The tensors on their devices, all bytes in place (mapped ones come in as they are touched).
        """
        self._elsewhere = elsewhere or {}
        devices = {self._device, *self._elsewhere.values()}
        self._links = {device: link_for(device) for device in devices}
        fills: dict[torch.device, list[Fill]] = {device: [] for device in devices}
        later: list[tuple[Assignment, Target]] = []
        for assignment in keymap.assignments:
            for part in assignment.parts:
                _check_dtype(self._tensors[part.source])
            target, device = targets[assignment.target], self._device_of(assignment.target)
            plan = self._fill if self._links[device] is None else self._send
            if not plan(assignment, target, fills[device]):
                later.append((assignment, target))
        batches = self._read(fills)
        self._ahead.wait()
        # What was decoded to be worked on is dropped after its last use, so that it lies beside one result, not all.
        uses = Counter(part.source for assignment, _ in later for part in assignment.parts)
        uses.update(name for conversion in keymap.conversions for name in conversion.sources)
        for assignment, target in later:
            self._made.tensors[assignment.target] = self._compose(assignment, target)
            self._drop_used(uses, [part.source for part in assignment.parts])
        for conversion in keymap.conversions:
            self._convert(conversion)
            self._drop_used(uses, conversion.sources)
        self._made.read_bytes = sum(batch.done_bytes for batch in batches) + self._ahead.read_bytes
        self._made.read_s = max(batch.seconds for batch in batches) + self._ahead.read_s
        return self._made

    def _device_of(self, name: str) -> torch.device:
        """Where a tensor goes, by its fqn, or what a conversion of that name makes."""
        return self._elsewhere.get(name, self._device)

    def _drop_used(self, uses: Counter[str], names: Sequence[str]) -> None:
        uses.subtract(names)
        for name in names:
            if not uses[name]:
                self._ahead.decoded.pop(name, None)

    def _read(self, fills: Mapping[torch.device, Sequence[Fill]]) -> list[Batch]:
        """Run fills to their end, those of all devices side by side."""
        sends = any(fills[device] for device, link in self._links.items() if link is not None)
        if sends and not self._elsewhere:
            self._ahead.stop_paging()  # what is not in by now is read past the page cache, or both would read it
        with ExitStack() as stack:
            batches = [self._submitted(self._links[device], some, stack) for device, some in fills.items()]
            for batch in batches:
                batch.wait()
            for link in self._links.values():
                if link is not None:
                    link.join()
        return batches

    def _submitted(self, link: Link | None, fills: Sequence[Fill], stack: ExitStack) -> Batch:
        """Fills under way, by a reader of their own where they go to a device."""
        if link is None:
            return self._ahead.reader.submit(fills)
        stack.callback(link.close)
        num_links = sum(one is not None for one in self._links.values())
        reader = Reader(
            observer=self._ahead.observer,
            staging=lambda: LockedStaging(link),
            num_threads=max(1, NUM_THREADS // num_links),
        )
        stack.callback(reader.close)
        link.fork()
        return reader.submit(fills)

    def source(self, name: str, dtype: str | None = None) -> torch.Tensor:
        """One checkpoint tensor as it is called there, as a view of the file where possible.

        Args:
            name: the checkpoint's name.
            dtype: cast to this dtype; None keeps the stored one (float32 for GGUF blocks).
        """
        info = self._tensors[name]
        _check_dtype(info)
        dtype = dtype or info.dtype
        ready = self._ahead.decoded.get(name)
        if ready is not None and ready.dtype == dtype:
            self._ahead.wait()
            return as_tensor(ready.data, dtype, info.shape)
        if self._ahead.is_mappable(info, dtype):
            return as_tensor(self._ahead.stored(info), dtype, info.shape)
        if info.encoding is not None:
            return self._decode(info, dtype)
        return self._stored(info).to(torch_dtype(dtype))

    def _stored(self, info: TensorInfo) -> torch.Tensor:
        data = self._ahead.stored(info)
        width = max(1, DTYPES[info.dtype].bits // 8)
        if data.ctypes.data % width:
            data = data.copy()
        if info.strides is None:
            return as_tensor(data, info.dtype, info.shape)
        return as_tensor(data, info.dtype, (data.size // width,)).as_strided(info.shape, info.strides)

    def _decode(self, info: TensorInfo, dtype: str) -> torch.Tensor:
        data = self._ahead.arena.take(nbytes_of(DTYPES[dtype], info.numel))
        fill = fill_for(info, dtype, data)
        if fill is None:
            return self._decode(info, "float32").to(torch_dtype(dtype))
        fill.kernel(self._ahead.stored(info), data)
        return as_tensor(data, dtype, info.shape)

    def _fill(self, assignment: Assignment, target: Target, fills: list[Fill]) -> bool:
        """On the host: a view where nothing changes, otherwise parts that a kernel reads into the final memory."""
        if self._view(assignment, target):
            return True
        if self._device_of(assignment.target).type != "cpu" or not assignment.is_plain:
            return False
        data = self._ahead.arena.take(nbytes_of(DTYPES[target.dtype], prod(target.shape)))
        planned = []
        for part in assignment.parts:
            info = self._tensors[part.source]
            fill = fill_for(info, target.dtype, data[self._stretch(part, info, target.dtype)])
            if fill is None:
                return False
            planned.append(fill)
        fills.extend(planned)
        self._made.tensors[assignment.target] = as_tensor(data, target.dtype, target.shape)
        return True

    def _view(self, assignment: Assignment, target: Target) -> bool:
        """A whole tensor that needs no work: take it where it lies."""
        first = assignment.parts[0]
        if len(assignment.parts) != 1 or not assignment.is_plain:
            return False
        info, device = self._tensors[first.source], self._device_of(assignment.target)
        if info.numel != prod(target.shape):
            return False
        ready = self._ahead.decoded.get(info.name)
        if ready is not None and ready.dtype == target.dtype:
            tensor = as_tensor(ready.data, target.dtype, target.shape)
        elif self._ahead.is_mappable(info, target.dtype):
            # Only a CPU's tensor stays a view; elsewhere it is read now.
            data = self._ahead.maps.bytes_of(info) if device.type == "cpu" else self._ahead.stored(info)
            tensor = as_tensor(data, target.dtype, target.shape)
            self._made.mapped_bytes += info.nbytes
        else:
            return False
        if device.type != "cpu":
            self._ahead.wait()
        self._made.tensors[assignment.target] = tensor.to(device)
        return True

    def _send(self, assignment: Assignment, target: Target, fills: list[Fill]) -> bool:
        """To a device: plain parts are read into page-locked memory, sent as stored, and cast over there."""
        infos = [self._tensors[part.source] for part in assignment.parts]
        stored = all(info.encoding is None and info.strides is None and DTYPES[info.dtype].bits >= 8 for info in infos)
        device = self._device_of(assignment.target)
        link = self._links[device]
        if link is None or not stored or not assignment.is_plain:
            return False
        wanted = torch_dtype(target.dtype)
        with torch.inference_mode(False):  # the reader's threads write to it, which are in no such mode
            whole = torch.empty(target.shape, dtype=wanted, device=device)
            flat = whole.view(-1).view(torch.uint8)
        for part, info in zip(assignment.parts, infos, strict=True):
            piece = flat[self._stretch(part, info, target.dtype)]
            fills.append(device_fill(info, (torch_dtype(info.dtype), wanted), piece, link))
        self._made.tensors[assignment.target] = whole
        return True

    @staticmethod
    def _stretch(part: Part, info: TensorInfo, dtype: str) -> slice:
        begin = nbytes_of(DTYPES[dtype], part.start)
        return slice(begin, begin + nbytes_of(DTYPES[dtype], info.numel))

    def _compose(self, assignment: Assignment, target: Target) -> torch.Tensor:
        """The general way: each part as a tensor, rearranged, cast on the device, copied to its stretch."""
        wanted, device = torch_dtype(target.dtype), self._device_of(assignment.target)
        first = assignment.parts[0]
        if len(assignment.parts) == 1 and first.index is None:
            return self._part(first, target.dtype, device).to(wanted).view(target.shape).contiguous()
        whole = torch.empty(prod(target.shape), dtype=wanted, device=device)
        for part in assignment.parts:
            piece = self._part(part, target.dtype, device)
            if part.index is None:
                place = whole[part.start : part.start + piece.numel()]
            else:
                place = whole.view(target.shape)[part.index]
            place.copy_(piece.reshape(place.shape))
        return whole.view(target.shape)

    def _part(self, part: Part, dtype: str, device: torch.device) -> torch.Tensor:
        info = self._tensors[part.source]
        if part.layout is not None:
            return _rearranged(part.layout, self.source(part.source, "float32")).to(device)
        # On a GPU the stored dtype travels and is cast there; what the CPU decodes is cast where it lies.
        direct = device.type != "cpu" and info.encoding is None
        return self.source(part.source, None if direct else dtype).to(device)

    def _convert(self, conversion: Conversion) -> None:
        sources = [self.source(name, dtype) for name, dtype in zip(conversion.sources, conversion.dtypes, strict=True)]
        for fqn, tensor in conversion.run(sources).items():
            self._made.tensors[fqn] = tensor.to(self._device_of(conversion.name))


def _rearranged(layout: Any, tensor: torch.Tensor) -> torch.Tensor:
    """Apply a GGUF layout, which is written for numpy, in float32: what it adds must not be rounded twice."""
    return torch.from_numpy(np.ascontiguousarray(apply_layout(layout, tensor.numpy())))
