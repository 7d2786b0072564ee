"""What a streamed model has done so far, gathered from those who counted it."""

from __future__ import annotations

from collections.abc import Iterable

from loadstone.execute.expert_room import ExpertCounts, ExpertRoom
from loadstone.execute.kept import InParts
from loadstone.execute.pressure import Shortage
from loadstone.execute.slots import Ring
from loadstone.execute.values import StreamStats
from loadstone.stream.filler import Filler


def counted_so_far(
    ring: Ring, filler: Filler, room: ExpertRoom | None, shortage: Shortage, in_parts: Iterable[InParts]
) -> StreamStats:
    """The statistics of a model, less its passes, which none of these knows of."""
    parts = list(in_parts)
    experts, readers = ExpertCounts() if room is None else room.counts, filler.readers()
    return StreamStats(
        passes=0,
        pass_s=0.0,
        uses=ring.uses,
        hits=ring.hits,
        unforeseen=ring.unforeseen,
        streamed_bytes=ring.streamed_bytes + experts.read_bytes,
        stall_s=ring.stall_s + experts.stall_s,
        num_units=len(ring.units),
        num_slots=len(ring.slots),
        slot_bytes=sum(slot.data.numel() for slot in ring.slots),
        front_bytes=sum(filler.layout(name).front_bytes for name in ring.units),
        compressed_bytes=sum(filler.layout(name).compressed_bytes for name in ring.units),
        window_bytes=sum(part.memory_bytes for part in parts),
        pass_bytes=ring.pass_bytes + sum(part.pass_bytes for part in parts),
        read_bytes=sum(reader.done_bytes for reader in readers),
        read_s=sum(reader.busy_s for reader in readers),
        expert_uses=experts.uses,
        expert_hits=experts.hits,
        expert_bytes=experts.read_bytes,
        room_bytes=experts.room_bytes,
        given_back_bytes=shortage.given_back_bytes,
    )
