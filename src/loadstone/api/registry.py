"""What Loadstone knows of models it loaded, kept beside them: nothing is stuck on the module itself."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loadstone.checkpoint.values import Checkpoint
from loadstone.execute.trace import recorded
from loadstone.plan.values import Plan, UnitKind
from loadstone.report.load_report import LoadReport
from loadstone.report.streaming import as_text
from loadstone.report.trace import check_writable, write_trace

if TYPE_CHECKING:
    from torch import nn

    from loadstone.execute.assist import Assist
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
        model: the module, for as long as it lives.
    """

    report: LoadReport
    residency: Residency | None = None
    origin: Origin | None = None
    undo: Callable[[], Loaded | None] | None = None
    model: weakref.ref[nn.Module] | None = None

    @property
    def plan(self) -> Plan | None:
        """The plan that was followed; None where everything fitted with room to spare."""
        return self.report.plan

    def stats(self) -> StreamStats | None:
        """What streaming has done so far; None where nothing is streamed."""
        if self.residency is None:
            return None
        rates = self.report.rates
        return replace(self.residency.stats(), disk_bytes_per_s=rates.disk_bytes_per_s if rates is not None else None)

    def summary(self) -> str:
        """The same in a line or two; "" where nothing is streamed."""
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
        model = None if self.model is None else self.model()
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
        _LOADED[model] = replace(loaded, model=weakref.ref(model))


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
