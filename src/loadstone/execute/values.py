"""What is asked of a model and what it answered, as values that know no torch."""

from __future__ import annotations

from dataclasses import dataclass


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
