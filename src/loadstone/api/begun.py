"""What a load was asked for, and one whose bytes are under way: values, without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.api.planned import Wishes
from loadstone.architecture.keymap import RenameRules
from loadstone.checkpoint.excerpt import Excerpt
from loadstone.checkpoint.hub_cache import HubAccess
from loadstone.checkpoint.resolve import Source
from loadstone.checkpoint.values import Checkpoint
from loadstone.events import Recorder
from loadstone.execute.values import Streaming
from loadstone.hardware.memory import ResidentBytes
from loadstone.plan.choose import Choice
from loadstone.plan.values import Plan
from loadstone.stream.host import Ahead

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The arguments of `load`, checked; see there."""

    source: Source
    architecture: str | None = None
    dtype: str | None = None
    device: str | None = None
    attn_implementation: str | None = None
    access: HubAccess = field(default_factory=HubAccess)
    excerpt: Excerpt = field(default_factory=Excerpt)
    trust_remote_code: bool = False
    strict: bool = True
    allow_missing: tuple[str, ...] = ()
    into: Callable[..., nn.Module] | None = None
    config: Mapping[str, Any] | None = None
    rename: RenameRules | None = None
    convert: Callable[..., Any] | None = None
    wishes: Wishes = field(default_factory=Wishes)
    streaming: Streaming | None = None

    @property
    def name(self) -> str:
        """The source as people call it."""
        if isinstance(self.source, str | Path):
            return str(self.source)
        return ", ".join(str(part) for part in self.source)


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A load whose bytes are under way.

    Attributes:
        request: what was asked for.
        checkpoint: what the headers say.
        dtype: the floating-point dtype.
        plan: what is followed; None where everything fits with room to spare.
        streaming: what is read anew in each pass.
        devices: where each tensor is computed with, by its name in the checkpoint; empty where one device computes.
        ahead: the bytes.
        recorder: the stages so far.
        start: when it began, on the clock of `time.perf_counter`.
        before: resident memory then.
    """

    request: Request
    checkpoint: Checkpoint
    dtype: Choice
    plan: Plan | None
    streaming: Streaming | None
    devices: Mapping[str, str]
    ahead: Ahead
    recorder: Recorder
    start: float
    before: ResidentBytes
