"""Parameters that are put on the disk because there is no file that holds them: written once, to a file without a name.

Nothing is left of it when the process ends, however it ends.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from loadstone.architecture.keymap import Assignment, Part, Target
from loadstone.checkpoint.files import version_of, write_at
from loadstone.checkpoint.values import Checkpoint, CheckpointFile, Format, TensorInfo
from loadstone.errors import DestinationError, DiskFull
from loadstone.stream.refill import Wanted
from loadstone.stream.source import ALIGNMENT
from loadstone.units import format_bytes


class Spill:
    """A file without a name that holds parameters; close it.

    Args:
        folder: on the disk that has room.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, TensorInfo] = {}
        self._end = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._fd, name = tempfile.mkstemp(prefix="loadstone-", dir=folder)
            Path(name).unlink()
        except OSError as error:
            raise DestinationError(
                f"{folder}: expected to write parameters there, found: {error.strerror or error}; set LOADSTONE_CACHE "
                "to a folder that may be written to."
            ) from None
        # The name under which the system opens it once more, as often as it takes.
        self._path = Path(f"/dev/fd/{self._fd}")

    def add(self, fqn: str, tensor: torch.Tensor) -> None:
        """Write one parameter.

        Raises:
            DiskFull: the disk has no room for it.
        """
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        begin = -(-self._end // ALIGNMENT) * ALIGNMENT
        try:
            write_at(self._fd, data.data, begin)
        except OSError as error:
            fault = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else DestinationError
            raise fault(
                f"{self._folder}: expected room for {fqn} ({format_bytes(data.size)}), found: "
                f"{error.strerror or error}; free some, or set LOADSTONE_CACHE to a folder on another disk."
            ) from None
        self._end = begin + data.size
        self._tensors[fqn] = TensorInfo(
            name=fqn,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            file=self._path,
            offset=begin,
            nbytes=data.size,
        )

    def finish(self) -> Checkpoint:
        """What was written, as a checkpoint; it is on the disk, and no longer in the page cache."""
        os.ftruncate(self._fd, -(-self._end // ALIGNMENT) * ALIGNMENT)
        os.fsync(self._fd)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        version = version_of(os.fstat(self._fd))
        file = CheckpointFile(path=self._path, nbytes=version.nbytes, version=version)
        return Checkpoint(format=Format.SAFETENSORS, root=self._folder, files=(file,), tensors=self._tensors)

    def close(self) -> None:
        """The file ends with this, unless somebody still reads it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def wanted_from(checkpoint: Checkpoint, targets: Mapping[str, Target]) -> dict[str, Wanted]:
    """Each parameter from the tensor of its own name."""
    return {
        fqn: Wanted(assignment=Assignment(target=fqn, parts=(Part(source=fqn),)), target=target)
        for fqn, target in targets.items()
        if fqn in checkpoint.tensors
    }
