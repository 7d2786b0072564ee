import os
import threading
from pathlib import Path

import numpy as np
import pytest

from loadstone.events import BytesMoved, Event, ignore
from loadstone.stream.memory import is_cached, map_file, will_need
from loadstone.stream.prefault import Prefault

NBYTES = 5_000_001


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(np.random.default_rng(0).bytes(NBYTES))
    return path


def drop(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if is_cached(map_file(path)):
        pytest.skip("a file system in memory, where nothing can be dropped")


def test_what_was_written_is_cached_and_what_was_dropped_is_not(path: Path) -> None:
    assert is_cached(map_file(path))
    drop(path)
    assert not is_cached(map_file(path))
    will_need(map_file(path))  # a hint: it must not fail, and nothing more is promised


@pytest.mark.parametrize("beside_imports", [True, False])
def test_a_cold_file_is_brought_in_whole(path: Path, beside_imports: bool) -> None:
    drop(path)
    told: list[Event] = []
    prefault = Prefault([map_file(path)], beside_imports=beside_imports, observer=told.append)
    prefault.wait()
    assert prefault.done_bytes == NBYTES
    assert prefault.seconds > 0
    assert told[-1] == BytesMoved(stage="page in", done_bytes=NBYTES, total_bytes=NBYTES)
    assert is_cached(map_file(path))


def test_a_cached_file_is_left_to_the_forward_unless_imports_run_meanwhile(path: Path) -> None:
    idle = Prefault([map_file(path)], beside_imports=False, observer=ignore)
    idle.wait()
    assert idle.done_bytes == 0
    busy = Prefault([map_file(path)], beside_imports=True, observer=ignore)
    busy.wait()
    assert busy.done_bytes == NBYTES


def test_a_stopped_prefault_ends(path: Path) -> None:
    started = threading.Event()

    def stop_at_the_first_event(event: Event) -> None:
        started.wait()
        prefault.stop()

    prefault = Prefault([map_file(path)] * 100, beside_imports=True, observer=stop_at_the_first_event)
    started.set()
    prefault.wait()
    assert 0 < prefault.done_bytes < 100 * NBYTES
