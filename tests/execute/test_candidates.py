"""What is foretold, and how much of it."""

from loadstone.execute.candidates import Pace, PromptLookup


def test_what_followed_last_time_is_foretold() -> None:
    text = [1, 2, 3, 4, 5, 6, 9, 2, 3]
    lookup = PromptLookup()
    assert lookup.propose(text, 3) == [4, 5, 6]
    assert lookup.propose([*text, 7, 2, 3], 2) == [7, 2]  # the last time counts
    assert lookup.propose([*text, 7, 2, 3, 8], 2) == []  # 3 8 is new


def test_the_longest_repeat_decides() -> None:
    assert PromptLookup().propose([1, 2, 3, 4, 50, 3, 4, 60, 1, 2, 3, 4], 1) == [50]


def test_a_repeat_that_reaches_the_end_goes_round() -> None:
    assert PromptLookup().propose([7, 8, 9, 7, 8, 9, 7, 8], 7) == [9, 7, 8, 9, 7, 8, 9]
    assert PromptLookup().propose([5, 5, 5], 4) == [5, 5, 5, 5]


def test_nothing_is_foretold_of_a_text_without_repeats() -> None:
    lookup = PromptLookup()
    assert [lookup.propose(list(range(length)), 4) for length in range(1, 9)] == [[]] * 8


def test_the_pace_grows_with_success_and_rests_after_failures() -> None:
    pace = Pace()
    first = pace.next()
    pace.learn(first, first)
    assert pace.next() == 2 * first
    pace.learn(8, 3)
    assert pace.next() == 4
    pace.learn(4, 0)
    counts = [pace.next() for _ in range(4)]
    assert counts == [0, 0, 2, 2]
    for _ in range(10):
        pace.learn(1, 0)
    rests = 0
    while not pace.next():
        rests += 1
    assert rests == 16
    pace.learn(1, 1)
    assert pace.next() == 2
