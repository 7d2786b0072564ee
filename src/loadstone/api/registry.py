"""What Loadstone knows of models it loaded, kept beside them: nothing is stuck on the module itself."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loadstone.checkpoint.values import Checkpoint
from loadstone.plan.values import Plan
from loadstone.report.load_report import LoadReport

if TYPE_CHECKING:
    from torch import nn

    from loadstone.execute.residency import Residency
    from loadstone.execute.values import StreamStats
    from loadstone.stream.refill import Wanted

_LOCK = threading.Lock()
_LOADED: weakref.WeakKeyDictionary[nn.Module, Loaded] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where the parameters of a model were loaded from.

    Attributes:
        checkpoint: the files.
        wanted: what fills each parameter, by fqn.
    """

    checkpoint: Checkpoint
    wanted: Mapping[str, Wanted]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What is known of a loaded model.

    Attributes:
        report: of its load.
        residency: what keeps it running, where parts of it are streamed.
        origin: which tensors of which files fill its parameters, where that can be read again.
        undo: undoes what `loadstone.offload` did; gives what was known before.
    """

    report: LoadReport
    residency: Residency | None = None
    origin: Origin | None = None
    undo: Callable[[], Loaded | None] | None = None

    @property
    def plan(self) -> Plan | None:
        """The plan that was followed; None where everything fitted with room to spare."""
        return self.report.plan

    def stats(self) -> StreamStats | None:
        """What streaming has done so far; None where nothing is streamed."""
        return None if self.residency is None else self.residency.stats()

    def close(self) -> None:
        """End the threads and close the files of a model that is streamed, which cannot be used any more."""
        if self.residency is not None:
            self.residency.close()

    def restore(self) -> None:
        """Undo `loadstone.offload`: the module is wholly in memory again, where it was, and has no hooks.

        Raises:
            ValueError: it was not offloaded, or was restored already.
        """
        with _LOCK:
            model = next((model for model, loaded in _LOADED.items() if loaded is self), None)
        if self.undo is None or model is None:
            raise ValueError(
                "restore() undoes loadstone.offload(), which was not called for this model; load it again."
            )
        before = self.undo()
        with _LOCK:
            if before is None:
                del _LOADED[model]
            else:
                _LOADED[model] = before


def find(model: nn.Module) -> Loaded | None:
    """What is known of a model, if anything."""
    with _LOCK:
        return _LOADED.get(model)


def remember(model: nn.Module, loaded: Loaded) -> None:
    """Keep `loaded` for as long as the model lives."""
    with _LOCK:
        _LOADED[model] = loaded


def of(model: nn.Module) -> Loaded:
    """What Loadstone knows of a model that it loaded.

    Args:
        model: what `loadstone.load` returned.

    Returns:
        Its report.

    Raises:
        ValueError: the model was not loaded by Loadstone.
    """
    with _LOCK:
        found = _LOADED.get(model)
    if found is None:
        raise ValueError(
            f"this {type(model).__name__} was not loaded by loadstone.load; only the module that load() returned is "
            "known, not its submodules or copies."
        )
    return found
