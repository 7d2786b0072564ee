"""How long does a token take with a model that is larger than the memory it may use?

Two checkpoints of real geometries (random weights) in memory cgroups: 8.7 GB of bfloat16 in 5.0 GB, and 3.1 GB in
1.5 GB. Each peer runs in a fresh process in the group, page cache cold: a prompt of 32 tokens, then greedy tokens one
by one. Beside them stands the roofline of the same minutes: the slower of computing a pass (everything resident, no
group) and of reading, at the best rate of a plain loop of direct reads, what the budget cannot keep.

    python benchmarks/bench_offload.py --peers-folder FOLDER
    python benchmarks/bench_offload.py --geometries qwen2.5-7b-14-layers --scale 0.2 --results offload_small

The second runs 8.7 GB in 1.0 GB, less than its head takes.

What the budget cannot keep is told twice: as the plan streams it, and without mercy: the weights that a token needs
less a budget of which only what the process holds after its imports, the cache and the activations are taken off. The
best rate is told twice as well: with idle cores, and while all cores multiply, as they do in a pass; a disk gives less
then, to whoever reads.

The rate of a rented disk changes by half within seconds. So ours runs before and after each peer, which is held against
the mean of the two (the two fastest in several rounds), and once `paced`: before and after each token the plain loop
reads as much as it needs to tell its rate, and each token is held against the rate around it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import make_checkpoint
import offload_peers
from cage import Cage, NoCage

OURS = "loadstone"
# (geometry, bytes of the group)
CASES = {"qwen2.5-7b-14-layers": 5_000_000_000, "qwen2.5-1.5b": 1_500_000_000}
PROMPT_TOKENS = 32
ROOFLINE, BEST_PEER, BYTES_OFF = 0.9, 0.35, 0.02
THREADS = (1, 2, 4, 8, 16)
CHUNKS = (1 << 20, 4 << 20, 16 << 20)
BLOCK_BYTES = 16 << 20
SEARCH_BYTES = 500_000_000
PACE_BYTES, PACED_TOKENS = 300_000_000, 16
MULTIPLY = """
import torch
weight, values = (torch.ones(rows, 8192, dtype=torch.bfloat16) for rows in (32768, 1))
with torch.inference_mode():
    print("ready", flush=True)
    while True:
        torch.nn.functional.linear(values, weight)
"""


def read_bytes() -> int:
    """What this process has had read from disks so far."""
    text = Path("/proc/self/io").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("read_bytes"))


def child(arguments: argparse.Namespace) -> None:
    """Load and decode; print a line of JSON for each token and one at the end."""
    sys.path.append(str(arguments.peers_folder))
    # What peers print must not come between the lines of JSON.
    out, sys.stdout = sys.stdout, sys.stderr
    run = {"context": PROMPT_TOKENS + arguments.tokens, "prompt_tokens": PROMPT_TOKENS}
    load = offload_peers.LOADERS[arguments.child]
    model = load(arguments.path, arguments.budget, arguments.scratch, run)
    import torch

    def tell(**values: Any) -> None:
        print(json.dumps(values), file=out, flush=True)

    tell(loaded_s=harness.since_process_start())
    ids = torch.arange(5, 5 + PROMPT_TOKENS)[None]
    cache, found = None, []
    raw = _raw_of_paced(arguments)
    with torch.inference_mode():
        for number in range(arguments.tokens):
            told_raw = raw()
            begin = {"begin_s": harness.since_process_start(), "begin_bytes": read_bytes()}
            made = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = made.past_key_values, made.logits[:, -1:].argmax(-1)
            found.append(int(ids))
            end = {"at_s": harness.since_process_start(), "read_bytes": read_bytes()}
            tell(token=number, **begin, **end, **told_raw, **streamed(model))
    tell(token_ids=found, **raw(), **_planned(model))


def _raw_of_paced(arguments: argparse.Namespace) -> Callable[[], dict[str, float]]:
    """What tells the rate of the plain loop now, where that was asked for."""
    if arguments.paced is None:
        return dict
    stretches = Stretches(sorted(arguments.path.glob("*.safetensors")))
    threads, chunk = arguments.paced
    return lambda: {"raw_bytes_per_s": raw_rate(stretches, threads, chunk, PACE_BYTES)}


def streamed(model: Any) -> dict[str, Any]:
    """What Loadstone has streamed so far, where it is Loadstone's model."""
    stats = _known(model)
    stats = None if stats is None else stats.stats()
    return {} if stats is None else {"streamed_bytes": stats.streamed_bytes, "stall_s": stats.stall_s}


