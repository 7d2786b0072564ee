"""How many more tokens a second does a streamed model give when tokens are foretold?

The demo model (SmolLM2-135M-Instruct) is written as float32, and all its blocks are read from the disk in each pass, so
that a pass waits for them as the passes of a large model do. It answers prompts whose answers repeat them (a code edit,
a summary, a text to be repeated) and two whose answers do not, plainly and foretold; both must say the same.

    python benchmarks/bench_assist.py /tmp/assist                 # 0.6 GB are written there
    python benchmarks/bench_assist.py /tmp/assist --differences   # how often do passes over several tokens differ?
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import harness
import loadstone
from loadstone.checkpoint.demo import demo_model
from loadstone.execute.generate import encode
from loadstone.execute.values import Prompt

CLASS = """class Window:
    def __init__(self, title, width, height):
        self.title = title
        self.width = width
        self.height = height
        self.visible = False

    def show(self):
        self.visible = True
        print(f"{self.title} is shown")

    def hide(self):
        self.visible = False
        print(f"{self.title} is hidden")
"""
FUNCTION = """def total(items):
    result = 0
    for item in items:
        if item.price > 0:
            result = result + item.price * item.count
    return result
"""
TEXT = (
    "The library was founded in 1852 by the citizens of the town. It has two reading rooms, a garden and a small "
    "printing press. Every year some four thousand visitors come to see the old maps."
)
PROMPTS = {
    "code edit": f"Add a method named toggle to this class and show the whole class:\n\n```python\n{CLASS}```",
    "summary": f"Summarize:\n\n{TEXT}",
    "text": f"Repeat the following text word for word:\n\n{TEXT}",
    # The model writes code of its own here, a single line instead of the loop.
    "code rewritten": f"Repeat this code exactly, but rename the function to add_up:\n\n```python\n{FUNCTION}```",
    "no repeats": "Tell a story about a fox who finds a telescope.",
}
REPEATING = ("code edit", "summary", "text")
GOAL = 1.5
_WIDTH = 5


def source(folder: Path) -> Path:
    """The demo model as float32 safetensors, written once."""
    path = folder / "smollm2-float32"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        loadstone.convert(demo_model(), path, dtype="float32")
    return path


def streamed(path: Path) -> Any:
    """The model with every block on the disk."""
    num_blocks = int(loadstone.load(path).config.num_hidden_layers)
    away = {f"model.layers.{number}": "disk" for number in range(num_blocks)}
    return loadstone.load(path, device_map={"": "cpu", **away}, context=1024, prompt_tokens=512)


def answer(model: Any, tokens: Any, num_tokens: int, assist: Any) -> dict[str, Any]:
    """One answer, with its tokens and what it took."""
    import torch

    before, begin = loadstone.of(model).stats(), time.perf_counter()
    more = {} if assist is None else {"custom_generate": assist}
    with torch.inference_mode():
        made = model.generate(**tokens, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0, **more)
    seconds, after = time.perf_counter() - begin, loadstone.of(model).stats()
    found = made[0, tokens["input_ids"].shape[1] :].tolist()
    row: dict[str, Any] = {"tokens": found, "seconds": seconds, "tokens_per_s": len(found) / seconds}
    if before is not None and after is not None:
        row["passes_per_token"] = (after.passes - before.passes) / len(found)
        row["stall_s"] = after.stall_s - before.stall_s
        row["streamed_bytes"] = after.streamed_bytes - before.streamed_bytes
    if assist is not None:
        row["accepted_share"] = assist.facts.num_accepted / max(1, assist.facts.num_proposed)
    return row


def measure(folder: Path, num_tokens: int) -> dict[str, Any]:
    """Every prompt, plainly and with foretold tokens."""
    path = source(folder)
    tokenizer, model = loadstone.load_tokenizer(path), streamed(path)
    answer(model, encode(tokenizer, Prompt(text="Hello")), 4, None)
    rows: dict[str, Any] = {}
    for name, text in PROMPTS.items():
        tokens = encode(tokenizer, Prompt(text=text))
        plain = answer(model, tokens, num_tokens, None)
        ours = answer(model, tokens, num_tokens, loadstone.of(model).assist())
        same = plain.pop("tokens") == ours.pop("tokens")
        ratio = ours["tokens_per_s"] / plain["tokens_per_s"]
        rows[name] = {"plain": plain, "assisted": ours, "same_tokens": same, "ratio": ratio}
        print(
            f"  {name}: {plain['tokens_per_s']:.2f} -> {ours['tokens_per_s']:.2f} tokens/s ({ratio:.2f} times), "
            f"{ours['passes_per_token']:.2f} passes a token, {'the same tokens' if same else 'OTHER TOKENS'}",
            file=sys.stderr,
        )
    return rows


def differences(folder: Path, num_tokens: int) -> dict[str, Any]:
    """How often another token is likeliest when a pass has several tokens, and how often when they take turns."""
    import torch

    path = source(folder)
    tokenizer = loadstone.load_tokenizer(path)
    found: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        model: Any = loadstone.load(path, dtype=dtype)
        counts = {"tokens": 0, "together": 0, "in_turn": 0, "together_bits": 0, "in_turn_bits": 0}
        for text in PROMPTS.values():
            prompt = encode(tokenizer, Prompt(text=text))["input_ids"]
            with torch.inference_mode():
                said = model.generate(
                    prompt, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0
                )
                one = logits(model, said, prompt.shape[1], 1, in_turn=False)
                together = logits(model, said, prompt.shape[1], _WIDTH, in_turn=False)
                in_turn = logits(model, said, prompt.shape[1], _WIDTH, in_turn=True)
            counts["tokens"] += one.shape[0]
            for name, other in (("together", together), ("in_turn", in_turn)):
                counts[name] += int((one.argmax(-1) != other.argmax(-1)).sum())
                counts[f"{name}_bits"] += int((one != other).any(-1).sum())
        found[dtype] = counts
    return found


def logits(model: Any, said: Any, num_prompt: int, width: int, *, in_turn: bool) -> Any:
    """The logits of a text that is given, after passes over `width` of its tokens."""
    import contextlib

    import torch

    from loadstone.execute.token_by_token import token_by_token

    cache, rows = model(said[:, :num_prompt]).past_key_values, []
    for begin in range(num_prompt, said.shape[1] - width, width):
        with token_by_token(model, width) if in_turn else contextlib.nullcontext():
            made = model(said[:, begin : begin + width], past_key_values=cache)
        rows.append(made.logits[0].float())
    every = torch.cat(rows)
    return every[: every.shape[0] // _WIDTH * _WIDTH]


def main() -> None:
    """Measure, say whether the goal was reached, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoint is, or is written to")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer at most")
    parser.add_argument("--differences", action="store_true", help="count differing tokens instead of seconds")
    arguments = parser.parse_args()
    if arguments.differences:
        print(differences(arguments.folder, arguments.tokens))
        return
    rows = measure(arguments.folder, arguments.tokens)
    print(f"written to {harness.save('assist', {'tokens': arguments.tokens, 'prompts': rows})}")
    for name in REPEATING:
        print(harness.at_least(f"{name}, tokens/s beside plain decoding", rows[name]["ratio"], GOAL))
    if not all(row["same_tokens"] for row in rows.values()):
        raise SystemExit("the tokens differ")


if __name__ == "__main__":
    main()
