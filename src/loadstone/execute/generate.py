"""Answer a prompt token by token, and say how fast it went."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from loadstone.errors import InvalidTemplate
from loadstone.execute.assist import Assist
from loadstone.execute.rehearse import rehearse
from loadstone.execute.values import Generated, Prompt, Sampling


class TokenStreamer:
    """Receives tokens from `generate()` (transformers' streamer protocol) and hands on finished pieces of text.

    A character can take several tokens; text is handed on once no half of a character is at its end.

    Source: https://huggingface.co/docs/transformers/internal/generation_utils#transformers.TextStreamer
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._tokens: list[int] = []
        self._shown = ""
        self._prompt_seen = False
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (the first call) or the next tokens."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        tokens = [int(token) for token in value.reshape(-1)]
        self.times += [time.perf_counter()] * len(tokens)
        self._tokens += tokens
        text = self._decode()
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._show(text)

    def end(self) -> None:
        """Hand on what is left."""
        self._show(self._decode())

    @property
    def text(self) -> str:
        """Everything handed on so far."""
        return self._shown

    @property
    def num_tokens(self) -> int:
        """The tokens received after the prompt."""
        return len(self._tokens)

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))

    def _show(self, text: str) -> None:
        fresh, self._shown = text[len(self._shown) :], text
        if fresh:
            self._on_text(fresh)


def generate(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    sampling: Sampling,
    on_text: Callable[[str], None],
    assist: Assist | None = None,
) -> Generated:
    """Answer a prompt, streaming the text.

    Args:
        model: a model that generates, as `loadstone.load` returns it.
        tokenizer: its tokenizer.
        prompt: what is asked.
        sampling: how tokens are chosen.
        on_text: receives the answer piece by piece.
        assist: foretells tokens, so that a pass yields several; the answer is the same.

    Returns:
        The answer and its timings.

    Raises:
        ValueError: the prompt is empty, or the model does not generate.
    """
    if not prompt.text.strip():
        raise ValueError("the prompt is empty; give one as an argument or on standard input.")
    check_generates(model)
    start = time.perf_counter()
    inputs = encode(tokenizer, prompt).to(model.device)
    streamer = TokenStreamer(tokenizer, on_text)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    with torch.inference_mode():
        way: dict[str, Any] = {"streamer": streamer}
        if assist is not None:
            way = {"custom_generate": assist, "token_streamer": streamer}
        model.generate(**inputs, **way, **options_of(model, tokenizer, sampling))
    times = streamer.times
    return Generated(
        text=streamer.text,
        num_prompt_tokens=inputs["input_ids"].shape[-1],
        num_new_tokens=streamer.num_tokens,
        first_token_s=times[0] - start if times else 0.0,
        tokens_per_s=(len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0,
        assisted=None if assist is None else assist.facts,
    )


def check_generates(model: Any) -> None:
    """Refuse a model that has no text to give.

    Raises:
        ValueError: it does not generate.
    """
    if not getattr(model, "can_generate", lambda: False)():
        raise ValueError(f"{type(model).__name__} does not generate text; load it as a causal language model.")


def encode(tokenizer: Any, prompt: Prompt) -> Any:
    """The prompt as tensors: through the chat template where there is one and `raw` is off.

    Args:
        tokenizer: the tokenizer.
        prompt: what is asked.

    Returns:
        `input_ids` and `attention_mask`, shape (1, tokens).

    Raises:
        InvalidTemplate: the chat template fails, does not end, or reaches for what transformers' sandbox for it does
            not give.
    """
    if prompt.raw or not getattr(tokenizer, "chat_template", None):
        text = f"{prompt.system}\n\n{prompt.text}" if prompt.system else prompt.text
        return tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
    messages.append({"role": "user", "content": prompt.text})
    where = getattr(tokenizer, "name_or_path", "") or "the model"
    try:
        rehearse(_template(tokenizer), messages, _special_tokens(tokenizer), where=where)
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except InvalidTemplate:
        raise
    except Exception as error:  # a template is a program of the checkpoint's author: anything can come out of it
        reason = " ".join(str(error).split())[:200]
        raise InvalidTemplate(
            f"{where}: expected the chat template to make a prompt of the messages, found that it fails "
            f"({type(error).__name__}: {reason}); leave out the system message, or give the prompt --raw."
        ) from error


def _template(tokenizer: Any) -> str:
    """The source of the template that is used; some tokenizers have several, by name."""
    template = tokenizer.chat_template
    return template if isinstance(template, str) else str(tokenizer.get_chat_template())


def _special_tokens(tokenizer: Any) -> dict[str, str]:
    tokens = getattr(tokenizer, "special_tokens_map", {})
    return {name: str(token) for name, token in tokens.items()}


def options_of(model: Any, tokenizer: Any, sampling: Sampling) -> dict[str, Any]:
    """How tokens are chosen, as arguments of transformers' `generate()`.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        sampling: what is wanted.
    """
    options: dict[str, Any] = {"max_new_tokens": sampling.max_new_tokens}
    if sampling.temperature is not None:
        options["do_sample"] = sampling.temperature > 0
        # Settings of sampling would only be warned about where nothing is sampled.
        options |= {"temperature": sampling.temperature} if sampling.temperature > 0 else _GREEDY
    if model.generation_config.pad_token_id is None:
        options["pad_token_id"] = tokenizer.pad_token_id or tokenizer.eos_token_id or 0
    return options


_GREEDY: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None}
