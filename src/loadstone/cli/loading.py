"""Loading as the commands do it: the demo model where no source is named, progress while it lasts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loadstone.checkpoint.demo import demo_model

if TYPE_CHECKING:
    from torch import nn

    from loadstone.events import Observer


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """The options that `load` and `run` share; see `loadstone.load`."""

    architecture: str | None
    dtype: str | None
    device: str | None
    attn_implementation: str | None
    revision: str | None
    local_files_only: bool
    trust_remote_code: bool
    strict: bool = True


def load_model(source: str | None, options: LoadOptions, observer: Observer) -> tuple[nn.Module, str]:
    """Load a model as a command asks for it.

    Args:
        source: as on the command line; None means the demo model.
        options: the command's.
        observer: draws progress.

    Returns:
        The model, and the source that it was loaded from.
    """
    from loadstone.api.load import load

    path = source or str(demo_model(observer))
    model = load(
        path,
        architecture=options.architecture,
        dtype=options.dtype,
        device=options.device,
        attn_implementation=options.attn_implementation,
        revision=options.revision,
        local_files_only=options.local_files_only,
        trust_remote_code=options.trust_remote_code,
        strict=options.strict,
        progress=observer,
    )
    return model, path
