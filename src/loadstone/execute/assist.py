"""Greedy decoding in which a pass yields several tokens: those that were foretold and came true, and one more.

Nothing but the number of passes changes. Each token is what greedy decoding takes, because the foretold tokens of a
pass are computed one after the other, block by block (see `token_by_token`), and what was foretold wrongly is taken
back.

Source: https://arxiv.org/abs/2211.17192, https://huggingface.co/docs/transformers/assisted_decoding
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from loadstone.architecture.transformers_cache import cut, keeps_every_token
from loadstone.execute.candidates import Candidates, DraftModel, Pace, PromptLookup
from loadstone.execute.token_by_token import CannotSplit, token_by_token
from loadstone.execute.values import Assisted


@dataclass(slots=True)
class _Text:
    """The text so far, and how it came about.

    Attributes:
        ids: all tokens, shape (1, tokens).
        tokens: the same as numbers.
        source: foretells; None where nothing can be.
        note: why nothing is.
        pace: how many.
    """

    ids: torch.Tensor
    tokens: list[int]
    source: Candidates | None
    note: str = ""
    pace: Pace = field(default_factory=Pace)
    num_passes: int = 1
    num_proposed: int = 0
    num_accepted: int = 0

    def give_up(self, note: str) -> None:
        """Decode plainly from now on."""
        self.source, self.note = None, note

    def propose(self, room: int) -> list[int]:
        """Tokens that may come next, at most `room`."""
        count = min(self.pace.next(), room) if self.source is not None else 0
        return self.source.propose(self.tokens, count) if self.source is not None and count > 0 else []


class Assist:
    """Decodes for `model.generate(custom_generate=...)`; see `loadstone.of(model).assist()`.

    What cannot be foretold exactly is decoded as ever: sampled text, beams, batches, caches that forget. Then
    `facts.note` says why.

    Args:
        draft: a smaller model with the same vocabulary, that foretells; without one the text itself does.
    """

    def __init__(self, draft: Any = None) -> None:
        self._draft = draft
        self.facts = Assisted()

    def __call__(  # noqa: PLR0913, PLR0917 - the parameters are those of transformers' decoding methods
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        token_streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode, with the arguments that transformers gives its own decoding methods.

        `token_streamer` stands for `streamer`, which transformers keeps from methods that are not its own.
        """
        if token_streamer is not None:
            token_streamer.put(input_ids.cpu())
        note = _reason_against(model, input_ids, generation_config, model_kwargs)
        if note:
            self.facts = Assisted(note=note)
            plain = model._beam_search if generation_config.num_beams > 1 else model._sample
            return plain(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                streamer=token_streamer,
                **model_kwargs,
            )
        text = _Text(ids=input_ids, tokens=input_ids[0].tolist(), source=self._source(model))
        num_prompt_tokens = len(text.tokens)
        choose = _Choice(logits_processor, stopping_criteria)
        try:
            _decode(model, text, choose, generation_config, token_streamer, model_kwargs)
        finally:
            self.facts = Assisted(
                num_tokens=len(text.tokens) - num_prompt_tokens,
                num_passes=text.num_passes,
                num_proposed=text.num_proposed,
                num_accepted=text.num_accepted,
                note=text.note,
            )
        if token_streamer is not None:
            token_streamer.end()
        return text.ids

    def _source(self, model: Any) -> Candidates:
        if self._draft is None:
            return PromptLookup()
        return DraftModel(self._draft, int(model.config.get_text_config().vocab_size))


def _reason_against(model: Any, input_ids: torch.Tensor, config: Any, model_kwargs: dict[str, Any]) -> str:
    """Why nothing is foretold, or nothing."""
    text_config, cache = model.config.get_text_config(), model_kwargs.get("past_key_values")
    reasons = {
        "tokens are sampled": bool(config.do_sample),
        "beams are searched": config.num_beams > 1,
        "several sequences are decoded together": input_ids.shape[0] > 1,
        "more than the tokens is asked for": bool(config.return_dict_in_generate),
        "the model is an encoder and a decoder": bool(model.config.is_encoder_decoder),
        "the cache is off": not model_kwargs.get("use_cache"),
        "the cache does not keep every token": bool(getattr(cache, "layers", ())) and not keeps_every_token(cache),
        "the prompt is padded": model_kwargs.get("attention_mask") is not None,
        "the prompt is not in tokens": model_kwargs.get("inputs_embeds") is not None,
        "the attention is not sdpa": getattr(text_config, "_attn_implementation", None) != "sdpa",
        "logits are capped": bool(getattr(text_config, "final_logit_softcapping", None)),
    }
    return next((f"{reason}, so each pass yields one token" for reason, holds in reasons.items() if holds), "")


