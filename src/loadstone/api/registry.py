"""What Loadstone knows of models it loaded, kept beside them: nothing is stuck on the module itself."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

from loadstone.errors import PlanNotSupported
from loadstone.plan.values import Plan
from loadstone.report.load_report import LoadReport
from loadstone.units import parse_bytes

if TYPE_CHECKING:
    from torch import nn

    from loadstone.execute.adopt import Origin
    from loadstone.execute.residency import Residency
    from loadstone.execute.values import StreamStats

_LOCK = threading.Lock()
_LOADED: weakref.WeakKeyDictionary[nn.Module, Loaded] = weakref.WeakKeyDictionary()


class Loaded:
    """What is known of a loaded model, and what it can be asked to do.

    Args:
        model: it; not kept alive by this.
        report: of its load.
        origin: where its parameters came from.
        residency: what keeps it running, where parts of it are streamed.

    Attributes:
        report: see above.
        residency: see above; None for a model that is wholly in memory and never was asked to leave it.
    """

    def __init__(
        self, model: nn.Module, *, report: LoadReport, origin: Origin, residency: Residency | None = None
    ) -> None:
        self.report = report
        self.residency = residency
        self._model = weakref.ref(model)
        self._origin = origin
        self._lock = threading.Lock()

    @property
    def plan(self) -> Plan | None:
        """The plan that was followed; None where everything fitted with room to spare."""
        return self.report.plan

    @property
    def is_parked(self) -> bool:
        """Whether the model has left memory."""
        return self.residency is not None and self.residency.is_parked

    def stats(self) -> StreamStats | None:
        """What streaming has done so far; None where nothing was ever streamed."""
        return None if self.residency is None else self.residency.stats()

    def park(self, *, keep_changed: bool = False) -> int:
        """Let the model leave memory: its weights, the slots, the threads and the open files.

        The module stays. Whoever uses it wakes it; `wake()` does so ahead of time. What its files cannot give back
        stays in memory: buffers, parameters that only torch can convert, and parameters that were added since. A model
        that is parked already stays so.

        Args:
            keep_changed: leave parameters that are not as they were loaded in memory too, instead of refusing. What
                torch does not count as a change (writes through `.data` or numpy) is not seen, and lost.

        Returns:
            The bytes of the parameters that went.

        Raises:
            StreamedModel: a parameter was changed, or the model was closed.
            PlanNotSupported: its weights are not on the CPU.
        """
        return self._residency("park").park(keep_changed=keep_changed)

    def wake(self) -> None:
        """Bring back what was in memory when the model was parked, with the same bits; one that is awake stays so.

        Raises:
            StreamedModel: the model was closed.
            LoadstoneError: its files cannot be read, or are not those that it was loaded from.
        """
        if self.residency is not None:
            self.residency.wake()

    def limit(self, size: str | int | None) -> None:
        """Change how much memory the weights may take while the model lives.

        Blocks go or come back until what is kept and the slots for the rest are as much as the limit allows; what went
        is read from its files in each pass. Of a model that is parked, this is what it wakes up to.

        Args:
            size: in bytes, or as `max_memory` is written ("6GB"); None for no limit: all of the model comes back.

        Raises:
            ValueError: it is no size, or less than the slots and what cannot be read again take.
            StreamedModel: the model was closed.
            PlanNotSupported: its weights are not on the CPU.
            LoadstoneError: files cannot be read, or are not those that the model was loaded from.
        """
        limit_bytes = None if size is None else parse_bytes(size, option="limit")
        self._residency("limit").limit(limit_bytes)

    def close(self) -> None:
        """End the threads and close the files of a model that is streamed, which cannot be used any more."""
        if self.residency is not None:
            self.residency.close()

    def _residency(self, what: str) -> Residency:
        with self._lock:
            if self.residency is None:
                model, device = self._model(), self.report.device.value
                if device != "cpu" or model is None:
                    raise PlanNotSupported(
                        f"{what}: expected weights on the CPU, found them on {device}; only there can they leave "
                        "memory and come back yet. Load the model with device='cpu', or load it again instead."
                    )
                from loadstone.execute.adopt import residency_for

                self.residency = residency_for(model, self._origin)
            return self.residency


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
