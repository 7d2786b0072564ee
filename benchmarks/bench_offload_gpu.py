"""How long does a token take on an accelerator with a model that is larger than the memory it may use there?

The 8.7 GB checkpoint of `bench_offload.py` (bfloat16, a real geometry, random weights) on a device of which 4 GB may be
used. What does not fit there has its home in host memory, then on the disk. Each peer runs in a fresh process, page
cache cold: a prompt of 32 tokens, then greedy tokens one by one; ours before and after each of them.

Beside them stands the roofline of the same minutes: the slower of computing a pass (everything on the device) and of
moving what was streamed, at the best rate of a plain loop of copies from page-locked memory, measured before and after
each run of ours; from the disk no faster than direct reads.

    python benchmarks/bench_offload_gpu.py --peers-folder FOLDER
    python benchmarks/bench_offload_gpu.py --device cpu --geometry qwen2.5-0.5b --device-memory 5e8

The second line shows that all of it runs where there is no accelerator; nothing is compared or written then. Peers are
`pip install --no-deps --target FOLDER diffusers diffsynth`, and accelerate and Pillow as usual.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import make_checkpoint
import offload_gpu_peers
from bench_offload import OURS, PROMPT_TOKENS, Stretches, beside, by_peer, raw_rate, said, streamed, told

HOMES = ("cpu", "disk")
ROOFLINE, BEST_PEER = 0.95, 1.0
COPY_BYTES, NUM_COPIES = (16 << 20, 64 << 20, 256 << 20), 8
READ_BYTES, READ_THREADS, READ_CHUNK = 1_000_000_000, 8, 4 << 20


def child(arguments: argparse.Namespace) -> None:
    """Load and decode; print a line of JSON for each token and one at the end."""
    sys.path.append(str(arguments.peers_folder))
    out, sys.stdout = sys.stdout, sys.stderr  # what peers print must not come between the lines of JSON
    run = {"context": PROMPT_TOKENS + arguments.tokens, "prompt_tokens": PROMPT_TOKENS}
    load = offload_gpu_peers.LOADERS[arguments.child]
    model = load(arguments.path, arguments.device_memory, arguments.home, arguments.scratch, arguments.device, run)
    import torch

    def tell(**values: Any) -> None:
        print(json.dumps(values), file=out, flush=True)

    tell(loaded_s=harness.since_process_start())
    ids = torch.arange(5, 5 + PROMPT_TOKENS, device=arguments.device)[None]
    cache, found = None, []
    with torch.inference_mode():
        for number in range(arguments.tokens):
            made = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = made.past_key_values, made.logits[:, -1:].argmax(-1).to(arguments.device)
            found.append(int(ids))  # waits for the device
            tell(token=number, at_s=harness.since_process_start(), **streamed(model))
    peak = {} if arguments.device == "cpu" else {"peak_bytes": torch.get_device_module().max_memory_allocated()}
    tell(token_ids=found, **peak)


def measure(peer: str, home: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one peer in a process of its own."""
    if harness.is_left_out(peer, offload_gpu_peers.PACKAGES.get(peer)):
        return {"peer": peer, "outcome": "not installed"}
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="scratch-") as scratch:
        command = [sys.executable, __file__, "--child", peer, "--home", home, "--scratch", scratch]
        command += ["--path", str(arguments.path), "--device", arguments.device, "--tokens", str(arguments.tokens)]
        command += ["--device-memory", str(arguments.device_memory), "--peers-folder", str(arguments.peers_folder)]
        environment = harness.child_environment()
        if harness.can_drop_caches():
            harness.drop_caches()
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment, check=False, timeout=arguments.timeout
            )
        except subprocess.TimeoutExpired:
            return {"peer": peer, "outcome": "too slow"}
    row = {"peer": peer, "outcome": "finished" if done.returncode == 0 else "failed", **told(said(done.stdout))}
    if done.returncode:
        row["error"] = done.stderr[-1500:]
        print("\n".join(row["error"].splitlines()[-2:]), file=sys.stderr)
    harness.tell_row(f"{home}, {peer}", row)
    return row


def link_rate(device: str) -> float:
    """Bytes per second of the best plain loop of copies from page-locked memory to a device."""
    import torch

    wait, best = torch.get_device_module(device).synchronize, 0.0
    for nbytes in COPY_BYTES:
        source = torch.ones(nbytes, dtype=torch.uint8, pin_memory=True)
        target = torch.empty(nbytes, dtype=torch.uint8, device=device)
        for _ in range(2):  # the first round wakes the link up
            wait()
            begin = time.perf_counter()
            for _ in range(NUM_COPIES):
                target.copy_(source, non_blocking=True)
            wait()
            best = max(best, NUM_COPIES * nbytes / (time.perf_counter() - begin))
    return best


