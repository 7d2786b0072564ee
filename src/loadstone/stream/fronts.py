"""Units whose front stays in memory while the rest of them comes and goes: both are seen as one stretch.

A matrix must lie in one piece to be multiplied with. So the pages of the slot that holds its rest are shown behind
those of its front: the same pages, at other addresses, for as long as the unit computes. Nothing is copied.
"""

from __future__ import annotations

import os

from loadstone.hardware.pages import Bytes, aligned, map_over, shared, whole_pages


def front_bytes(nbytes: int, slot_bytes: int) -> int:
    """What of a unit must stay so that the rest of it fits into a slot; whole pages.

    Args:
        nbytes: of the unit.
        slot_bytes: of the slot.
    """
    return whole_pages(max(0, nbytes - slot_bytes))


class SharedSlot:
    """Memory whose pages can be shown elsewhere too; close it.

    Args:
        nbytes: how much.

    Attributes:
        data: it, shape (nbytes,).
    """

    def __init__(self, nbytes: int) -> None:
        self._descriptor = os.memfd_create("loadstone-slot")
        try:
            self.data: Bytes = shared(self._descriptor, whole_pages(nbytes))[:nbytes]
        except BaseException:
            self.close()
            raise

    def show_at(self, place: Bytes) -> None:
        """Have the first bytes be seen in a place too, instead of what was there.

        Args:
            place: whole pages of anonymous memory, at most as many as there are here.

        Raises:
            OSError: the system has no more room for maps.
        """
        map_over(place, self._descriptor)

    def close(self) -> None:
        """Show it nowhere else any more; the pages go with the last of those who see them."""
        os.close(self._descriptor)


class FrontedUnit:
    """The memory of one unit: its front, and behind it whichever slot the rest is in.

    Args:
        nbytes: of the unit.
        front: how many of them stay; whole pages.

    Attributes:
        data: all of it, shape (nbytes,).
        front_bytes: see above.
        is_there: whether the front was read.
        slot: what the rest is seen in; None for nothing.
    """

    def __init__(self, nbytes: int, front: int) -> None:
        # Sparse: what is behind the front is never touched but through a slot.
        # A huge page of the slot is seen in one step only where one could begin.
        self._whole = aligned(whole_pages(nbytes), at=front)
        self.data = self._whole[:nbytes]
        self.front_bytes = front
        self.is_there = False
        self.slot: SharedSlot | None = None

    def show(self, slot: SharedSlot) -> None:
        """See the rest of the unit in a slot.

        Raises:
            OSError: the system has no more room for maps.
        """
        self.slot = None  # an interrupt can come at any line: what is said to be seen must be
        slot.show_at(self._whole[self.front_bytes :])
        self.slot = slot

    def hide(self) -> None:
        """See nothing there any more: pages would count for each unit that sees them, and outlive their slot."""
        self.slot = None
        map_over(self._whole[self.front_bytes :], None)
