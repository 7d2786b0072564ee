"""How many prompts to answer at a time: as many as make the whole run shortest within the memory that there is."""

from __future__ import annotations

from collections.abc import Callable

from loadstone.errors import DoesNotFit
from loadstone.plan.values import Plan

_MOST = 32


def choose_batch_size(num_prompts: int, num_new_tokens: int, plan_for: Callable[[int], Plan]) -> int:
    """Compare the plans for batches of one, two, four and so on.

    A larger batch shares what a pass reads, and leaves less memory to what need not be read at all.

    Args:
        num_prompts: how many there are.
        num_new_tokens: of each answer at most.
        plan_for: plans a run with that many sequences at a time.

    Returns:
        The number for which all answers are predicted to take the least time; 1 where not even that fits, so that
        loading says what is missing.
    """
    best, best_s = 1, float("inf")
    size = 1
    while True:
        try:
            foretold = plan_for(size).prediction
        except DoesNotFit:
            break
        num_batches = -(-num_prompts // size)
        seconds = num_batches * (foretold.prefill.seconds + num_new_tokens * foretold.decode.seconds)
        if seconds < best_s:
            best, best_s = size, seconds
        if size >= min(num_prompts, _MOST):
            break
        size = min(2 * size, num_prompts, _MOST)
    return best