def _known(model: Any) -> Any:
    module = sys.modules.get("loadstone")
    try:
        return None if module is None else module.of(model)
    except (TypeError, ValueError):
        return None


def _planned(model: Any) -> dict[str, Any]:
    """The plan, where there is one."""
    known = _known(model)
    if known is None or known.plan is None:
        return {}
    plan, host = known.plan, known.plan.devices[-1]
    reserved, stats = host.reservation, known.stats()
    return {
        "plan_streamed_bytes": plan.streamed_bytes,
        "plan_token_s": plan.prediction.decode.seconds,
        "plan_measured": plan.prediction.measured,
        "plan_peak_bytes": host.peak_bytes,
        "level_bytes": host.level_bytes,
        "run_bytes": reserved.kv_cache_bytes + reserved.activation_bytes + reserved.logits_bytes,
        "ring_bytes": reserved.slot_bytes,
        "workspace_bytes": reserved.workspace_bytes,
        "num_slots": plan.num_slots,
        "slot_bytes": stats.slot_bytes if stats is not None else 0,
        "num_units": stats.num_units if stats is not None else 0,
        "unforeseen": stats.unforeseen if stats is not None else 0,
        "touched_bytes": sum(
            one.home_bytes if one.kind.value != "embedding" else one.moved_bytes for one in plan.placements
        ),
    }


def said(stdout: str) -> list[dict[str, Any]]:
    """What a child has said."""
    return [json.loads(line) for line in stdout.splitlines() if re.match(r"\{.*\}$", line)]


