"""A module that is complete but for its streamed parameters, made usable: they are there when their unit computes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from loadstone.checkpoint.values import Checkpoint
from loadstone.events import Observer, ignore
from loadstone.execute.experts import attach_experts
from loadstone.execute.grouping import Grouping, stood_in
from loadstone.execute.hooks import Hooks
from loadstone.execute.residency import Adopt, Residency
from loadstone.execute.streamed import Streamed
from loadstone.execute.values import Streaming
from loadstone.plan.values import HOST
from loadstone.stream.destination import Destination
from loadstone.stream.sources import FileSource, Source
from loadstone.stream.staying import Stays
from loadstone.stream.way import Keep, Way, host_way

# What `Residency` calls to find what was loaded to stay, for the source that is to read it again.
AdoptFrom = Callable[[FileSource], Adopt]


def attach(
    module: nn.Module,
    streamed: Streamed,
    checkpoint: Checkpoint,
    streaming: Streaming,
    observer: Observer,
    adopt: AdoptFrom | None = None,
) -> Residency:
    """The same as `attach_to`, for units that come from files.

    Args:
        module: the module, with stand-ins and ties in place.
        streamed: what is streamed.
        checkpoint: where it comes from.
        streaming: where to, how many at a time, and which of them by way of host memory.
        observer: is told of bytes, and of the progress of each forward.
        adopt: finds what was loaded to stay, once it is to go.
    """
    on_host = _kept_on_host(streamed, streaming)

    def keep(fqn: str) -> Keep:
        return Keep.HOST if fqn in on_host else Keep.DISK

    way = Way(destination=Destination(streamed.device), keep=keep)
    if streaming.device == HOST:
        way = host_way(Stays(slot_bytes=streaming.slot_bytes, read_bytes=streaming.read_bytes))
    source = FileSource(streamed.wanted, checkpoint, way, observer)
    adopted = adopt(source) if adopt is not None else None
    return attach_to(module, streamed, source, Attachment(streaming.num_slots, observer, adopted))


def _kept_on_host(streamed: Streamed, streaming: Streaming) -> set[str]:
    """What is kept in host memory for the device, single entries of experts too; what went later is not."""
    if not streaming.in_memory:
        return set()
    on_host = {
        fqn
        for fqn, wanted in streamed.wanted.items()
        if {part.source for part in wanted.assignment.parts} <= streaming.in_memory
    }
    for entries in streamed.experts.tables.values():
        for number, pieces in enumerate(entries.pieces):
            if {info.name for _, info in pieces} <= streaming.in_memory:
                on_host.add(entries.name(number))
    return on_host


@dataclass(frozen=True, slots=True)
class Attachment:
    """How a module is to be kept running.

    Attributes:
        num_slots: how many units are in memory at a time; more where units lie within one another.
        observer: is told of the progress of each forward.
        adopt: finds what was loaded to stay, once it is to go.
    """

    num_slots: int
    observer: Observer = ignore
    adopt: Adopt | None = None


def attach_to(module: nn.Module, streamed: Streamed, source: Source, attachment: Attachment) -> Residency:
    """Make a module that is complete but for its streamed parameters usable, once what comes back is started.

    Args:
        module: the module, with stand-ins and ties in place.
        streamed: what is streamed.
        source: where it comes from, and how it travels.
        attachment: how it is to be kept running.

    Returns:
        What keeps the module running; it ends when the module does.
    """
    grouping = Grouping(module, streamed, stood_in(streamed), source)
    filler, hooks = source.filler(grouping.walked, grouping.tables), Hooks(module)
    residency = Residency(filler, attachment.num_slots, hooks, attachment.adopt, attachment.observer)
    experts = grouping.put_experts()
    if isinstance(source, FileSource):
        hooks.keep(attach_experts(experts, streamed.experts, source, residency, module.get_submodule))
    units = grouping.units(filler, residency)
    for unit in units:
        unit.put_placeholders()
    residency.take_on(units)
    weakref.finalize(module, residency.close)
    return residency
