"""What a model does while it is watched: spans of time on each thread, kept in columns, up to a number of them."""

from __future__ import annotations

import threading
import time
import weakref
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loadstone.events import NO_TRACE, Tracer

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from loadstone.execute.residency import Residency

# Some 20 MB of memory, and four times as much of JSON.
MAX_SPANS = 500_000

_LOCK = threading.Lock()
_RECORDED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """What one thread did for a while.

    Attributes:
        kind: "pass", "compute", "read", "expand", "wait", "switch".
        name: of what it was done with.
        thread: the number of the thread, in the order in which they were first seen.
        begin_s: when it began, in seconds from the beginning of the recording.
        seconds: how long it took.
        nbytes: that it moved.
    """

    kind: str
    name: str
    thread: int
    begin_s: float
    seconds: float
    nbytes: int


class Recording:
    """A tracer that keeps spans for later.

    Args:
        max_spans: how many; what comes then is only counted.

    Attributes:
        num_left_out: how many were not kept.
        threads: the names of the threads.
    """

    def __init__(self, max_spans: int = MAX_SPANS) -> None:
        self.num_left_out = 0
        self.threads: list[str] = []
        self._max_spans = max_spans
        self._lock = threading.Lock()
        self._zero_s = time.perf_counter()
        self._labels: dict[tuple[str, str], int] = {}
        self._thread_of: dict[int, int] = {}
        # One number of each for each span: its label, its thread, its bytes, its begin and its seconds.
        self._what, self._who, self._nbytes = array("i"), array("i"), array("q")
        self._begin_s, self._seconds = array("d"), array("d")

    def span(self, kind: str, name: str, begin_s: float, nbytes: int = 0) -> None:
        """Keep a span that ends now; see `Tracer`."""
        now, ident = time.perf_counter(), threading.get_ident()
        with self._lock:
            if len(self._what) == self._max_spans:
                self.num_left_out += 1
                return
            self._what.append(self._labels.setdefault((kind, name), len(self._labels)))
            self._who.append(self._thread(ident))
            self._nbytes.append(nbytes)
            self._begin_s.append(begin_s - self._zero_s)
            self._seconds.append(now - begin_s)

    def _thread(self, ident: int) -> int:
        number = self._thread_of.get(ident)
        if number is None:
            number = self._thread_of[ident] = len(self.threads)
            self.threads.append(threading.current_thread().name)
        return number

    def spans(self) -> Iterator[Span]:
        """What was kept so far, in the order in which it ended."""
        with self._lock:
            labels, count = list(self._labels), len(self._what)
        for index in range(count):
            kind, name = labels[self._what[index]]
            yield Span(
                kind=kind,
                name=name,
                thread=self._who[index],
                begin_s=self._begin_s[index],
                seconds=self._seconds[index],
                nbytes=self._nbytes[index],
            )


@contextmanager
def recorded(model: nn.Module, residency: Residency | None, *, max_spans: int = MAX_SPANS) -> Iterator[Recording]:
    """Record what a model does in the body.

    Args:
        model: its passes and its blocks are hooked for that time.
        residency: where parts of it are streamed: tells of reads, waits and switches.
        max_spans: how many spans are kept.

    Raises:
        ValueError: it is being recorded already.
    """
    with _LOCK:
        if model in _RECORDED:
            raise ValueError(f"this {type(model).__name__} is traced already; end that trace before the next.")
        _RECORDED.add(model)
    recording = Recording(max_spans)
    handles: list[RemovableHandle] = []
    try:
        if residency is not None:
            residency.trace_to(recording)
        handles += _hooked(model, "pass", "", recording)
        for name in block_names(model, residency.units if residency is not None else ()):
            handles += _hooked(model.get_submodule(name), "compute", name, recording)
        yield recording
    finally:
        for handle in handles:
            handle.remove()
        if residency is not None:
            residency.trace_to(NO_TRACE)
        with _LOCK:
            _RECORDED.discard(model)


def block_names(model: nn.Module, units: tuple[str, ...]) -> list[str]:
    """The modules that are shown one by one: streamed units, entries of lists of blocks, and what is beside these.

    Args:
        model: the module.
        units: names of streamed units; those that are no modules are left out.
    """
    from torch import nn

    modules = dict(model.named_modules())
    lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    around = {"", *lists, *(parent for name in lists for parent in _parents(name))}
    found = [
        name
        for name, module in modules.items()
        if name not in around
        and all(parent in around for parent in _parents(name))
        and next(module.parameters(), None) is not None
    ]
    return list(dict.fromkeys([*found, *(unit for unit in units if unit in modules)]))


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _hooked(module: nn.Module, kind: str, name: str, tracer: Tracer) -> list[RemovableHandle]:
    watch = _Watch(kind, name, tracer)
    # Inside of whatever brings the weights: after it at the beginning, before it at the end.
    return [
        module.register_forward_pre_hook(watch.begin, with_kwargs=True),
        module.register_forward_hook(watch.end, prepend=True, always_call=True),
    ]


class _Watch:
    """The forwards of one module, as spans."""

    def __init__(self, kind: str, name: str, tracer: Tracer) -> None:
        self._kind, self._name, self._tracer = kind, name, tracer
        self._begun: dict[int, tuple[str, float]] = {}
        self._count = 0

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before a forward."""
        name = self._name
        if not name:
            self._count += 1
            name = f"pass {self._count}{_shape_of(args, kwargs)}"
        self._begun[threading.get_ident()] = name, time.perf_counter()

    def end(self, *_: Any) -> None:
        """After it."""
        begun = self._begun.pop(threading.get_ident(), None)
        if begun is not None:
            self._tracer.span(self._kind, *begun)


def _shape_of(args: Any, kwargs: Any) -> str:
    """The shape of the tokens that a forward is given."""
    given = kwargs.get("input_ids", args[0] if args else None)
    shape = getattr(given, "shape", None)
    return "" if shape is None or len(shape) != 2 else f", {shape[0]} x {shape[1]} tokens"
