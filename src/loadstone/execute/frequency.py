"""Which experts stay: those that were chosen most, later choices counting more. Numbers only.

The walk over layers is a circle, on which what was used longest ago is what comes next: giving up the least recently
used keeps nothing. How often an expert is chosen is a property of the model and of the text, and changes slowly.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

# Passes after which a choice counts half.
_HALF_LIFE = 128.0
# A long prompt counts as so many tokens: its words say less of what follows than the last ones do.
_MOST_TOKENS = 16
# Weights grow instead of all counts being lowered in each pass; before they overflow all are lowered.
_LARGE = 2.0**500

Item = tuple[int, int]
_NONE = -1


class Frequencies:
    """How often each expert of each layer was chosen.

    Args:
        num_layers: layers with experts.
        num_experts: the most that one of them has.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._counts = np.zeros((num_layers, num_experts))
        self._tokens = np.zeros(num_layers)
        self._weights = np.ones(num_layers)

    def note(self, layer: int, counts: NDArray[np.int64], num_tokens: int) -> None:
        """Note one pass of a layer.

        Args:
            layer: its number.
            counts: by expert, how many tokens chose it.
            num_tokens: how many there were.
        """
        if self._weights[layer] > _LARGE:
            self._counts[layer] /= self._weights[layer]
            self._tokens[layer] /= self._weights[layer]
            self._weights[layer] = 1.0
        self._weights[layer] *= 2.0 ** (1.0 / _HALF_LIFE)
        weight = self._weights[layer] * min(1.0, _MOST_TOKENS / max(1, num_tokens))
        self._counts[layer, : counts.size] += counts * weight
        self._tokens[layer] += num_tokens * weight

    def of(self, layers: NDArray[np.int64], experts: NDArray[np.int64]) -> NDArray[np.float64]:
        """The part of the tokens that chose each of these.

        Parts, because in the middle of a pass some layers have counted it and others have not.
        """
        found: NDArray[np.float64] = self._counts[layers, experts] / np.maximum(self._tokens[layers], 1e-9)
        return found


class Shelf:
    """Places for entries of one size: what is in which, and which is given up first.

    Args:
        count: how many places.
        frequencies: of the experts.
        layer_of: the layer of each table.
    """

    def __init__(self, count: int, frequencies: Frequencies, layer_of: NDArray[np.int64]) -> None:
        self._frequencies = frequencies
        self._layer_of = layer_of
        self._tables = np.full(count, _NONE, np.int64)
        self._experts = np.zeros(count, np.int64)
        self._place_of: dict[Item, int] = {}

    def place_of(self, item: Item) -> int | None:
        """Where an entry is."""
        return self._place_of.get(item)

    def item_at(self, place: int) -> Item | None:
        """What is in a place."""
        table = int(self._tables[place])
        return None if table == _NONE else (table, int(self._experts[place]))

    def put(self, place: int, item: Item) -> None:
        """Give a place to an entry; what was there is gone."""
        self.drop(place)
        self._tables[place], self._experts[place] = item
        self._place_of[item] = place

    def drop(self, place: int) -> None:
        """Empty a place."""
        before = self.item_at(place)
        if before is not None:
            del self._place_of[before]
            self._tables[place] = _NONE

    def expendable(self) -> Iterator[int]:
        """Every place: empty ones first, then by how seldom its expert was chosen.

        Of equals always the same one goes first, so that on a circle of equals the others stay.
        """
        filled = self._tables != _NONE
        often = self._frequencies.of(self._layer_of[self._tables], self._experts)
        return map(int, np.argsort(np.where(filled, often, -1.0), kind="stable"))
