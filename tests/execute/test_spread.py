"""What goes and what comes back when memory changes, worked out from sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadstone.execute.spread import Piece, least_bytes, lowered, raised, total_bytes

BLOCK, HEAD, TABLE, NORM = 100, 400, 300, 2


def piece(name: str, nbytes: int, *, is_table: bool = False, is_kept: bool = True) -> Piece:
    return Piece(name=name, nbytes=nbytes, slot_bytes=0 if is_table else nbytes, is_kept=is_kept)


def model(kept: frozenset[str] | None = None) -> list[Piece]:
    names = {"table": TABLE} | {f"block {number}": BLOCK for number in range(8)} | {"norm": NORM, "head": HEAD}
    return [
        piece(name, nbytes, is_table=name == "table", is_kept=kept is None or name in kept)
        for name, nbytes in names.items()
    ]


def after(pieces: list[Piece], gone: list[str], back: list[str]) -> list[Piece]:
    return [
        piece(
            one.name,
            one.nbytes,
            is_table=not one.slot_bytes,
            is_kept=one.name in back or (one.is_kept and one.name not in gone),
        )
        for one in pieces
    ]


ALL = TABLE + 8 * BLOCK + NORM + HEAD


@pytest.mark.parametrize(
    ("limit", "gone"),
    [
        (ALL, []),
        (ALL - 1, ["table"]),
        # Two blocks only make room for the slots; the third is the first that helps.
        (ALL - TABLE - 1, ["table", "block 0", "block 4", "block 2"]),
    ],
)
def test_tables_go_first_and_then_blocks_far_from_each_other(limit: int, gone: list[str]) -> None:
    found = lowered(model(), limit, 2)
    assert found[:2] == gone[:2]
    assert len(found) == len(gone)
    assert total_bytes(after(model(), found, []), 2) <= limit


def test_no_block_goes_beside_another_while_there_is_room_between() -> None:
    blocks = [piece(f"block {number}", BLOCK) for number in range(8)]
    gone = lowered(blocks, 6 * BLOCK, 2)
    numbers = sorted(int(name.split()[1]) for name in gone)
    assert len(numbers) == 4
    assert all((after - before) % 8 >= 2 for before, after in zip(numbers, [*numbers[1:], numbers[0]], strict=True))


def test_what_is_small_or_needs_larger_slots_goes_last() -> None:
    gone = lowered(model(), 2 * BLOCK, 2)
    assert gone.index("head") > max(gone.index(f"block {number}") for number in range(8))
    assert gone[-1] == "norm"


def test_those_that_lie_nearest_to_each_other_come_back_first() -> None:
    blocks = [piece(f"block {number}", BLOCK, is_kept=number in {2, 3, 4, 6, 7}) for number in range(8)]
    # 0 and 1 are neighbours, 5 is alone.
    assert raised(blocks, 7 * BLOCK, 1, {"block 0", "block 1", "block 5"})[0] in {"block 0", "block 1"}


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    tables=st.sets(st.integers(0, 29)),
    kept=st.sets(st.integers(0, 29)),
    share=st.floats(0, 1),
    num_slots=st.integers(1, 4),
)
def test_the_limit_holds_and_nothing_more_would_fit(
    sizes: list[int], tables: set[int], kept: set[int], share: float, num_slots: int
) -> None:
    pieces = [
        piece(str(number), size, is_table=number in tables, is_kept=number in kept) for number, size in enumerate(sizes)
    ]
    least = least_bytes(pieces, num_slots)
    limit = least + int(share * sum(sizes))
    gone = lowered(pieces, limit, num_slots)
    now = after(pieces, gone, [])
    assert total_bytes(now, num_slots) <= limit
    back = raised(now, limit, num_slots, {one.name for one in now})
    then = after(now, [], back)
    assert total_bytes(then, num_slots) <= limit
    assert all(one.is_kept for one in then) or limit < sum(sizes)
