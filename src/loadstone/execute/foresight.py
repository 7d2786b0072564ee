"""What the router of a layer will likely choose, asked of it one layer earlier.

From one layer to the next what flows through a model changes little, so that a router which is given what the layer
before was given mostly chooses what it will choose. How often it does is counted, and guesses are used only as long as
most of them are right.

The idea is of https://arxiv.org/abs/2312.17238.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from loadstone.execute.placeholder import StreamedParameter

# With more tokens nearly all experts are chosen, by whoever is asked.
_MOST_TOKENS = 16
# Guesses are used when this part of so many was right; older ones count less. Else a router is asked once in so many
# passes: texts change.
_RIGHT_SHARE, _LEAST_GUESSES = 0.5, 24.0
_FADING, _NUM_PAUSED = 0.98, 16
_NAMES = ("gate", "router")


class Foresight:
    """Foretells the choices of one layer.

    Args:
        block: the module that the router is in, beside the experts.

    Attributes:
        num_guesses: how many experts were guessed that were not at hand, older ones counting less.
        num_right: how many of them were chosen.
    """

    def __init__(self, block: nn.Module | None) -> None:
        found = (getattr(block, name, None) for name in _NAMES)
        self._router = next((one for one in found if isinstance(one, nn.Module)), None)
        self._is_tried = False
        self._num_paused = 0
        self._guessed: frozenset[int] = frozenset()
        self.num_right = self.num_guesses = 0.0

    @property
    def is_useful(self) -> bool:
        """Whether most guesses have been right."""
        return self.num_guesses >= _LEAST_GUESSES and self.num_right >= _RIGHT_SHARE * self.num_guesses

    def observe(self, values: Any, chosen: torch.Tensor) -> None:
        """Learn what a router chose; whether the one that was found is that router is tried at the first time.

        Args:
            values: what the experts are given.
            chosen: the numbers of experts, shape (tokens, choices).
        """
        if not self._is_tried and _are_few(values):
            self._is_tried = True
            again = self._choice(values)
            if again is None or not torch.equal(again, chosen.to(again.dtype)):
                self._router = None
        if self._guessed:
            numbers = set(chosen.reshape(-1).tolist())
            self.num_right = self.num_right * _FADING + len(self._guessed & numbers)
            self.num_guesses = self.num_guesses * _FADING + len(self._guessed)
            self._guessed = frozenset()
            is_bad = self.num_guesses >= _LEAST_GUESSES and not self.is_useful
            self._num_paused = _NUM_PAUSED if is_bad else 0

    def guess(self, values: Any, missing: Callable[[NDArray[np.int64]], Collection[int]]) -> frozenset[int]:
        """The experts that will likely be chosen and are not at hand.

        Args:
            values: what the experts of the layer before are given.
            missing: which of some experts are not at hand.

        Returns:
            Their numbers; none where nothing is known.
        """
        if self._num_paused:
            self._num_paused -= 1
            return frozenset()
        if not self._is_tried or not _are_few(values):
            return frozenset()
        choice = self._choice(values)
        self._guessed = frozenset() if choice is None else frozenset(missing(np.unique(choice.numpy(force=True))))
        return self._guessed

    def _choice(self, values: Any) -> torch.Tensor | None:
        """What the router makes of few values; None where it cannot be asked, or answers in another way."""
        router = self._router
        weights = () if router is None else tuple(router.parameters())
        if router is None or any(isinstance(one, StreamedParameter) or one.device != values.device for one in weights):
            return None
        try:
            answer = router.forward(values)  # hooks of it are for what is computed
        except (TypeError, ValueError, RuntimeError):
            return None
        parts = answer if isinstance(answer, tuple) else (answer,)
        numbers = (one for one in parts if isinstance(one, torch.Tensor) and not one.is_floating_point())
        return next((one for one in numbers if one.dim() == 2 and len(one) == len(values)), None)


def _are_few(values: Any) -> bool:
    """Whether a router can be asked for all of them."""
    return isinstance(values, torch.Tensor) and values.dim() == 2 and len(values) <= _MOST_TOKENS
