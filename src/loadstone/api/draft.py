"""A draft model beside the one that is loaded: resident, within the same budget, with the same vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loadstone.api.load import load
from loadstone.api.plan import plan, process_at_hand
from loadstone.api.tokenizer import load_tokenizer
from loadstone.hardware.probe import probe
from loadstone.plan.budget import budgets, checked_max_memory

if TYPE_CHECKING:
    from torch import nn

    from loadstone.events import Observer


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A draft model.

    Attributes:
        source: as it was called.
        model: it.
        tokenizer: its tokenizer.
        max_memory: what is left for the other model, the draft model's weights included as they are there already.
    """

    source: str
    model: nn.Module
    tokenizer: Any
    max_memory: str


def load_draft(source: str, *, max_memory: str | None, context: int, observer: Observer) -> Draft:
    """Load a draft model whole, before the model that it drafts for.

    Args:
        source: as for `loadstone.load`.
        max_memory: the most that both may use; see `loadstone.plan`.
        context: tokens of prompt and answer together.
        observer: is told of the load.

    Raises:
        DoesNotFit: it does not fit whole.
    """
    made = plan(source, max_memory=max_memory, context=context, prompt_tokens=context, offload=False)
    model = load(source, plan=made, progress=observer)
    machine = probe()
    left = budgets(machine, checked_max_memory(max_memory, machine), process_at_hand(is_here=True))
    for device in made.devices:
        kept = device.reservation
        left[device.device] -= kept.kv_cache_bytes + kept.activation_bytes + kept.logits_bytes
    rest = ",".join(f"{name}={max(1, nbytes)}B" for name, nbytes in left.items())
    return Draft(source=source, model=model, tokenizer=load_tokenizer(source), max_memory=rest)


def check_vocabulary(draft: Draft, source: str, tokenizer: Any) -> None:
    """Refuse a draft model whose tokens mean something else.

    Raises:
        ValueError: the vocabularies differ.
    """
    ours, theirs = tokenizer.get_vocab(), draft.tokenizer.get_vocab()
    differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if differing:
        raise ValueError(
            f"draft model {draft.source}: expected the vocabulary of {source}, found {len(differing):,} tokens that "
            f"differ, such as {differing[0]!r}; use a smaller model of the same family."
        )
