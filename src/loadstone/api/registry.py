"""What Loadstone knows of models it loaded, kept beside them: nothing is stuck on the module itself."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from loadstone.errors import PlanNotSupported
from loadstone.execute.trace import recorded
from loadstone.plan.values import HOST, Plan, UnitKind
from loadstone.report.load_report import LoadReport
from loadstone.report.streaming import as_text
from loadstone.report.trace import check_writable, write_trace
from loadstone.units import parse_bytes

if TYPE_CHECKING:
    from torch import nn

    from loadstone.execute.adopt import Origin
    from loadstone.execute.assist import Assist
    from loadstone.execute.residency import Residency
    from loadstone.execute.values import StreamStats

_PARKING_PLACES = ("disk", "ram")
_LOCK = threading.Lock()
_LOADED: weakref.WeakKeyDictionary[nn.Module, Loaded] = weakref.WeakKeyDictionary()


class Arranged(Protocol):
    """What `loadstone.offload` did to a module."""

    @property
    def parking(self) -> tuple[str, ...]:
        """The places where it can be parked, the usual one first."""

    def residency(self) -> Residency | None:
        """What can have it leave, even where all of it stays."""

    def restore(self) -> Loaded | None:
        """Make it what it was before; gives what was known of it then."""


class Loaded:
    """What is known of a loaded model, and what it can be asked to do.

    Args:
        model: it; not kept alive by this.
        report: of its load.
        origin: where its parameters came from.
        residency: what keeps it running, where parts of it are streamed.
        arranged: what `loadstone.offload` did, if it did anything.

    Attributes:
        report: see above.
        residency: see above; None for a model that is wholly in memory and never was asked to leave it.
        origin: see above.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        report: LoadReport,
        origin: Origin | None = None,
        residency: Residency | None = None,
        arranged: Arranged | None = None,
    ) -> None:
        self.report = report
        self.residency = residency
        self.origin = origin
        self._arranged = arranged
        self._model = weakref.ref(model)
        self._lock = threading.Lock()

    @property
    def plan(self) -> Plan | None:
        """The plan that was followed; None where everything fitted with room to spare."""
        return self.report.plan

    @property
    def computing(self) -> tuple[str, ...]:
        """The devices that compute, as the plan or else the load chose them."""
        return (self.report.device.value,) if self.plan is None else self.plan.computing

    @property
    def is_parked(self) -> bool:
        """Whether the model has left memory."""
        return self.residency is not None and self.residency.is_parked

    def stats(self) -> StreamStats | None:
        """What streaming has done so far; None where nothing was ever streamed."""
        if self.residency is None:
            return None
        rates = self.report.rates
        return replace(self.residency.stats(), disk_bytes_per_s=rates.disk_bytes_per_s if rates is not None else None)

    def summary(self) -> str:
        """The same in a line or two; "" where nothing was ever streamed."""
        stats = self.stats()
        return "" if stats is None else as_text(stats)

    @contextmanager
    def trace(self, path: str | Path) -> Iterator[None]:
        """Write what happens in the body to a file that chrome://tracing and https://ui.perfetto.dev open.

        It shows, thread by thread, which bytes were read when, what waited for them, and what computed; on an
        accelerator, what was asked of it. The file is written whole at the end, also where the body fails.

        Args:
            path: the file, of JSON; replaced where it is there.

        Raises:
            DestinationError: it cannot be written.
            ValueError: the model is traced already.
        """
        path = Path(path)
        model = self._model()
        if model is None:
            raise ValueError("the model that was to be traced is gone.")
        check_writable(path)
        with recorded(model, self.residency) as recording:
            try:
                yield
            finally:
                write_trace(path, recording)

    def assist(self, draft: nn.Module | None = None) -> Assist:
        """Greedy decoding in which a pass yields several tokens, for `model.generate()`.

        The text is the same, token for token; where nothing can be foretold exactly (sampling, batches, caches that
        forget) it is decoded as ever, and `facts.note` says why. It pays where passes wait for weights.

            assist = loadstone.of(model).assist()
            model.generate(**tokens, do_sample=False, custom_generate=assist)
            print(assist.facts)

        A streamer is passed as `token_streamer=`: transformers keeps `streamer=` from methods that are not its own.

        Args:
            draft: a smaller model with the same vocabulary, that foretells; without one the text itself does. It
                decides how many passes there are, never what comes out.
        """
        from loadstone.execute.assist import Assist

        return Assist(draft)

    def is_stream_bound(self) -> bool:
        """Whether foretelling pays: a pass waits for weights more than it computes, and blocks come whole.

        The parts of a block that is streamed module by module come anew for each token.
        """
        if self.residency is None or self.plan is None:
            return False
        blocks = [one.unit for one in self.plan.placements if one.is_streamed and one.kind is UnitKind.BLOCK]
        num_whole = sum(unit.rpartition(".")[2].isdecimal() for unit in blocks)
        return self.plan.prediction.decode.bound_by in ("disk", "link") and 2 * num_whole > len(blocks)

    def park(self, to: str | None = None, *, keep_changed: bool = False) -> int:
        """Let the model leave the device: its weights, the slots, the threads and the open files.

        The module stays. Whoever uses it wakes it; `wake()` does so ahead of time. What its files cannot give back
        stays where it is: buffers, parameters that only torch can convert, and parameters that were added since. A
        model that is parked already stays so.

        Args:
            to: where the weights come back from. "disk": their files, which take no memory, or for a module that
                `loadstone.offload` arranged with the disk a file of its own. "ram": host memory, for a model on an
                accelerator. By default "disk", or where `offload` was told to park it.
            keep_changed: leave parameters that are not as they were loaded where they are, instead of refusing. What
                torch does not count as a change (writes through `.data` or numpy) is not seen, and lost.

        Returns:
            The bytes of the parameters that left the device.

        Raises:
            StreamedModel: a parameter was changed, or the model was closed.
            PlanNotSupported: it came from no files, and computes where its parameters are.
            ValueError: `to` is neither, is where the weights are already, or is a disk that is not their home.
        """
        if to is not None and to not in _PARKING_PLACES:
            raise ValueError(f'park: expected to="disk" or to="ram", found {to!r}.')
        residency = self._residency("park")
        to = self._parking[0] if to is None else to
        if to not in self._parking:
            raise ValueError(
                'park: expected a model on an accelerator for to="ram", found one that is in RAM already; park() lets '
                "it leave, and its files give it back."
                if to == "ram"
                else 'park: expected a module whose home is the disk for to="disk", found one that loadstone.offload '
                'has arranged with host memory as its home; park("ram") lets it leave its device, and '
                'States(parked=("disk", None)) arranges it for both.'
            )
        return residency.change(lambda states: states.park(keep_changed=keep_changed, copied=to == "ram"))

    def wake(self) -> None:
        """Bring back what was in memory when the model was parked, with the same bits; one that is awake stays so.

        Raises:
            StreamedModel: the model was closed.
            LoadstoneError: its files cannot be read, or are not those that it was loaded from.
        """
        if self.residency is not None and self.residency.is_parked:
            self.residency.change(lambda states: states.wake())

    def limit(self, size: str | int | None) -> None:
        """Change how much memory the weights may take, where the model computes, while it lives.

        Blocks go or come back until what is kept and the slots for the rest are as much as the limit allows; what went
        is read from its files in each pass. Of a model that is parked, this is what it wakes up to.

        Args:
            size: in bytes, or as `max_memory` is written ("6GB"); None for no limit: all of the model comes back.

        Raises:
            ValueError: it is no size, or less than the slots and what cannot be read again take.
            StreamedModel: the model was closed.
            PlanNotSupported: it came from no files, and computes where its parameters are.
            LoadstoneError: files cannot be read, or are not those that the model was loaded from.
        """
        limit_bytes = None if size is None else parse_bytes(size, option="limit")
        self._residency("limit").change(lambda states: states.limit(limit_bytes))

    def close(self) -> None:
        """End the threads and close the files of a model that is streamed, which cannot be used any more."""
        if self.residency is not None:
            self.residency.close()

    def restore(self) -> None:
        """Undo `loadstone.offload`: the module is wholly in memory again, where it was, and has no hooks.

        Raises:
            ValueError: it was not offloaded, or was restored already.
        """
        model = self._model()
        if self._arranged is None or model is None or find(model) is not self:
            raise ValueError(
                "restore() undoes loadstone.offload(), which was not called for this model; load it again."
            )
        before = self._arranged.restore()
        with _LOCK:
            if before is None:
                del _LOADED[model]
            else:
                _LOADED[model] = before

    @property
    def _parking(self) -> tuple[str, ...]:
        """The places where the model can be parked, the usual one first."""
        if self._arranged is not None:
            return self._arranged.parking
        return _PARKING_PLACES[:1] if self.report.device.value == HOST else _PARKING_PLACES

    def _residency(self, what: str) -> Residency:
        self._refuse_several_devices(what)
        with self._lock:
            if self._arranged is not None:
                self._refuse_where_it_is(what)
                self.residency = self._arranged.residency()
            model = self._model()
            if self.residency is None and self.origin is not None and model is not None:
                from loadstone.execute.adopt import residency_for

                self.residency = residency_for(model, self.origin, self.report.device.value)
            if self.residency is None:
                raise PlanNotSupported(f"{what}: expected a model that came from files, found one that did not.")
            return self.residency

    def _refuse_several_devices(self, what: str) -> None:
        if len(self.computing) > 1 and self._arranged is None:
            raise PlanNotSupported(
                f"{what}: expected a model that computes on one device, found one on {', '.join(self.computing)}; "
                "drop it, and load it again when it is wanted."
            )

    def _refuse_where_it_is(self, what: str) -> None:
        if not self._parking:
            raise PlanNotSupported(
                f"{what}: expected a module that computes elsewhere than its home is, found one that loadstone.offload "
                'has arranged to do both in RAM; call restore() first, then offload it with home="disk".'
            )


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
