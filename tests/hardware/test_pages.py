"""Memory whose pages adjoin: as much as was asked for, in huge pages where the system has some."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
import pytest

from loadstone.hardware.memory import resident
from loadstone.hardware.pages import HUGE_BYTES, PAGE_BYTES, adjoining, aligned, give_back, shared

NBYTES = 5 * HUGE_BYTES + 3 * PAGE_BYTES + 100
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes(kind: str) -> int:
    """What this process sees in huge pages: `AnonHugePages` or `ShmemPmdMapped`."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def needs_huge_pages(*, kernel: tuple[int, int] = (0, 0)) -> None:
    found = tuple(int(part) for part in platform.release().split(".")[:2]) if platform.system() == "Linux" else (0, 0)
    if not SETTING.exists() or "[never]" in SETTING.read_text() or found < kernel:
        pytest.skip("this system has no huge pages, or an older kernel")


def test_all_of_it_is_found_at_once_and_no_more() -> None:
    adjoining(NBYTES)  # what is imported and allocated on the way
    before = resident().anonymous_bytes
    memory = adjoining(NBYTES)
    found = resident().anonymous_bytes - before
    assert memory.shape == (NBYTES,)
    assert memory.ctypes.data % PAGE_BYTES == 0
    assert not memory.any()
    assert NBYTES <= found < NBYTES + 16 * PAGE_BYTES
    memory[:] = 7
    give_back(memory)
    assert not memory.any()


@pytest.mark.parametrize("nbytes", [1, PAGE_BYTES, HUGE_BYTES - 1])
def test_less_than_a_huge_page_is_no_huge_page(nbytes: int) -> None:
    before = huge_bytes("AnonHugePages")
    memory = adjoining(nbytes)
    memory[-1] = 1
    assert huge_bytes("AnonHugePages") == before


def test_it_lies_in_huge_pages() -> None:
    needs_huge_pages()
    before = huge_bytes("AnonHugePages")
    memory = adjoining(NBYTES)
    # Memory that is scattered may not have five of them left.
    assert HUGE_BYTES <= huge_bytes("AnonHugePages") - before <= NBYTES
    del memory


@pytest.mark.parametrize("at", [0, PAGE_BYTES, HUGE_BYTES, 7 * HUGE_BYTES + 11 * PAGE_BYTES])
def test_a_place_within_can_be_where_a_huge_page_begins(at: int) -> None:
    before = resident().anonymous_bytes
    memory = aligned(8 * HUGE_BYTES, at)
    assert memory.size == 8 * HUGE_BYTES
    assert (memory.ctypes.data + at) % HUGE_BYTES == 0
    assert resident().anonymous_bytes - before < HUGE_BYTES
    memory[-1] = 1  # it is all there


def test_shared_memory_lies_in_huge_pages_whatever_the_administrator_has_set() -> None:
    needs_huge_pages(kernel=(6, 1))
    before = huge_bytes("ShmemPmdMapped")
    descriptor = os.memfd_create("test")
    memory = shared(descriptor, 5 * HUGE_BYTES + PAGE_BYTES)
    assert HUGE_BYTES <= huge_bytes("ShmemPmdMapped") - before <= 5 * HUGE_BYTES
    memory[:] = np.arange(memory.size, dtype=np.uint8)
    assert os.pread(descriptor, 300, HUGE_BYTES - 100) == bytes(memory[HUGE_BYTES - 100 :][:300])
    os.close(descriptor)


def test_what_is_seen_behind_a_front_is_seen_in_huge_pages() -> None:
    needs_huge_pages(kernel=(6, 1))
    from loadstone.stream.fronts import FrontedUnit, SharedSlot

    slot, unit = SharedSlot(4 * HUGE_BYTES), FrontedUnit(5 * HUGE_BYTES + 5, HUGE_BYTES + PAGE_BYTES)
    before = huge_bytes("ShmemPmdMapped")
    unit.show(slot)
    unit.data[HUGE_BYTES + PAGE_BYTES :] = 3
    assert huge_bytes("ShmemPmdMapped") - before >= HUGE_BYTES
    assert slot.data[: 3 * HUGE_BYTES].min() == 3
    unit.hide()
    assert huge_bytes("ShmemPmdMapped") == before
    slot.close()
