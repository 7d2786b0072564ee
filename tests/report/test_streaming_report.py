"""What streaming has done, as people and programs read it."""

import json
from dataclasses import replace

import pytest

from loadstone.execute.values import StreamStats
from loadstone.report.streaming import as_text, to_json

STATS = StreamStats(
    passes=12,
    uses=240,
    hits=228,
    unforeseen=1,
    streamed_bytes=41_200_000_000,
    stall_s=2.0,
    num_units=20,
    num_slots=2,
    slot_bytes=932_000_000,
    pass_bytes=3_430_000_000,
    pass_s=25.0,
    read_bytes=42_000_000_000,
    read_s=24.5,
    disk_bytes_per_s=1.75e9,
)


def test_the_text_says_how_much_how_fast_and_how_long_it_was_waited_for() -> None:
    assert as_text(STATS).splitlines() == [
        "streamed 41.2 GB in 12 passes at 1.71 GB/s (disk measured 1.75 GB/s), waited 8% of the time",
        "240 uses of 20 units through 2 slots of 932 MB together, 228 of them there in time; 92% of the reading "
        "hidden; 2.00 s of 25.00 s waited",
    ]
    assert "measured" not in as_text(replace(STATS, disk_bytes_per_s=None))
    assert "in 1 pass at" in as_text(replace(STATS, passes=1))
    slots = "through 2 slots of 932 MB together, beside"
    assert f"{slots} 1.50 GB of them that stay, 228" in as_text(replace(STATS, front_bytes=1_500_000_000))
    assert f"{slots} 2.00 GB that stay compressed, 228" in as_text(replace(STATS, compressed_bytes=2_000_000_000))
    both = replace(STATS, front_bytes=1_500_000_000, compressed_bytes=2_000_000_000)
    assert f"{slots} 1.50 GB of them that stay and 2.00 GB that stay compressed, 228" in as_text(both)
    assert both.memory_bytes == 4_432_000_000
    sliced = replace(STATS, window_bytes=134_000_000)
    assert f"{slots} 134 MB for slices of the head, 228" in as_text(sliced)
    assert sliced.memory_bytes == 1_066_000_000


def test_json_has_the_figures_and_what_follows_from_them() -> None:
    data = json.loads(json.dumps(to_json(STATS)))
    assert data["compute_s"] == 23.0
    assert data["waited_share"] == 0.08
    assert data["overlap"] == pytest.approx(1 - 2 / 24.5)
    assert data["read_bytes_per_s"] == pytest.approx(1.714e9, rel=1e-3)
    assert data["hits"] == 228


def test_a_model_that_never_ran_has_figures_too() -> None:
    nothing = replace(STATS, passes=0, streamed_bytes=0, stall_s=0.0, pass_s=0.0, read_bytes=0, read_s=0.0)
    assert (nothing.waited_share, nothing.overlap, nothing.read_bytes_per_s) == (0.0, 0.0, 0.0)
    assert as_text(nothing).startswith("streamed 0 B in 0 passes")
