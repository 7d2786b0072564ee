"""Machines as files: one can be saved, given to somebody who plans for it, and some come with the package."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from loadstone.checkpoint.files import read_json_object
from loadstone.checkpoint.hub_cache import local_path
from loadstone.dtypes import DTYPES
from loadstone.errors import InvalidMachine, SourceError
from loadstone.hardware.json_values import ADVICE, from_plain, to_plain, write_json
from loadstone.hardware.spec import Device, Disk, Machine

VERSION = 1
_MARK = "loadstone_machine"
_MAX_BYTES = 1_000_000
_GALLERY = Path(__file__).parent / "gallery"
_DEVICE_ID = re.compile(r"cpu|mps|(cuda|xpu):\d{1,4}")


def to_json(machine: Machine) -> dict[str, Any]:
    """A machine as plain data, with the version of its layout."""
    return {_MARK: VERSION, **to_plain(machine)}


def from_json(value: dict[str, Any], where: str) -> Machine:
    """The machine that plain data describes.

    Args:
        value: what `to_json` gave.
        where: what a message begins with, usually the file.

    Raises:
        InvalidMachine: it is another tool's, of a version that is not known, or describes what cannot be.
    """
    if _MARK not in value:
        keys = ", ".join(list(value)[:4]) or "none"
        raise InvalidMachine(
            f'{where}: expected a machine that Loadstone saved, with the key "{_MARK}", found the keys {keys}; make '
            "one with `loadstone machine --save`."
        )
    version = value[_MARK]
    if version != VERSION or isinstance(version, bool):
        raise InvalidMachine(
            f"{where}: expected version {VERSION} of the layout, found {version!r}; save it anew with this Loadstone, "
            "or use the one that saved it."
        )
    fields = {key: item for key, item in value.items() if key != _MARK}
    machine = from_plain(Machine, fields, f"{where}: machine")
    _check(machine, f"{where}: machine")
    return machine


def read_machine(path: Path) -> Machine:
    """The machine in a file.

    Raises:
        InvalidMachine: there is no such file, or none that describes a machine.
    """
    try:
        value = read_json_object(path, max_bytes=_MAX_BYTES, fault=InvalidMachine, advice=ADVICE)
    except SourceError as error:  # the words for what is no readable file are the same
        raise InvalidMachine(str(error)) from None
    return from_json(value, str(path))


def save_machine(machine: Machine, path: Path) -> None:
    """Write a machine to a file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    write_json(path, to_json(machine))


def gallery() -> list[str]:
    """The names of the machines that come with the package."""
    return sorted(path.stem for path in _GALLERY.glob("*.json"))


def find_machine(name_or_path: str | Path) -> Machine:
    """A machine of the gallery, or one that was saved.

    Args:
        name_or_path: a name of `gallery()`, or the path of a file.

    Raises:
        InvalidMachine: it is neither, or the file describes no machine.
    """
    name = str(name_or_path)
    if name in gallery():
        return read_machine(_GALLERY / f"{name}.json")
    path = local_path(name_or_path)
    if name and path.exists():
        return read_machine(path)
    import difflib  # a machine that is found is read sooner

    close = difflib.get_close_matches(path.name.removesuffix(".json"), gallery(), n=1, cutoff=0.4)
    meant = f'; did you mean "{close[0]}"?' if close else "."
    names = ", ".join(gallery())
    raise InvalidMachine(
        f"{name or 'machine'}: expected a machine that was saved or one of the gallery ({names}), found neither{meant}"
    )


def _check(machine: Machine, where: str) -> None:
    """What the fields must be to each other."""
    ids = [device.id for device in machine.devices]
    for identity, count in Counter(ids).items():
        if count > 1:
            raise InvalidMachine(f'{where}: expected each device once, found "{identity}" {count} times; {ADVICE}.')
    if not ids or ids[-1] != "cpu":
        raise InvalidMachine(
            f'{where}: expected a device "cpu" as the last one, found {", ".join(ids) or "no device"}; {ADVICE}.'
        )
    for index, device in enumerate(machine.devices):
        _check_device(device, f"{where}.devices[{index}]")
    for index, disk in enumerate(machine.disks):
        _check_free(disk, f"{where}.disks[{index}]")


def _check_device(device: Device, where: str) -> None:
    if not _DEVICE_ID.fullmatch(device.id) or device.kind != device.id.partition(":")[0]:
        raise InvalidMachine(
            f"{where}: expected an id as torch writes it (cuda:0, xpu:0, mps, cpu) and its kind, found "
            f'"{device.id}" of kind "{device.kind}"; {ADVICE}.'
        )
    for dtype in device.compute:
        if dtype not in DTYPES:
            raise InvalidMachine(
                f'{where}.compute: expected torch\'s names of dtypes, such as bfloat16, found "{dtype}"; {ADVICE}.'
            )
    _check_free(device, where)


def _check_free(store: Device | Disk, where: str) -> None:
    if store.free_bytes > store.total_bytes:
        raise InvalidMachine(
            f"{where}.free_bytes: expected at most total_bytes, which is {store.total_bytes}, found "
            f"{store.free_bytes}; {ADVICE}."
        )
