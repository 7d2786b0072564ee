"""Who runs a model that does not fit: loaders of `bench_offload.py`, each used as its own documentation says.

DiffSynth-Studio and AirLLM are found in the folder of `--peers` (`pip install --no-deps --target FOLDER diffsynth
airllm`). DiffSynth-Studio's package imports video and image libraries for everything that it does, so that only its
memory management is imported, without the packages around it. AirLLM wants a tokenizer, which is left out.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

# What of the budget the loaders that are told one may fill; the rest is for imports, activations and a part in use.
PEER_SHARE = 0.7


def loadstone(folder: Path, budget: int, scratch: Path, run: dict[str, int]) -> Any:
    """`loadstone.load` with a budget."""
    del scratch
    import loadstone

    return loadstone.load(folder, max_memory={"cpu": budget}, **run)


def resident(folder: Path, budget: int, scratch: Path, run: dict[str, int]) -> Any:
    """The whole model in memory, for the seconds that computing takes."""
    del budget, scratch, run
    import loadstone

    return loadstone.load(folder)


def transformers_disk(folder: Path, budget: int, scratch: Path, run: dict[str, int]) -> Any:
    """`from_pretrained` with `device_map="auto"` and an offload folder."""
    del run
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": int(PEER_SHARE * budget)},
        offload_folder=scratch,
    )


def transformers_mmap(folder: Path, budget: int, scratch: Path, run: dict[str, int]) -> Any:
    """`from_pretrained`, which maps the files and leaves the rest to the kernel."""
    del budget, scratch, run
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def accelerate_disk(folder: Path, budget: int, scratch: Path, run: dict[str, int]) -> Any:
    """`disk_offload` of the mapped model: a file for each tensor, read in each pass."""
    import torch
    from accelerate import disk_offload

    model = transformers_mmap(folder, budget, scratch, run)
    return disk_offload(model, scratch, execution_device=torch.device("cpu"))


def diffsynth(folder: Path, budget: int, scratch: Path, run: dict[str, int]) -> Any:
    """DiffSynth-Studio's VRAM management with everything on the disk until it computes."""
    del budget, scratch, run
    return diffsynth_model(folder, ("disk", "disk"), "cpu")


def diffsynth_model(folder: Path, away: tuple[str, Any], device: str, vram_limit: float | None = None) -> Any:
    """A model under DiffSynth-Studio's VRAM management.

    Args:
        folder: of the checkpoint.
        away: the device and the dtype of what does not compute.
        device: the one that computes, in bfloat16.
        vram_limit: gigabytes of it up to which weights are kept there.
    """
    _without_packages("diffsynth", "diffsynth.core")
    import torch
    from diffsynth.core.vram.disk_map import DiskMap
    from diffsynth.core.vram.initialization import skip_model_initialization
    from diffsynth.core.vram.layers import AutoWrappedLinear, AutoWrappedModule, enable_vram_management
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    disk_map = None
    if away[0] == "disk":
        with skip_model_initialization():
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
        tied = {"lm_head.weight": "model.embed_tokens.weight"} if model.config.tie_word_embeddings else {}
        paths = [str(path) for path in sorted(folder.glob("*.safetensors"))]
        disk_map = DiskMap(paths, device, state_dict_converter=lambda names: {**names, **tied})
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    states = {
        f"{state}_{what}": value
        for state in ("offload", "onload", "preparing")
        for what, value in zip(("device", "dtype"), away, strict=True)
    }
    if vram_limit is not None:  # what is under the limit stays where it computes
        states |= {"preparing_device": device, "preparing_dtype": torch.bfloat16}
    return enable_vram_management(
        model,
        {
            torch.nn.Linear: AutoWrappedLinear,
            torch.nn.Embedding: AutoWrappedModule,
            Qwen2RMSNorm: AutoWrappedModule,
        },
        vram_config={**states, "computation_dtype": torch.bfloat16, "computation_device": device},
        vram_limit=vram_limit,
        disk_map=disk_map,
    )


def _without_packages(*names: str) -> None:
    """Let modules inside of packages be imported without running the packages' own `__init__`."""
    first = importlib.util.find_spec(names[0])
    if first is None or not first.submodule_search_locations:
        raise ImportError(f"no package {names[0]}")
    root = Path(first.submodule_search_locations[0]).parent
    for name in names:
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[name] = package


def airllm(folder: Path, budget: int, scratch: Path, run: dict[str, int]) -> Any:
    """AirLLM, which first writes a file for each layer."""
    del budget, run
    from airllm.airllm_base import AirLLMBaseModel

    class WithoutTokenizer(AirLLMBaseModel):  # type: ignore[misc]
        def get_tokenizer(self, hf_token: str | None = None) -> None:
            return None

    return WithoutTokenizer(str(folder), device="cpu", layer_shards_saving_path=str(scratch))


PEERS = {
    "loadstone": loadstone,
    "transformers_disk": transformers_disk,
    "transformers_mmap": transformers_mmap,
    "accelerate_disk": accelerate_disk,
    "diffsynth": diffsynth,
    "airllm": airllm,
}
LOADERS = {**PEERS, "resident": resident}
PACKAGES = {"diffsynth": "diffsynth", "airllm": "airllm", "accelerate_disk": "accelerate"}
