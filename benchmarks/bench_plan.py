"""Does a plan keep its word? Predicted beside measured: peak host memory, and seconds a pass.

Checkpoints of real geometries (some with fewer layers, random weights): dense, grouped-query, mixture of experts,
sliding windows, encoder, encoder-decoder. Each case is a fresh process that imports everything, plans, loads by that
plan, and computes a prompt and a few tokens after it. Compared are the peak of anonymous memory above its level after
imports with `Plan.devices[-1].anonymous_bytes`, and both kinds of pass with the predicted seconds (the machine is
measured before each case, and after it). Where weights are mapped, what is left to measure is mostly what the
allocator keeps of freed blocks, which is another amount in each process: those cases run several times, the largest
peak counts, and how far the runs differ is said beside it.

    python benchmarks/bench_plan.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness
import make_checkpoint

# (geometry, dtype, prompt tokens, batch)
CASES = tuple(
    (geometry, dtype, prompt, batch)
    for geometry in (
        "gpt2",
        "smollm2-135m",
        "qwen2.5-0.5b",
        "gemma3-270m",
        "mistral-7b-3-layers",
        "granite-moe-1b-6-layers",
        "bert-base",
        "t5-base",
    )
    for dtype, prompt, batch in (("bfloat16", 512, 1), ("float32", 64, 1), ("float32", 512, 1), ("float32", 256, 4))
)
# By dtype; the checkpoints are in bfloat16, so that one is mapped. In 24 processes each, the largest peak of a case was
# up to 2.3 times its smallest, so few processes say little about what must be planned for.
PROCESSES = {"bfloat16": 12, "float32": 1}
NEW_TOKENS = 6
REPEATS = 3
# The machine is measured before and after each case; where it gives this much more or less meanwhile, the case says
# nothing about the plan, and is done again.
MOST_CHANGED, MOST_TRIES = 1.2, 2
# What the issue of a plan is judged by: never below what was measured, and at most so much above it.
MOST_ABOVE = 1.15
MOST_OFF = 0.30


def child(arguments: argparse.Namespace) -> None:
    """Plan, load and run once; print a line of JSON."""
    import torch
    import transformers

    import loadstone
    import loadstone.api.assemble
    import loadstone.architecture.transformers_model
    from loadstone.hardware.memory import PeakWatch, resident
    from loadstone.plan.values import Run

    config = json.loads((arguments.folder / "config.json").read_text())
    getattr(transformers, config["architectures"][0])
    run = Run(context=arguments.prompt + NEW_TOKENS, batch=arguments.batch, prompt_tokens=arguments.prompt)
    plan = loadstone.plan(
        arguments.folder, dtype=arguments.dtype, context=run.context, batch=run.batch, prompt_tokens=run.prompt_tokens
    )
    level = resident().anonymous_bytes
    with PeakWatch() as watch:
        model = loadstone.load(arguments.folder, plan=plan)
        loaded = watch.peak.anonymous_bytes
        seconds = run_once(model, config, run)
    del torch
    host = plan.devices[-1]
    print(
        json.dumps(
            {
                "predicted_bytes": host.anonymous_bytes,
                "measured_bytes": watch.peak.anonymous_bytes - level,
                "loaded_bytes": loaded - level,
                "level_bytes": level,
                "planned_level_bytes": host.level_bytes,
                "weight_bytes": host.weight_bytes,
                "kv_cache_bytes": host.reservation.kv_cache_bytes,
                "activation_bytes": host.reservation.activation_bytes,
                "logits_bytes": host.reservation.logits_bytes,
                "workspace_bytes": host.reservation.workspace_bytes,
                "predicted_prefill_s": plan.prediction.prefill.seconds,
                "predicted_decode_s": plan.prediction.decode.seconds,
                **seconds,
            }
        )
    )


def measure_machine(folder: Path, dtype: str) -> tuple[float, float]:
    """As a user would, in a process of its own; gives the two rates of products that matter most."""
    command = [sys.executable, "-m", "loadstone", "machine", "--measure", "--model", str(folder), "--json"]
    made = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    rate = json.loads(made.stdout)["devices"][-1]["compute"][dtype]
    return rate["weight_bytes_per_s"], rate["flops_per_s"]


def run_once(model: Any, config: dict[str, Any], run: Any) -> dict[str, float]:
    """A prompt, and where the model generates a few tokens after it; the times after the first are timed."""
    import torch

    tokens = torch.randint(5, 1000, (run.batch, run.prompt_tokens), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        if (
            not hasattr(model, "generate")
            or "Masked" in config["architectures"][0]
            or "BertModel" in config["architectures"]
        ):
            return {"prefill_s": median_s(lambda: model(input_ids=tokens)), "decode_s": 0.0}
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        if run.batch > 1:  # streamers take one sequence
            one = {**options, "max_new_tokens": 1, "min_new_tokens": 1}
            first = median_s(lambda: model.generate(tokens, **one))
            whole = median_s(lambda: model.generate(tokens, **options))
            return {"prefill_s": first, "decode_s": (whole - first) / (NEW_TOKENS - 1)}
        prefills: list[float] = []
        decodes: list[float] = []

        def generate() -> None:
            times = [time.perf_counter()]
            clock = SimpleNamespace(put=lambda _: times.append(time.perf_counter()), end=lambda: None)
            model.generate(tokens, streamer=clock, **options)
            begin, _, first, *rest = times  # the streamer is given the prompt first
            prefills.append(first - begin)
            decodes.extend(after - before for before, after in pairwise([first, *rest]))

        for _ in range(REPEATS + 1):
            generate()
        each = NEW_TOKENS - 1
        return {"prefill_s": statistics.median(prefills[1:]), "decode_s": statistics.median(decodes[each:])}


def median_s(work: Callable[[], Any]) -> float:
    """Of a few repeats, after a first one that does not count."""
    work()
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def goals_of(rows: dict[str, dict[str, Any]]) -> list[str]:
    """What was reached and what was missed, case by case; times only where the machine stayed what it was."""
    goals = []
    for name, row in rows.items():
        ratio = row["predicted_bytes"] / row["measured_bytes"]
        within = 1 <= ratio <= MOST_ABOVE
        peaks = row["peaks_bytes"]
        spread = f", the largest of {len(peaks)}, {max(peaks) / min(peaks):.2f} times the least" if peaks[1:] else ""
        goals.append(f"{'reached' if within else 'MISSED'}  {name}: peak predicted / measured {ratio:.3f}{spread}")
        for kind in ("prefill", "decode"):
            if not row[f"{kind}_s"]:
                continue
            off = row[f"predicted_{kind}_s"] / row[f"{kind}_s"] - 1
            said = "reached" if abs(off) <= MOST_OFF else "MISSED"
            if row["changed"] > MOST_CHANGED:
                said = "UNKNOWN"
            goals.append(f"{said}  {name}: {kind} off by {off:+.0%}")
    return goals


def report(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The table and the goals, printed."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="predicted beside measured")
    for column in ("case", "peak MB", "measured", "ratio", "prefill s", "measured", "token s", "measured"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, row in rows.items():
        table.add_row(
            name if row["changed"] <= MOST_CHANGED else f"{name} (the machine changed)",
            f"{row['predicted_bytes'] / 1e6:.0f}",
            f"{row['measured_bytes'] / 1e6:.0f}",
            f"{row['predicted_bytes'] / row['measured_bytes']:.2f}",
            f"{row['predicted_prefill_s']:.2f}",
            f"{row['prefill_s']:.2f}",
            f"{row['predicted_decode_s']:.3f}",
            f"{row['decode_s']:.3f}",
        )
    Console(width=120).print(table)
    goals = goals_of(rows)
    reached = sum(goal.startswith("reached") for goal in goals)
    print("\n".join(goals), f"\n{reached} of {len(goals)} reached")
    return goals


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "loadstone-bench")
    parser.add_argument("--geometries", help="comma-separated; all by default")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--prompt", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    rows: dict[str, dict[str, Any]] = {}
    for geometry, dtype, prompt, batch in CASES:
        if arguments.geometries and geometry not in arguments.geometries.split(","):
            continue
        folder = make_checkpoint.write(geometry, arguments.folder / geometry)
        name = f"{geometry} {dtype} {batch}x{prompt}"
        options = ("--folder", str(folder), "--dtype", dtype, "--prompt", str(prompt), "--batch", str(batch))
        for _ in range(MOST_TRIES):
            before = measure_machine(folder, dtype)
            found = [harness.run_child(__file__, "--child", *options) for _ in range(PROCESSES[dtype])]
            peaks = [one["measured_bytes"] for one in found]
            rows[name] = {**found[0], "measured_bytes": max(peaks), "peaks_bytes": peaks}
            after = measure_machine(folder, dtype)
            rows[name]["changed"] = max(max(one / other, other / one) for one, other in zip(before, after, strict=True))
            print(name, json.dumps(rows[name]), flush=True)
            if rows[name]["changed"] <= MOST_CHANGED:
                break
        harness.save("plan", {"goals": goals_of(rows), "cases": rows})
    report(rows)
    print("written to benchmarks/results/plan.json")


if __name__ == "__main__":
    main()
