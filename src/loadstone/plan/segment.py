"""What there is to place on one device, and how it was placed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loadstone.plan.cost import Beside, Speeds
from loadstone.plan.values import Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Units that compute on one device, and what there is to place them in.

    Attributes:
        device: its id.
        units: in execution order.
        parts: divides a unit by modules.
        room_bytes: of the device, for resident units and the ring.
        host_room_bytes: of the host, for streamed units to live in; 0 where they live on the disk.
        tokens: of a decoding pass, and of the pass over the prompt.
        num_passes: decoding passes for each pass over a prompt.
        beside: what a decoding pass, and the pass over the prompt, do beside products with weights.
        speeds: of the machine.
        offload: whether anything may be streamed.
        fronts: whether the front of a unit may stay while the rest of it is streamed, where the host computes.
        compresses: whether some of that rest may stay compressed.
        expanding_bytes: what the device needs beside slots to expand what travels to it as stored.
    """

    device: str
    units: tuple[Unit, ...]
    parts: Callable[[Unit], tuple[Unit, ...]]
    room_bytes: int
    host_room_bytes: int
    tokens: tuple[int, int]
    num_passes: int
    beside: tuple[Beside, Beside]
    speeds: Speeds
    offload: bool = True
    fronts: bool = True
    compresses: bool = False
    expanding_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """A unit, the place that keeps it, and the device that computes with it.

    Attributes:
        spare_bytes: what it takes of host memory besides; see `loadstone.plan.values.Placement`.
    """

    unit: Unit
    home: str
    compute: str
    spare_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """How the units of a segment are placed.

    Attributes:
        assignments: in execution order.
        num_slots: of the ring; 0 where nothing goes through it.
        slot_bytes: the most that goes through a slot of a unit that has a front; 0 where none has.
        read_bytes: the most that is read of a unit of which some stays compressed; None where none does.
        ring_bytes: all its slots, what expanding takes beside them, and the rows of streamed tables.
        host_bytes: of streamed units that live in host memory.
        pass_s: a decoding pass, then the pass over the prompt.
    """

    assignments: tuple[Assignment, ...]
    num_slots: int
    slot_bytes: int
    read_bytes: int | None
    ring_bytes: int
    host_bytes: int
    pass_s: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """No choice fits.

    Attributes:
        nbytes: the least that is missing on the device.
    """

    nbytes: int