def told(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What a child has said, as figures of one token: medians over those after the prompt."""
    tokens = [line for line in lines if "token" in line]
    figures: dict[str, Any] = {}
    for line in lines:
        figures |= line if "token" not in line else {}
    if tokens:
        figures["first_token_s"] = tokens[0]["at_s"] - figures["loaded_s"]
    for name, key in (
        ("token_s", "at_s"),
        ("token_bytes", "read_bytes"),
        ("token_streamed_bytes", "streamed_bytes"),
        ("token_stall_s", "stall_s"),
    ):
        steps = [b[key] - a[key] for a, b in itertools.pairwise(tokens) if key in b]
        if steps:
            figures[name] = statistics.median(steps)
            figures[f"every_{name}"] = steps
    return figures


def told_paced(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Each token beside the rates of the plain loop before and after it; the first two passes are left out."""
    steps = [line for line in lines if "raw_bytes_per_s" in line]
    return {
        "tokens": [
            {
                "seconds": one["at_s"] - one["begin_s"],
                "bytes": one["read_bytes"] - one["begin_bytes"],
                "raw_bytes_per_s": (one["raw_bytes_per_s"] + following["raw_bytes_per_s"]) / 2,
            }
            for one, following in itertools.pairwise(steps[2:])
        ]
    }


def measure(
    cage: Cage, peer: str, arguments: argparse.Namespace, paced: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Run one peer in the group.

    Args:
        cage: the group.
        peer: its name.
        arguments: of the command line.
        paced: threads and bytes at a time of the plain loop that reads between tokens.
    """
    if harness.is_left_out(peer, offload_peers.PACKAGES.get(peer)):
        return {"peer": peer, "outcome": "not installed"}
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="scratch-") as scratch:
        command = [sys.executable, __file__, "--child", peer, "--path", str(arguments.path), "--scratch", scratch]
        command += ["--budget", str(arguments.budget), "--tokens", str(PACED_TOKENS if paced else arguments.tokens)]
        command += ["--peers-folder", str(arguments.peers_folder)]
        command += ["--paced", *map(str, paced)] if paced else []
        environment = harness.child_environment()
        if harness.can_drop_caches():
            harness.drop_caches()
        caged = cage.run(command, timeout_s=arguments.timeout, environment=environment)
    row: dict[str, Any] = {
        "peer": peer,
        "outcome": caged.outcome,
        "peak_bytes": caged.peak_bytes,
        "anonymous_peak_bytes": caged.anonymous_bytes,
        **(told_paced if paced else told)(said(caged.stdout)),
    }
    if caged.outcome.startswith("failed"):
        row["error"] = caged.stderr[-1500:]
        print(row["error"].splitlines()[-1:], file=sys.stderr)
    harness.tell_row(peer, row)
    return row


class Stretches:
    """Blocks of files, each handed out once before any is again: whoever lends the disk may keep what was read last."""

    def __init__(self, paths: list[Path]) -> None:
        self._blocks = [
            (path, offset) for path in paths for offset in range(0, path.stat().st_size - BLOCK_BYTES + 1, BLOCK_BYTES)
        ]
        self._at = 0

    def take(self, nbytes: int) -> list[tuple[Path, int]]:
        """The next blocks, of so many bytes together."""
        begin, self._at = self._at, self._at + max(1, nbytes // BLOCK_BYTES)
        return [self._blocks[number % len(self._blocks)] for number in range(begin, self._at)]


def raw_rate(stretches: Stretches, threads: int, chunk: int, nbytes: int) -> float:
    """Bytes per second of a plain loop of direct reads, each thread into a buffer of its own, of huge pages."""
    from loadstone.hardware.pages import adjoining  # peers do without Loadstone

    blocks = stretches.take(nbytes)
    descriptors = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in dict.fromkeys(path for path, _ in blocks)}
    pieces = [(descriptors[path], offset + begin) for path, offset in blocks for begin in range(0, BLOCK_BYTES, chunk)]
    turn, lock, buffers = iter(pieces), threading.Lock(), [adjoining(chunk) for _ in range(threads)]

    def work(buffer: Any) -> None:
        while True:
            with lock:
                piece = next(turn, None)
            if piece is None:
                return
            os.preadv(piece[0], [buffer.data], piece[1])

    workers = [threading.Thread(target=work, args=(buffer,)) for buffer in buffers]
    begin = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - begin
    for descriptor in descriptors.values():
        os.close(descriptor)
    return len(pieces) * chunk / seconds


def search_rate(stretches: Stretches) -> dict[str, Any]:
    """The best of all settings."""
    found = [
        (raw_rate(stretches, threads, chunk, SEARCH_BYTES), threads, chunk) for threads in THREADS for chunk in CHUNKS
    ]
    rate, threads, chunk = max(found)
    return {"bytes_per_s": rate, "threads": threads, "chunk_bytes": chunk, "searched": found}


@contextmanager
def multiplying() -> Iterator[None]:
    """All cores multiply meanwhile, in a process of its own; its threads sleep while they wait, as ours do."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen([sys.executable, "-c", MULTIPLY], stdout=subprocess.PIPE, env=environment)
    try:
        if process.stdout is None or not process.stdout.readline():
            raise RuntimeError("the process that multiplies ended at once")
        yield
    finally:
        process.kill()
        process.wait()


def run_case(geometry: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All peers on one checkpoint, and the roofline."""
    import loadstone

    arguments.path = make_checkpoint.write(geometry, arguments.folder / geometry)
    arguments.budget = int(CASES[geometry] * arguments.scale)
    os.sync()  # what was written just now must not be on its way to the disk while that is measured
    stretches = Stretches(sorted(arguments.path.glob("*.safetensors")))
    loadstone.machine(model=arguments.path, measure=True)
    raw = search_rate(stretches)
    with multiplying():
        raw["beside_products"] = search_rate(stretches)
    rates = [one["bytes_per_s"] / 1e9 for one in (raw, raw["beside_products"])]
    print(
        f"{geometry}: the disk reads {rates[0]:.2f} GB/s, and {rates[1]:.2f} while cores multiply",
        file=sys.stderr,
        flush=True,
    )
    best = raw["threads"], raw["chunk_bytes"]
    with Cage(1 << 60) as cage:
        rows = [measure(cage, "resident", arguments)]
    with Cage(arguments.budget) as cage:
        paced = measure(cage, OURS, arguments, paced=best)
        rows.append(measure(cage, OURS, arguments))
        for peer in arguments.peers.split(","):
            if peer != OURS:
                rows += [measure(cage, peer, arguments), measure(cage, OURS, arguments)]
        fastest = sorted((row for row in rows[1:] if row["peer"] != OURS and "token_s" in row), key=_token_s)[:2]
        for _ in range(1, arguments.rounds):
            for row in fastest:
                rows += [measure(cage, row["peer"], arguments), measure(cage, OURS, arguments)]
    raw["bytes_per_s"] = max([raw["bytes_per_s"], *(one["raw_bytes_per_s"] for one in paced["tokens"])])
    found: dict[str, Any] = {
        "geometry": geometry,
        "budget_bytes": arguments.budget,
        "disk": raw,
        "paced": paced,
        "runs": rows,
    }
    return found | goals(found)


def together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Several runs of one as one: medians over all their tokens, the highest peaks."""
    made = {**rows[-1], "num_runs": len(rows)}
    if any("token_s" not in row for row in rows):
        return made
    for key in [key for key in made if key.startswith("every_")]:
        steps = [step for row in rows for step in row[key]]
        made |= {key: steps, key.removeprefix("every_"): statistics.median(steps)}
    for key in ("loaded_s", "first_token_s"):
        made[key] = statistics.median(row[key] for row in rows)
    for key in {"peak_bytes", "anonymous_peak_bytes"} & made.keys():
        made[key] = max(row[key] for row in rows)
    return made


def by_peer(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of each peer as one, in the order in which they came first."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault(row["peer"], []).append(row)
    return [together(some) for some in runs.values()]


def _token_s(row: dict[str, Any]) -> float:
    seconds: float = row["token_s"]
    return seconds


def beside(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of ours, the mean of before and after, over those of each peer: the median of its runs."""
    ratios: dict[str, list[float]] = {}
    for before, peer, after in zip(runs, runs[1:], runs[2:], strict=False):
        if before["peer"] == after["peer"] == OURS and all("token_s" in row for row in (before, peer, after)):
            ratios.setdefault(peer["peer"], []).append((_token_s(before) + _token_s(after)) / 2 / _token_s(peer))
    return {peer: statistics.median(found) for peer, found in ratios.items()}


def goals(case: dict[str, Any]) -> dict[str, Any]:
    """The roofline and what of it was reached."""
    mine = [row for row in case["runs"] if row["peer"] == OURS]
    compute_s = case["runs"][0]["token_s"]
    if any("token_s" not in row or "plan_streamed_bytes" not in row for row in mine) or not case["paced"]["tokens"]:
        return {"goals": ["MISSED  ours did not finish, or did not stream"]}
    ours, ratios = together(mine), beside(case["runs"])
    rate = case["disk"]["bytes_per_s"]
    kept = case["budget_bytes"] - ours["level_bytes"] - ours["run_bytes"]
    least = max(0, ours["touched_bytes"] - kept)
    roofline_s = max(compute_s, least / rate)
    beside_s = max(compute_s, least / case["disk"]["beside_products"]["bytes_per_s"])
    planned_s = max(compute_s, ours["plan_streamed_bytes"] / rate)
    near = [max(compute_s, one["bytes"] / one["raw_bytes_per_s"]) / one["seconds"] for one in case["paced"]["tokens"]]
    off = max(abs(ours[key] / ours["plan_streamed_bytes"] - 1) for key in ("token_bytes", "token_streamed_bytes"))
    name = case["geometry"]
    told_goals = [
        harness.at_least(f"{name}: of {words}, {seconds:.2f} s", seconds / ours["token_s"], ROOFLINE)
        for words, seconds in (
            ("the roofline", roofline_s),
            ("the roofline at the best rate while cores multiply", beside_s),
            ("the plan's own", planned_s),
        )
    ]
    told_goals.append(
        harness.at_least(f"{name}: of the plan's own at the rate around each token", statistics.median(near), ROOFLINE)
    )
    told_goals += [
        harness.verdict(f"{name}: peak / budget", ours["peak_bytes"] / case["budget_bytes"], 1.0),
        harness.verdict(f"{name}: bytes per token off the plan's", off, BYTES_OFF),
    ]
    if ratios:
        told_goals.append(harness.verdict(f"{name}: seconds per token / best peer's", max(ratios.values()), BEST_PEER))
    same = [row["token_ids"] == ours["token_ids"] for row in case["runs"] if "token_ids" in row]
    told_goals.append(f"{'reached' if all(same) else 'MISSED'}  {name}: {sum(same)} of {len(same)} say the same tokens")
    return {
        "compute_s": compute_s,
        "least_bytes": least,
        "roofline_s": roofline_s,
        "roofline_beside_products_s": beside_s,
        "ratios": ratios,
        "runs": by_peer(case["runs"]),
        "goals": told_goals,
    }


def draw(case: dict[str, Any]) -> None:
    """Print the table of one checkpoint."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{case['geometry']} in {case['budget_bytes'] / 1e9:.1f} GB")
    for column in ("peer", "outcome", "load s", "prompt s", "s/token", "read GB/token", "peak MB", "anonymous MB"):
        table.add_column(column, justify="left" if column in ("peer", "outcome") else "right")
    for row in case["runs"]:
        seconds = [row.get(key) for key in ("loaded_s", "first_token_s", "token_s")]
        table.add_row(
            row["peer"],
            row["outcome"],
            *("" if value is None else f"{value:.2f}" for value in seconds),
            f"{row['token_bytes'] / 1e9:.2f}" if "token_bytes" in row else "",
            *(f"{row[key] / 1e6:.0f}" if key in row else "" for key in ("peak_bytes", "anonymous_peak_bytes")),
        )
    Console(width=110).print(table)
    print("  ".join(f"ours / {peer} {ratio:.3f}" for peer, ratio in case.get("ratios", {}).items()))
    print("\n".join(case["goals"]))


def main() -> None:
    """Run every peer on every checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "loadstone-bench")
    parser.add_argument("--geometries", default=",".join(CASES))
    parser.add_argument("--peers", default=",".join(offload_peers.PEERS))
    parser.add_argument("--peers-folder", type=Path, default=Path("peers"), help="where further peers are installed")
    parser.add_argument("--tokens", type=int, default=6, help="the first of them ends the prompt")
    parser.add_argument("--rounds", type=int, default=3, help="of the two fastest peers")
    parser.add_argument("--scale", type=float, default=1.0, help="of the groups' bytes")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds that one peer may take")
    parser.add_argument("--keep", action="store_true", help="leave the 8.7 GB checkpoint where it is")
    parser.add_argument("--dry", action="store_true", help="do not write results")
    parser.add_argument("--results", default="offload", help="the name of the JSON file in results/")
    parser.add_argument("--child", choices=sorted(offload_peers.LOADERS), help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--paced", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    sys.path.append(str(arguments.peers_folder))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    cases = []
    try:
        for geometry in arguments.geometries.split(","):
            cases.append(run_case(geometry, arguments))
            draw(cases[-1])
            if not arguments.dry:
                print(f"written to {harness.save(arguments.results, {'cases': cases})}", flush=True)
    except NoCage as reason:
        raise SystemExit(f"no memory cgroup can be made here: {reason}") from None
    finally:
        largest = arguments.folder / next(iter(CASES))
        if not arguments.keep and largest.exists():
            shutil.rmtree(largest)


if __name__ == "__main__":
    main()
