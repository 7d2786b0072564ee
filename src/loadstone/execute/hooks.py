"""The hooks that tell when which unit computes: put on the modules that need it, and taken off without a trace."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from types import FrameType
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

from loadstone.execute.outside_graphs import UntracedForward, outside_graphs
from loadstone.execute.placeholder import StreamedParameter

_CALL = nn.Module._call_impl.__code__
_LOOK_AGAIN_S = 0.005


class Hooked(Protocol):
    """Who is told."""

    def begin_pass(self, *hooked: Any) -> None:
        """The forward of the whole model begins."""

    def end_pass(self, *hooked: Any) -> None:
        """It is over."""

    def enter(self, unit: str, *hooked: Any) -> None:
        """A forward that needs a unit begins."""

    def leave(self, unit: str, *hooked: Any) -> Any:
        """It is over; what is returned replaces its output."""


class Hooks:
    """The hooks of one model.

    Args:
        module: the model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._handles: dict[str, list[RemovableHandle]] = {}
        self._others: list[RemovableHandle] = []
        self._untraced: weakref.WeakKeyDictionary[nn.Module, UntracedForward] = weakref.WeakKeyDictionary()

    @property
    def are_on(self) -> bool:
        """Whether there are any now."""
        return bool(self._handles)

    def put(self, told: Hooked, entries: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Have hooks on the model, and on the modules that need units.

        What comes in parts is not there when its module computes, and graphs ask for it: such forwards are left alone.

        Args:
            told: is told.
            entries: names of units, and the paths of the modules that need each; those that have hooks keep them.
        """
        module = self._module()
        if module is None:
            return
        for name, paths in entries:
            if name not in self._handles:
                self._handles[name] = []
                before, after = outside_graphs(partial(told.enter, name)), outside_graphs(partial(told.leave, name))
                for found in map(module.get_submodule, paths):
                    self._handles[name] += [
                        found.register_forward_pre_hook(before, prepend=True),
                        found.register_forward_hook(after, always_call=True),
                    ]
        if "" not in self._handles:  # last, so that the pass begins before whatever unit the model itself needs
            self._handles[""] = [
                module.register_forward_pre_hook(outside_graphs(told.begin_pass), prepend=True),
                module.register_forward_hook(outside_graphs(told.end_pass), always_call=True),
            ]

        for one in module.modules():
            if one not in self._untraced and any(map(_comes_in_parts, one._parameters.values())):
                self._untraced[one] = UntracedForward(one)

    def keep(self, handles: Iterable[RemovableHandle]) -> None:
        """Have these hooks end with the others."""
        self._others += handles

    def remove(self) -> None:
        """Have none."""
        everything: list[RemovableHandle | UntracedForward] = [*self._others, *self._untraced.values()]
        for handles in self._handles.values():
            everything += handles
        for handle in everything:
            handle.remove()
        self._handles.clear()
        self._others.clear()
        self._untraced.clear()

    def wait_for_others(self) -> None:
        """Return when no forward of another thread is under way that began before now, without being hooked."""
        module = self._module()
        if module is None:
            return
        modules = {id(one) for one in module.modules()}
        frames = [frame for frame in _frames_of_others() if _is_forward_of(frame, modules)]
        while frames:
            time.sleep(_LOOK_AGAIN_S)
            running = {id(frame) for frame in _frames_of_others()}
            frames = [frame for frame in frames if id(frame) in running]


def _comes_in_parts(parameter: nn.Parameter | None) -> bool:
    return isinstance(parameter, StreamedParameter) and parameter.comes_in_parts


def _frames_of_others() -> Iterator[FrameType]:
    """What the other threads are in the middle of."""
    for ident, innermost in sys._current_frames().items():
        frame: FrameType | None = innermost if ident != threading.get_ident() else None
        while frame is not None:
            yield frame
            frame = frame.f_back


def _is_forward_of(frame: FrameType, modules: set[int]) -> bool:
    return frame.f_code is _CALL and id(frame.f_locals.get("self")) in modules
