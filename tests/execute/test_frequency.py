"""What stays by how often it was chosen is hit more often than what stays by when it was chosen last."""

import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from loadstone.execute.frequency import Frequencies, Shelf

LAYERS, EXPERTS, CHOSEN, TOKENS = 8, 32, 4, 400


def choices(skew: float, *, drifts: bool) -> list[list[np.ndarray]]:
    """For each token and layer the chosen experts, some likelier than others; which ones, may change half-way."""
    rng = np.random.default_rng(0)
    tokens = []
    for token in range(TOKENS):
        if token == 0 or (drifts and token == TOKENS // 2):
            ranks = [rng.permutation(EXPERTS) for _ in range(LAYERS)]
        likely = [1.0 / (1 + rank) ** skew for rank in ranks]
        tokens.append([np.sort(rng.choice(EXPERTS, CHOSEN, replace=False, p=one / one.sum())) for one in likely])
    return tokens


def hits_by_frequency(tokens: list[list[np.ndarray]], room: int) -> float:
    frequencies = Frequencies(LAYERS, EXPERTS)
    shelf = Shelf(room, frequencies, np.arange(LAYERS))
    hits = 0
    for layers in tokens:
        for layer, experts in enumerate(layers):
            frequencies.note(layer, np.bincount(experts, minlength=EXPERTS), 1)
            wanted = [(layer, int(expert)) for expert in experts]
            missing = [item for item in wanted if shelf.place_of(item) is None]
            hits += len(wanted) - len(missing)
            free = (place for place in shelf.expendable() if shelf.item_at(place) not in wanted)
            for item, place in zip(missing, free, strict=False):
                shelf.put(place, item)
    return hits / (TOKENS * LAYERS * CHOSEN)


def hits_by_recency(tokens: list[list[np.ndarray]], room: int) -> float:
    kept: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = 0
    for layers in tokens:
        for layer, experts in enumerate(layers):
            for item in [(layer, int(expert)) for expert in experts]:
                hits += item in kept
                kept[item] = None
                kept.move_to_end(item)
                if len(kept) > room:
                    kept.popitem(last=False)
    return hits / (TOKENS * LAYERS * CHOSEN)


@pytest.mark.parametrize("drifts", [False, True])
@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("skew", [0.7, 1.2])
def test_frequency_beats_recency_with_skewed_routers(skew: float, share: float, drifts: bool) -> None:
    tokens = choices(skew, drifts=drifts)
    room = int(share * LAYERS * EXPERTS)
    factor = 1.02 if drifts else 1.05  # after a change, what was chosen before is in the way for a while
    assert hits_by_frequency(tokens, room) > factor * hits_by_recency(tokens, room)


def test_on_a_circle_of_equals_the_others_stay() -> None:
    """Every layer chooses the same experts for each token, one more than there is room for."""
    tokens = [[np.arange(CHOSEN)] * LAYERS] * TOKENS
    room = LAYERS * CHOSEN - 1
    assert hits_by_recency(tokens, room) == 0
    assert hits_by_frequency(tokens, room) > 0.8


def test_counts_are_lowered_before_they_overflow() -> None:
    frequencies = Frequencies(1, 2)
    for _ in range(200_000):
        frequencies.note(0, np.array([1, 0]), 2)
    layers = np.zeros(2, np.int64)
    first, second = frequencies.of(layers, np.arange(2))
    assert first == pytest.approx(0.5)
    assert second == 0


def test_later_choices_count_more_and_a_long_prompt_counts_as_a_few_tokens() -> None:
    frequencies = Frequencies(1, 2)
    frequencies.note(0, np.array([1000, 0]), 1000)
    for _ in range(64):
        frequencies.note(0, np.array([0, 1]), 1)
    first, second = frequencies.of(np.zeros(2, np.int64), np.arange(2))
    assert 16 / 80 > first > 0.1
    assert second > 64 / 80


def test_a_place_is_emptied_and_given_to_another() -> None:
    shelf = Shelf(2, Frequencies(1, 4), np.zeros(2, np.int64))
    shelf.put(0, (1, 3))
    shelf.put(0, (0, 2))
    assert (shelf.place_of((1, 3)), shelf.place_of((0, 2)), shelf.item_at(0)) == (None, 0, (0, 2))
    shelf.drop(0)
    assert (shelf.item_at(0), shelf.place_of((0, 2))) == (None, None)
    assert list(shelf.expendable()) == [0, 1]
