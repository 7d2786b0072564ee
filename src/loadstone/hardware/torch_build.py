"""Which torch is installed and what it was built for, told without importing it, which takes seconds."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

_ASSIGNED = re.compile(r"^(\w+)(?::[^=]+)? = '([^']+)'$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchBuild:
    """What torch's own `version.py` says.

    Attributes:
        version: `2.13.0+cpu`; "" where there is no torch.
        cuda: the version of CUDA it was built for; None if it was not.
        hip: the same for ROCm.
        xpu: the same for Intel GPUs.
    """

    version: str = ""
    cuda: str | None = None
    hip: str | None = None
    xpu: str | None = None


def torch_build() -> TorchBuild | None:
    """The torch that `import torch` would give; None where its `version.py` is not to be found."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return None
    told = dict(_ASSIGNED.findall(text))
    return TorchBuild(
        version=told.get("__version__", ""), cuda=told.get("cuda"), hip=told.get("hip"), xpu=told.get("xpu")
    )
