"""Choices that can be made from values alone: which dtype, which device, and why."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadstone.checkpoint.values import Checkpoint, Format
from loadstone.dtypes import ALIASES, DTYPES
from loadstone.errors import DeviceUnavailable, InvalidConfig
from loadstone.hardware.spec import Device
from loadstone.units import format_bytes

# Fields that make a class build that many parts. Each part holds at least one tensor, so a file with fewer tensors than
# parts cannot be what the config describes.
_COUNTS = re.compile(
    r"(num_hidden_layers|n_layers?|num_layers|num_(encoder|decoder)_layers|(encoder|decoder)_layers|depth|num_experts"
    r"|num_local_experts|n_routed_experts|num_hidden_groups|num_blocks|num_(codebooks|stages))"
)
# Layers may share their tensors (ALBERT); no published model has this many.
_PLAUSIBLE_COUNT = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was chosen, and why, in words for the report."""

    value: str
    reason: str


def choose_dtype(checkpoint: Checkpoint, requested: str | None) -> Choice:
    """The floating-point dtype of the model as a whole.

    Args:
        checkpoint: its config and its tensors.
        requested: torch's name or an alias, "auto" (as stored, as in transformers), or None (Loadstone's choice, which
            is as stored for now).

    Returns:
        torch's name of a dtype.

    Raises:
        ValueError: `requested` is no floating-point dtype.
    """
    if requested not in (None, "auto"):
        name = ALIASES.get(str(requested), str(requested))
        if name not in DTYPES or not DTYPES[name].floating or DTYPES[name].bits < 16:
            raise ValueError(
                f'dtype={requested!r}: expected "auto" or a floating-point dtype such as bfloat16, float16 or float32.'
            )
        return Choice(value=name, reason="asked for")
    if any(info.encoding is not None for info in checkpoint.tensors.values()):
        encodings = sorted({info.encoding for info in checkpoint.tensors.values() if info.encoding})
        return Choice(value="float32", reason=f"{', '.join(encodings)} blocks are decoded to float32")
    declared = _declared_dtype(checkpoint.config or {})
    if declared is not None:
        return Choice(value=declared, reason="as config.json says")
    stored = _first_floating(checkpoint)
    if stored is not None:
        return Choice(value=stored, reason="as stored")
    return Choice(value="float32", reason="no floating-point tensor is stored")


def _declared_dtype(config: Mapping[str, Any]) -> str | None:
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        if isinstance(value, str):
            name = value.removeprefix("torch.")
            if name in DTYPES and DTYPES[name].floating and DTYPES[name].bits >= 16:
                return name
    return None


def _first_floating(checkpoint: Checkpoint) -> str | None:
    """transformers' rule: the first floating-point tensor of the first file, by name in safetensors."""
    infos = [info for info in checkpoint.tensors.values() if info.file == checkpoint.files[0].path]
    if checkpoint.format is Format.SAFETENSORS:
        infos.sort(key=lambda info: info.name)
    return next((info.dtype for info in infos if DTYPES[info.dtype].floating and DTYPES[info.dtype].bits >= 16), None)


def choose_device(devices: Sequence[Device], requested: str | None, nbytes: int) -> Choice:
    """Where the model goes.

    Args:
        devices: what is there, the host last.
        requested: a device as torch writes it, or None for Loadstone's choice.
        nbytes: what the weights take.

    Raises:
        DeviceUnavailable: the device asked for is not there.
    """
    ids = [device.id for device in devices]
    if requested is not None:
        wanted = f"{requested}:0" if requested in {"cuda", "xpu"} else requested
        if wanted not in ids and wanted != "meta":
            raise DeviceUnavailable(f'device="{requested}" is not on this machine, which has: {", ".join(ids)}.')
        return Choice(value=wanted, reason="asked for")
    for device in devices:
        if device.kind != "cpu" and device.free_bytes > nbytes:
            return Choice(value=device.id, reason=f"{device.name} has {format_bytes(device.free_bytes)} free")
    if len(devices) > 1:
        return Choice(value="cpu", reason=f"no accelerator has {format_bytes(nbytes)} free")
    return Choice(value="cpu", reason="no accelerator here")


def check_counts(config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse a config that would make a class build more parts than the files have tensors.

    Raises:
        InvalidConfig: naming the field.
    """
    limit = max(_PLAUSIBLE_COUNT, len(checkpoint.tensors))
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_counts(value, checkpoint)
        elif _COUNTS.fullmatch(key) and isinstance(value, int) and value > limit:
            raise InvalidConfig(
                f"{checkpoint.root / 'config.json'}: {key} is {value:,}, but the checkpoint holds only "
                f"{len(checkpoint.tensors):,} tensors; nothing was built. Use the config.json that belongs to it."
            )
