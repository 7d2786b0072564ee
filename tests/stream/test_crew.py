"""Threads that share lots of work."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from loadstone.stream.crew import Crew


class Lot:
    """Items to be taken one by one, and what became of them."""

    def __init__(self, items: list[str]) -> None:
        self.items = items
        self.is_cancelled = False

    def take(self) -> str | None:
        return self.items.pop(0) if self.items and not self.is_cancelled else None

    def cancel(self) -> None:
        self.is_cancelled = True


def crew_of(done: list[str], gate: threading.Event, niceness: int = 0) -> Crew[Lot, str, threading.Event]:
    def work(_: Lot, item: str, tool: threading.Event) -> None:
        assert tool.wait(10)
        done.append(item)

    return Crew(Lot.take, work, lambda: gate, name="test-crew", niceness=niceness)


def test_the_most_urgent_lot_is_worked_off_first() -> None:
    done: list[str] = []
    gate = threading.Event()
    crew = crew_of(done, gate)
    begun = Lot(["begun"])
    crew.begin(begun, 5, 1)
    while begun.items:  # the only thread is at work, and looks for more when it is done
        pass
    crew.begin(Lot(["later", "last"]), 1, 1)
    crew.begin(Lot(["soon"]), 0, 1)
    gate.set()
    while len(done) < 4:
        pass
    crew.close(Lot.cancel)
    assert done == ["begun", "soon", "later", "last"]
    assert not crew.threads


def test_closing_cancels_what_waits_and_it_begins_anew() -> None:
    done: list[str] = []
    gate = threading.Event()
    crew = crew_of(done, gate)
    lots = [Lot(["a", "b"]), Lot(["c"])]
    crew.begin(lots[0], 0, 1)
    crew.begin(lots[1], 0, 1)
    opener = threading.Timer(0.05, gate.set)
    opener.start()
    crew.close(Lot.cancel)
    assert len(done) <= 1
    assert lots[1].is_cancelled
    crew.begin(Lot(["d"]), 0, 2)
    while "d" not in done:
        pass
    crew.close(Lot.cancel)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness of their own")
def test_threads_give_way_and_the_process_does_not() -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    seen: list[int] = []

    def work(lot: Lot, item: str, tool: None) -> None:
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    crew: Crew[Lot, str, None] = Crew(Lot.take, work, lambda: None, name="test-crew", niceness=min(19, own + 3))
    crew.begin(Lot(["a"]), 0, 1)
    while not seen:
        pass
    crew.close(Lot.cancel)
    assert seen == [min(19, own + 3)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == own
