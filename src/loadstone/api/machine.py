"""`machine`: what a plan has to work with, here or elsewhere."""

from __future__ import annotations

from pathlib import Path

from loadstone.checkpoint.cache import cache_folder
from loadstone.checkpoint.hub_cache import local_path
from loadstone.hardware.machine_file import find_machine
from loadstone.hardware.probe import probe
from loadstone.hardware.spec import Machine


def machine(source: str | Path | None = None, *, model: str | Path | None = None, measure: bool = False) -> Machine:
    """What can compute, how much memory it may use, and how fast it is. torch is imported only where a GPU may be.

    Args:
        source: a machine that was saved, as a file, or one of the gallery, by name; None means the one at hand.
        model: the folder or file of a model, whose disk is told of and measured.
        measure: measure what a plan needs (disk, memory, the way to each GPU, matrix products by dtype), in a few
            seconds. It is kept in the cache folder, where later calls find it.

    Returns:
        The machine; sizes in bytes, rates in bytes per second.

    Raises:
        InvalidMachine: there is no such machine, or its file cannot be used.
        ValueError: another machine is to be measured, or the model does not exist.
    """
    if source is not None:
        if measure or model is not None:
            option = "measure" if measure else "model"
            raise ValueError(
                f"{option}: expected no machine beside it, found {source}; only the one at hand can be asked."
            )
        return find_machine(source)
    folder = None if model is None else local_path(model)
    if folder is not None and not folder.exists():
        raise ValueError(f"model: expected a folder or a file, found nothing at {folder}.")
    found = probe(folder)
    if not measure:
        return found
    from loadstone.hardware.measure import measure_machine

    return measure_machine(found, folder or cache_folder(), cache_folder())
