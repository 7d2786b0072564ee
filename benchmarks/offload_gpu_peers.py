"""Who runs a model that does not fit into an accelerator: loaders of `bench_offload_gpu.py`.

Each takes the checkpoint, the bytes of the device that may be used, the home of what does not fit there ("cpu" or
"disk"), an empty folder, the device and the sizes of the run. On the CPU all of them run too, which shows that they do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from offload_peers import PEER_SHARE, diffsynth_model, transformers_mmap

# Of host memory, where weights are to be read from the disk: for buffers on the way and what computing needs.
_DISK_HOST_BYTES = 3_000_000_000


def loadstone(folder: Path, budget: int, home: str, scratch: Path, device: str, run: dict[str, int]) -> Any:
    """`loadstone.load` with budgets; on the CPU, where that would compute from memory, `loadstone.offload`."""
    del scratch
    import loadstone

    if device == "cpu":
        return loadstone.offload(loadstone.load(folder), device=device, max_memory=budget, home=home)
    budgets = {device: budget} if home == "cpu" else {device: budget, "cpu": _DISK_HOST_BYTES}
    return loadstone.load(folder, max_memory=budgets, **run)


def resident(folder: Path, budget: int, home: str, scratch: Path, device: str, run: dict[str, int]) -> Any:
    """The whole model on the device, for the seconds that computing takes."""
    del budget, home, scratch, run
    import loadstone

    return loadstone.load(folder, device=device)


def transformers_auto(folder: Path, budget: int, home: str, scratch: Path, device: str, run: dict[str, int]) -> Any:
    """`from_pretrained` with `device_map="auto"`: what fits stays on the device, the rest moves in each pass."""
    del run
    import torch
    from transformers import AutoModelForCausalLM

    first = device if device == "cpu" else torch.device(device).index or 0
    memory = {first: int(PEER_SHARE * budget)} | ({"cpu": 1 << 40} if home == "cpu" and device != "cpu" else {})
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="auto", max_memory=memory, offload_folder=scratch
    )


def accelerate(folder: Path, budget: int, home: str, scratch: Path, device: str, run: dict[str, int]) -> Any:
    """`cpu_offload` or `disk_offload`: every weight moves in each pass."""
    import torch
    from accelerate import cpu_offload, disk_offload

    model, at = transformers_mmap(folder, budget, scratch, run), torch.device(device)
    return cpu_offload(model, at) if home == "cpu" else disk_offload(model, scratch, execution_device=at)


def diffusers_groups(folder: Path, budget: int, home: str, scratch: Path, device: str, run: dict[str, int]) -> Any:
    """diffusers' group offloading, leaf by leaf, with a stream of its own where the device has streams."""
    import torch
    from diffusers.hooks import apply_group_offloading

    model = transformers_mmap(folder, budget, scratch, run)
    apply_group_offloading(
        model,
        onload_device=torch.device(device),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        use_stream=device != "cpu",
        record_stream=device != "cpu",
        offload_to_disk_path=str(scratch) if home == "disk" else None,
    )
    return model


def diffsynth(folder: Path, budget: int, home: str, scratch: Path, device: str, run: dict[str, int]) -> Any:
    """DiffSynth-Studio's VRAM management, with the budget as its limit."""
    del scratch, run
    import torch

    away = ("disk", "disk") if home == "disk" else ("cpu", torch.bfloat16)
    return diffsynth_model(folder, away, device, None if device == "cpu" else PEER_SHARE * budget / 2**30)


PEERS = {
    "loadstone": loadstone,
    "transformers_auto": transformers_auto,
    "accelerate": accelerate,
    "diffusers_groups": diffusers_groups,
    "diffsynth": diffsynth,
}
LOADERS = {**PEERS, "resident": resident}
PACKAGES = {"accelerate": "accelerate", "diffusers_groups": "diffusers", "diffsynth": "diffsynth"}
