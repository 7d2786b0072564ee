"""What streaming has done, in a line or two, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from loadstone.execute.values import StreamStats
from loadstone.units import format_bytes, format_rate, format_seconds


def as_text(stats: StreamStats) -> str:
    """For people: how much was read, how fast, and how long it was waited for."""
    passes = "1 pass" if stats.passes == 1 else f"{stats.passes:,} passes"
    limit = f" (disk measured {format_rate(stats.disk_bytes_per_s)})" if stats.disk_bytes_per_s else ""
    stays = beside_slots(stats)
    return (
        f"streamed {format_bytes(stats.streamed_bytes)} in {passes} at {format_rate(stats.read_bytes_per_s)}{limit}, "
        f"waited {stats.waited_share:.0%} of the time\n"
        f"{stats.uses:,} uses of {stats.num_units:,} units through {stats.num_slots} slots of "
        f"{format_bytes(stats.slot_bytes)} together{stays}, {stats.hits:,} of them there in time; "
        f"{stats.overlap:.0%} of the reading hidden; {format_seconds(stats.stall_s)} of {format_seconds(stats.pass_s)} "
        "waited"
    )


def beside_slots(stats: StreamStats) -> str:
    """What is in memory beside slots: what stays of units that come and go, slices of heads; "" for nothing."""
    found = {
        "of them that stay": stats.front_bytes,
        "that stay compressed": stats.compressed_bytes,
        "for slices of the head": stats.window_bytes,
    }
    told = [f"{format_bytes(nbytes)} {what}" for what, nbytes in found.items() if nbytes]
    return f", beside {' and '.join(told)}" if told else ""


def to_json(stats: StreamStats) -> dict[str, Any]:
    """Every figure, with what follows from them."""
    return asdict(stats) | {
        "compute_s": stats.compute_s,
        "waited_share": stats.waited_share,
        "overlap": stats.overlap,
        "read_bytes_per_s": stats.read_bytes_per_s,
    }
