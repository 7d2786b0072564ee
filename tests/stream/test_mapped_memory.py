"""Elements that lie apart in a mapped file, copied by the kernel."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadstone.hardware.pages import PAGE_BYTES
from loadstone.stream import memory
from loadstone.stream.memory import Gatherer, map_file

WORDS = np.random.default_rng(0).integers(0, 1 << 16, (60, 70), np.uint16)
VIEWS = {
    "transposed": lambda words: words.T,
    "a column": lambda words: words[:, 3],
    "steps": lambda words: words[::3, ::2],
    "repeated": lambda words: np.broadcast_to(words[:1], (5, 70)),
    "cube": lambda words: words.reshape(4, 15, 70).transpose(2, 0, 1),
    "contiguous": lambda words: words[2:9],
    "nothing": lambda words: words[:, :0],
    "one": lambda words: words[7, 7:8],
}


@pytest.fixture
def mapped(tmp_path: Path) -> Any:
    (tmp_path / "m").write_bytes(b"odd" + WORDS.tobytes())
    return map_file(tmp_path / "m")[3:].view(np.uint16).reshape(WORDS.shape)


@pytest.mark.parametrize("system", ["with memfd", "without"])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_copied_in_its_order(mapped: Any, name: str, system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if system == "without":
        monkeypatch.delattr(os, "memfd_create")
    view = VIEWS[name](mapped)
    found = np.full(view.nbytes, 0xAB, np.uint8)
    with Gatherer() as gatherer:
        assert gatherer.copy(view, found)
    assert found.tobytes() == VIEWS[name](WORDS).tobytes()


def test_what_is_cut_short_is_told(tmp_path: Path) -> None:
    rows = 4 * memory._MAX_PIECES
    (tmp_path / "m").write_bytes(bytes(rows * PAGE_BYTES))
    view = map_file(tmp_path / "m").reshape(rows, PAGE_BYTES)[:, :2]
    found = np.zeros(view.nbytes, np.uint8)
    with Gatherer() as gatherer:
        os.truncate(tmp_path / "m", (rows - 1) * PAGE_BYTES)
        assert not gatherer.copy(view, found)
        assert gatherer.copy(view[:-1], found[:-2])
