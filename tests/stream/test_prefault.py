import os
import threading
from pathlib import Path

import numpy as np
import pytest

from loadstone.errors import TruncatedFile
from loadstone.events import BytesMoved, Event, ignore
from loadstone.stream.memory import TOUCH_BYTES, Toucher, is_cached, map_file, will_need
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
    prefault = Prefault([(path, map_file(path))], beside_imports=beside_imports, observer=told.append)
    prefault.wait()
    assert prefault.done_bytes == NBYTES
    assert prefault.seconds > 0
    assert told[-1] == BytesMoved(stage="page in", done_bytes=NBYTES, total_bytes=NBYTES)
    assert is_cached(map_file(path))


def test_a_cached_file_is_left_to_the_forward_unless_imports_run_meanwhile(path: Path) -> None:
    idle = Prefault([(path, map_file(path))], beside_imports=False, observer=ignore)
    idle.wait()
    assert idle.done_bytes == 0
    busy = Prefault([(path, map_file(path))], beside_imports=True, observer=ignore)
    busy.wait()
    assert busy.done_bytes == NBYTES


def test_only_the_hole_in_a_cached_file_is_brought_in(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), TOUCH_BYTES, TOUCH_BYTES, os.POSIX_FADV_DONTNEED)
    if is_cached(map_file(path)):
        pytest.skip("a file system in memory, where nothing can be dropped")
    prefault = Prefault([(path, map_file(path))], beside_imports=False, observer=ignore)
    prefault.wait()
    assert prefault.done_bytes == TOUCH_BYTES
    assert is_cached(map_file(path))


def test_a_stopped_prefault_ends(path: Path) -> None:
    started = threading.Event()

    def stop_at_the_first_event(event: Event) -> None:
        started.wait()
        prefault.stop()

    prefault = Prefault([(path, map_file(path))] * 100, beside_imports=True, observer=stop_at_the_first_event)
    started.set()
    prefault.wait()
    assert 0 < prefault.done_bytes < 100 * NBYTES


@pytest.mark.parametrize("beside_imports", [True, False])
def test_a_file_cut_short_after_it_was_mapped_is_an_error_not_a_signal(path: Path, beside_imports: bool) -> None:
    drop(path)
    mapped = map_file(path)
    os.truncate(path, NBYTES // 2)
    prefault = Prefault([(path, mapped)], beside_imports=beside_imports, observer=ignore)
    with pytest.raises(TruncatedFile, match=r"weights.bin: expected the file as it was when it was opened"):
        prefault.wait()


def test_touching_says_whether_every_page_is_there(path: Path) -> None:
    mapped = map_file(path)
    with Toucher() as toucher:
        assert toucher.touch(mapped[:TOUCH_BYTES])
        assert toucher.touch(mapped[-1:])
        assert toucher.touch(mapped[5 : TOUCH_BYTES + 5])
        os.truncate(path, TOUCH_BYTES)
        assert toucher.touch(mapped[:TOUCH_BYTES])
        assert not toucher.touch(mapped[5000 : TOUCH_BYTES + 5000])


def test_beside_the_imports_what_they_need_is_asked_for_first(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    asked, done = threading.Event(), threading.Event()
    prefault = Prefault(
        [(path, map_file(path))],
        beside_imports=True,
        after=lambda: asked.wait(30),
        observer=lambda _: done.set(),
    )
    assert not done.wait(0.2)
    assert prefault.done_bytes == 0
    asked.set()
    prefault.wait()
    assert prefault.done_bytes == 1 << 20
