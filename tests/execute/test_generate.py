import pytest
import torch

from loadstone.execute.generate import TokenStreamer, encode, generate
from loadstone.execute.values import Prompt, Sampling


class Letters:
    """A tokenizer of bytes; `é` takes two tokens."""

    pad_token_id = None
    eos_token_id = 0
    chat_template = None

    def __call__(self, text: str, **_: object) -> "Batch":
        return Batch(torch.tensor([list(text.encode())]))

    def decode(self, tokens: list[int], **_: object) -> str:
        return bytes(tokens).decode(errors="replace")

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> "Batch":
        return self("|".join(f"{message['role']}:{message['content']}" for message in messages))


class Batch(dict[str, torch.Tensor]):
    def __init__(self, tokens: torch.Tensor) -> None:
        super().__init__(input_ids=tokens, attention_mask=torch.ones_like(tokens))

    def to(self, device: str) -> "Batch":
        return self


class Echo:
    """Answers with a fixed text, token by token."""

    device = "cpu"
    generation_config = type("Config", (), {"pad_token_id": None})

    def __init__(self, answer: str) -> None:
        self.answer = answer
        self.options: dict[str, object] = {}

    def can_generate(self) -> bool:
        return True

    def generate(self, input_ids: torch.Tensor, streamer: TokenStreamer, **options: object) -> None:
        self.options = options
        streamer.put(input_ids)
        for token in self.answer.encode():
            streamer.put(torch.tensor([token]))
        streamer.end()


def test_text_is_handed_on_in_whole_characters() -> None:
    pieces: list[str] = []
    made = generate(Echo("aéb"), Letters(), Prompt(text="hi"), Sampling(), pieces.append)
    assert pieces == ["a", "é", "b"]
    assert (made.text, made.num_prompt_tokens, made.num_new_tokens) == ("aéb", 2, 4)
    assert made.tokens_per_s > 0
    assert made.first_token_s > 0


def test_half_a_character_at_the_end_is_still_shown() -> None:
    pieces: list[str] = []
    streamer = TokenStreamer(Letters(), pieces.append)
    streamer.put(torch.tensor([[1]]))
    streamer.put(torch.tensor([0xC3]))
    assert pieces == []
    streamer.end()
    assert pieces == ["\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize(("temperature", "sampled"), [(0.0, False), (0.7, True)])
def test_temperature_zero_is_greedy(temperature: float, sampled: bool) -> None:
    model = Echo("x")
    generate(model, Letters(), Prompt(text="hi"), Sampling(temperature=temperature, max_new_tokens=7), lambda _: None)
    assert model.options["do_sample"] is sampled
    assert model.options["max_new_tokens"] == 7
    assert (model.options["temperature"] or 0.0) == temperature


def test_the_chat_template_is_used_unless_raw() -> None:
    tokenizer = Letters()
    tokenizer.chat_template = "there is one"  # type: ignore[assignment]
    asked = Prompt(text="why", system="be brief")
    assert bytes(encode(tokenizer, asked)["input_ids"][0].tolist()) == b"system:be brief|user:why"
    raw = Prompt(text="why", raw=True)
    assert bytes(encode(tokenizer, raw)["input_ids"][0].tolist()) == b"why"


def test_an_empty_prompt_is_misuse() -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate(Echo("x"), Letters(), Prompt(text=" \n"), Sampling(), lambda _: None)


def test_a_model_that_does_not_generate_is_misuse() -> None:
    with pytest.raises(ValueError, match="Linear does not generate text"):
        generate(torch.nn.Linear(1, 1), Letters(), Prompt(text="hi"), Sampling(), lambda _: None)


def test_the_seed_fixes_the_random_numbers() -> None:
    drawn = []
    for _ in range(2):
        generate(Echo("x"), Letters(), Prompt(text="hi"), Sampling(seed=3), lambda _: None)
        drawn.append(torch.rand(1))
    assert torch.equal(*drawn)