def run_home(home: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All peers with one home, and the roofline."""
    stretches = Stretches(sorted(arguments.path.glob("*.safetensors")))

    def rate() -> float:
        disk = raw_rate(stretches, READ_THREADS, READ_CHUNK, READ_BYTES) if home == "disk" else float("inf")
        return min(disk, link_rate(arguments.device) if arguments.device != "cpu" else float("inf"))

    def ours() -> dict[str, Any]:
        before = rate()
        row = measure(OURS, home, arguments)
        return row | {"rate_bytes_per_s": max(before, rate())}

    rows = [measure("resident", home, arguments), ours()]
    for peer in arguments.peers.split(","):
        if peer != OURS:
            rows += [measure(peer, home, arguments), ours()]
    ratios = {} if arguments.device == "cpu" else beside(rows)
    return {"home": home, "runs": rows, "ratios": ratios, "goals": goals(home, rows, arguments)}


def goals(home: str, rows: list[dict[str, Any]], arguments: argparse.Namespace) -> list[str]:
    """What of the roofline was reached, beside the peers, within the memory, with the same tokens."""
    mine = [row for row in rows if row["peer"] == OURS]
    expected = rows[0].get("token_ids")
    same = [row.get("token_ids") == expected for row in mine]
    others = {row["peer"] for row in rows if row["peer"] != OURS and row.get("token_ids", expected) != expected}
    tokens = [
        f"{'reached' if all(same) else 'MISSED'}  {home}: {sum(same)} of {len(same)} runs of ours say the same tokens",
        *(f"{home}: {peer} says other tokens" for peer in sorted(others)),
    ]
    if arguments.device == "cpu":
        return tokens
    if any("token_streamed_bytes" not in row for row in mine) or "token_s" not in rows[0]:
        return [f"MISSED  {home}: ours did not finish, or did not stream"]
    shares = [
        max(rows[0]["token_s"], row["token_streamed_bytes"] / row["rate_bytes_per_s"]) / row["token_s"] for row in mine
    ]
    made = [harness.at_least(f"{home}: of the roofline", statistics.median(shares), ROOFLINE)]
    if ratios := beside(rows):
        made.append(harness.verdict(f"{home}: seconds per token / best peer's", max(ratios.values()), BEST_PEER))
    if "peak_bytes" in mine[0]:
        peak = max(row["peak_bytes"] for row in mine) / arguments.device_memory
        made.append(harness.verdict(f"{home}: peak / memory of the device", peak, 1.0))
    return [*made, *tokens]


def draw(case: dict[str, Any]) -> None:
    """Print the table of one home."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="weights come from " + ("host memory" if case["home"] == "cpu" else "the disk"))
    for column in ("peer", "outcome", "load s", "prompt s", "s/token", "streamed GB/token", "peak MB"):
        table.add_column(column, justify="left" if column in ("peer", "outcome") else "right")
    for row in by_peer(case["runs"]):
        seconds = [row.get(key) for key in ("loaded_s", "first_token_s", "token_s")]
        table.add_row(
            row["peer"],
            row["outcome"],
            *("" if value is None else f"{value:.3f}" for value in seconds),
            f"{row['token_streamed_bytes'] / 1e9:.2f}" if "token_streamed_bytes" in row else "",
            f"{row['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in row else "",
        )
    Console(width=110).print(table)
    print("  ".join(f"ours / {peer} {ratio:.3f}" for peer, ratio in case["ratios"].items()))
    print("\n".join(case["goals"]))


def main() -> None:
    """Run every peer with every home."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "loadstone-bench")
    parser.add_argument("--geometry", default="qwen2.5-7b-14-layers")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--device-memory", type=float, default=4e9, help="bytes of it that may be used")
    parser.add_argument("--homes", default=",".join(HOMES))
    parser.add_argument("--peers", default=",".join(offload_gpu_peers.PEERS))
    parser.add_argument("--peers-folder", type=Path, default=Path("peers"), help="where further peers are installed")
    parser.add_argument("--tokens", type=int, default=10, help="the first of them ends the prompt")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds that one peer may take")
    parser.add_argument("--child", choices=sorted(offload_gpu_peers.LOADERS), help=argparse.SUPPRESS)
    for name, kind in (("--path", Path), ("--scratch", Path), ("--home", str)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.device_memory = int(arguments.device_memory)
    if arguments.child:
        child(arguments)
        return
    sys.path.append(str(arguments.peers_folder))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    arguments.path = make_checkpoint.write(arguments.geometry, arguments.folder / arguments.geometry)
    os.sync()
    if arguments.device != "cpu":
        import loadstone

        loadstone.machine(model=arguments.path, measure=True)
    cases = []
    for home in arguments.homes.split(","):
        cases.append(run_home(home, arguments))
        draw(cases[-1])
    if arguments.device != "cpu":
        print(f"written to {harness.save('offload_gpu', {'device': _name(arguments.device), 'cases': cases})}")


def _name(device: str) -> str:
    import torch

    return str(torch.get_device_module(device).get_device_name(device))


if __name__ == "__main__":
    main()
