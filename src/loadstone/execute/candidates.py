"""Tokens that are likely to come next: guesses that cost little and are checked all in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from loadstone.architecture.transformers_cache import take_back

# How much of the end of the text must have occurred before, the longest first. One token alone says too little.
_RUN_LENGTHS = (4, 2)
_FIRST_COUNT = 4
# At most so many rows of logits are added to a pass, which memory is planned for.
_MAX_COUNT = 10
_MAX_PAUSE = 16


class Candidates(Protocol):
    """Foretells tokens."""

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that may follow; none where nothing is known."""


class PromptLookup:
    """Foretells that what followed the last time follows again: summaries and edits repeat what they are about.

    Source: https://github.com/apoorvumang/prompt-lookup-decoding
    """

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._num_seen = 0

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """What followed the last tokens where they occurred last, going round where that overlaps the end."""
        for end in range(self._num_seen, len(tokens)):
            for length in _RUN_LENGTHS:
                if end >= length:
                    self._ends[tuple(tokens[end - length : end])] = end
        self._num_seen = max(self._num_seen, len(tokens))
        for length in _RUN_LENGTHS:
            begin = self._ends.get(tuple(tokens[-length:]))
            if begin is not None and len(tokens) >= length:
                found = list(tokens[begin : begin + count])
                while len(found) < count:
                    found.append(found[len(found) - (len(tokens) - begin)])
                return found
        return []


class DraftModel:
    """Foretells what a smaller model with the same vocabulary would say.

    Args:
        model: a causal language model.
        num_known: how many tokens the other model's vocabulary has; some are padded to different sizes.
    """

    def __init__(self, model: Any, num_known: int) -> None:
        self._model = model
        self._num_known = num_known
        self._num_own = int(model.config.get_text_config().vocab_size)
        self._cache: Any = None
        self._cached: list[int] = []

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """What the draft model likes best, token by token."""
        if max(tokens) >= self._num_own:
            return []
        self._forget(tokens)
        found: list[int] = []
        fresh = list(tokens[len(self._cached) :])
        for _ in range(count):
            ids = torch.tensor([fresh], device=self._model.device)
            made = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True)
            self._cache = getattr(made, "past_key_values", None)
            self._cached += fresh
            fresh = [int(made.logits[0, -1].argmax())]
            if fresh[0] >= self._num_known:
                break
            found += fresh
            if self._cache is None:  # it keeps something else: all of the text is told anew
                self._cached, fresh = [], [*tokens, *found]
        if self._cache is None:
            self._cached = []
        return found

    def _forget(self, tokens: Sequence[int]) -> None:
        """Take back what the draft model was told beyond what it has in common with the text; one token is left."""
        pairs = zip(self._cached, tokens[:-1], strict=False)
        common = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        keep = min(len(self._cached), len(tokens) - 1) if common is None else common
        num_wrong = len(self._cached) - keep
        if num_wrong and not take_back(self._cache, num_wrong):
            self._cache, keep = None, 0
        self._cached = self._cached[:keep]


class Pace:
    """How many tokens to foretell: more while all of them come true; fewer, and for a while none, when none does."""

    def __init__(self) -> None:
        self._count = _FIRST_COUNT
        self._num_failures = 0
        self._pause = 0

    def next(self) -> int:
        """How many to foretell for the next pass."""
        if self._pause:
            self._pause -= 1
            return 0
        return self._count

    def learn(self, num_proposed: int, num_accepted: int) -> None:
        """Note how many of those that were foretold came true."""
        if not num_proposed:
            return
        if num_accepted:
            self._num_failures = 0
            self._count = min(_MAX_COUNT, 2 * self._count if num_accepted == num_proposed else num_accepted + 1)
            return
        self._num_failures += 1
        self._count = max(1, self._count // 2)
        self._pause = min(_MAX_PAUSE, 2**self._num_failures)