class _Choice:
    """Takes the likeliest token, and tells when the text is over, as greedy decoding does."""

    def __init__(self, logits_processor: Any, stopping_criteria: Any) -> None:
        self._process = logits_processor
        self._is_over = stopping_criteria
        self.over = False

    def accept(self, text: _Text, logits: torch.Tensor, proposed: list[int]) -> list[int]:
        """Add tokens to the text for as long as they are those that were foretold, and the first that is not.

        Args:
            text: is added to.
            logits: shape (1, foretold + 1, vocabulary).
            proposed: the tokens that were foretold.

        Returns:
            What was added.
        """
        added: list[int] = []
        for index in range(len(proposed) + 1):
            row = logits[:, index].to(copy=True, dtype=torch.float32, device=text.ids.device)
            chosen = torch.argmax(self._process(text.ids, row), dim=-1)
            text.ids = torch.cat([text.ids, chosen[:, None]], dim=-1)
            added.append(int(chosen))
            self.over = bool(self._is_over(text.ids, None).all())
            if self.over or (index < len(proposed) and added[-1] != proposed[index]):
                break
        text.tokens += added
        return added


def _decode(model: Any, text: _Text, choose: _Choice, config: Any, streamer: Any, model_kwargs: dict[str, Any]) -> None:
    """Pass after pass until the text is over."""
    outputs = model._prefill(text.ids, config, model_kwargs)
    proposed: list[int] = []
    with model._optimize_model_for_decode():
        while True:
            added = choose.accept(text, outputs.logits[:, -(len(proposed) + 1) :], proposed)
            text.num_proposed += len(proposed)
            text.num_accepted += len(added) - 1
            text.pace.learn(len(proposed), len(added) - 1)
            if streamer is not None:
                streamer.put(torch.tensor(added))
            if choose.over:
                return
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, num_new_tokens=len(added))
            cache = model_kwargs.get("past_key_values")
            if not keeps_every_token(cache):
                text.give_up("the cache does not keep every token, so each pass yields one token")
            elif len(added) <= len(proposed):
                cut(cache, len(text.tokens) - 1)
            proposed = text.propose(config.max_length - len(text.tokens) - 1)
            outputs, proposed = _pass(model, text, proposed, model_kwargs)


def _pass(model: Any, text: _Text, proposed: list[int], model_kwargs: dict[str, Any]) -> tuple[Any, list[int]]:
    """A forward over the last token and what was foretold; over the last alone where they cannot be kept apart.

    Returns:
        The model's outputs, and the foretold tokens that it computed.
    """
    text.num_passes += 1
    if proposed:
        try:
            with token_by_token(model, len(proposed) + 1):
                return _forward(model, text, proposed, model_kwargs), proposed
        except CannotSplit as reason:
            cut(model_kwargs["past_key_values"], len(text.tokens) - 1)
            text.give_up(f"{reason}, so each pass yields one token")
            text.num_passes += 1
    return _forward(model, text, [], model_kwargs), []


def _forward(model: Any, text: _Text, proposed: list[int], model_kwargs: dict[str, Any]) -> Any:
    kwargs, ids = dict(model_kwargs), text.ids
    if proposed:
        ids = torch.cat([ids, ids.new_tensor([proposed])], dim=-1)
        # It makes the positions longer; there are no outputs yet to take a cache from.
        kwargs = model._update_model_kwargs_for_generation({}, kwargs, num_new_tokens=len(proposed))
    inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=len(proposed) + 1, **kwargs)
    if proposed and "logits_to_keep" in inputs:
        inputs["logits_to_keep"] = len(proposed) + 1
    return model(**inputs, return_dict=True)
