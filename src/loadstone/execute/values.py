"""What is asked of a model and what it answered, as values that know no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What is asked.

    Attributes:
        text: the prompt.
        system: a system message, where the tokenizer has a chat template.
        raw: give the text to the model as it is, without a chat template.
    """

    text: str
    system: str | None = None
    raw: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: the most that are generated.
        temperature: 0 takes the likeliest token; None leaves it to the generation config.
        seed: of the random numbers; the same seed gives the same text.
    """

    max_new_tokens: int = 256
    temperature: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What came out.

    Attributes:
        text: the answer.
        num_prompt_tokens: tokens that went in.
        num_new_tokens: tokens that came out.
        first_token_s: seconds from the call to the first token.
        tokens_per_s: over all tokens after the first; 0 where there was only one.
    """

    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    first_token_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """Which parts of a model are not kept in memory but read from their files in each pass.

    Attributes:
        units: common starts of their parameters' names, each that of one module: `model.layers.3`, `lm_head`.
        num_slots: how many units are in memory at a time; with two or more, one is read while another computes.
        tensors: the names of their tensors in the checkpoint, as far as they are known before the class is: these are
            not brought in ahead.
        unit_of: where tensors are chosen rather than modules: the unit of each, by its name in the checkpoint.
    """

    units: tuple[str, ...] = ()
    num_slots: int = 2
    tensors: frozenset[str] = frozenset()
    unit_of: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamStats:
    """What streaming has done since the model was loaded.

    Attributes:
        passes: forwards of the whole model.
        uses: how often a unit was computed with.
        hits: uses whose unit was in memory already.
        unforeseen: uses whose unit was not even on its way.
        streamed_bytes: read from the files for units and looked-up rows.
        stall_s: how long forwards waited for the disk.
        num_units: units that come and go.
        num_slots: how many of them are in memory at a time.
        slot_bytes: the memory of all slots.
        pass_bytes: what one use of every unit reads.
        given_back_bytes: of units that left memory because it was short, each time they did.
    """

    passes: int
    uses: int
    hits: int
    unforeseen: int
    streamed_bytes: int
    stall_s: float
    num_units: int
    num_slots: int
    slot_bytes: int
    pass_bytes: int
    given_back_bytes: int = 0
