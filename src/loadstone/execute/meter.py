"""How long the forwards of a streamed model took, and where the one under way is, for whoever watches."""

from __future__ import annotations

import time

from loadstone.events import Observer, PassProgress, ignore


class Meter:
    """Times forwards and tells of their progress. What it is given are sums over all forwards.

    Args:
        observer: is told.

    Attributes:
        seconds: of all forwards that are over, also of units that were called by themselves.
    """

    def __init__(self, observer: Observer) -> None:
        self.seconds = 0.0
        self._num_units = self._pass_bytes = 0
        self._observer = None if observer is ignore else observer
        self._number = self._done_units = self._bytes_before = 0
        self._in_pass = False
        self._begin_s = self._stall_before_s = 0.0

    def expect(self, num_units: int, pass_bytes: int) -> None:
        """So many units are streamed from now on, of which one use of each reads so much."""
        self._num_units, self._pass_bytes = num_units, pass_bytes

    def begin(self, number: int, streamed_bytes: int, stall_s: float) -> None:
        """A forward of the whole model begins."""
        self._number, self._done_units, self._in_pass = number, 0, True
        self._bytes_before, self._stall_before_s = streamed_bytes, stall_s
        self.start()
        self._tell("", streamed_bytes, stall_s)

    def start(self) -> None:
        """Start the clock: something of the model computes."""
        self._begin_s = time.perf_counter()

    def need(self, unit: str, streamed_bytes: int, stall_s: float) -> None:
        """A unit is needed now."""
        self._tell(unit, streamed_bytes, stall_s)
        self._done_units += 1

    def end(self, streamed_bytes: int, stall_s: float) -> None:
        """The forward is over."""
        self._tell("", streamed_bytes, stall_s, is_over=True)
        self._in_pass = False

    def stop(self) -> None:
        """Stop the clock: nothing computes any more."""
        self.seconds += time.perf_counter() - self._begin_s

    def _tell(self, unit: str, streamed_bytes: int, stall_s: float, *, is_over: bool = False) -> None:
        if self._observer is None or not self._in_pass:
            return
        self._observer(
            PassProgress(
                number=self._number,
                unit=unit,
                done_units=self._done_units,
                num_units=self._num_units,
                done_bytes=streamed_bytes - self._bytes_before,
                total_bytes=self._pass_bytes,
                seconds=time.perf_counter() - self._begin_s,
                waited_s=stall_s - self._stall_before_s,
                is_over=is_over,
            )
        )
