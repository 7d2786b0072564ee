"""How fast is the command itself: `import loadstone`, `loadstone --help`, `inspect` and `plan` on huge checkpoints?

The checkpoints are sparse files: 70 billion parameters in 30 shards, and a 1.5 TB mixture of experts with more than
60,000 tensors; they are planned for a machine with eight GPUs. Whole commands are timed, the start of Python included,
in fresh processes.

    python benchmarks/bench_startup.py --repeats 5
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

import harness
import sparse_checkpoint

GOALS_S = {
    "import loadstone": 0.05,
    "inspect 70B, 30 shards": 0.5,
    "inspect 1.5 TB, 60,000 tensors": 2.0,
    "plan 70B, 8 GPUs": 0.3,
    "plan 1.5 TB, 60,000 tensors, 8 GPUs": 3.0,
}


def timed(command: list[str]) -> float:
    """Seconds of a whole command."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - begin


def eight_gpus(path: Path) -> Path:
    """Describe a machine with eight GPUs of 80 GB."""
    gpu = {"kind": "cuda", "name": "GPU", "total_bytes": 80 * 10**9, "free_bytes": 79 * 10**9}
    host = {"id": "cpu", "kind": "cpu", "name": "CPU", "total_bytes": 10**12, "free_bytes": 9 * 10**11}
    devices = [{**gpu, "id": f"cuda:{index}"} for index in range(8)]
    path.write_text(json.dumps({"name": "eight", "num_cores": 64, "devices": [*devices, host]}))
    return path


def import_time() -> float:
    """Seconds of `import loadstone` within a fresh Python."""
    code = "import time; t = time.perf_counter(); import loadstone; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)


def main() -> None:
    """Time every command in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        dense = sparse_checkpoint.llama_shapes(sparse_checkpoint.LLAMA_70B)
        experts = sparse_checkpoint.moe_shapes(sparse_checkpoint.MOE_1500GB)
        large = sparse_checkpoint.write(Path(name) / "70b", sparse_checkpoint.LLAMA_70B, dense, 30)
        huge = sparse_checkpoint.write(Path(name) / "moe", sparse_checkpoint.MOE_1500GB, experts, 160)
        print(
            f"dense: {sum(map(prod, dense.values())) / 1e9:.1f}B parameters in {len(dense):,} tensors; experts: "
            f"{2 * sum(map(prod, experts.values())) / 1e12:.2f} TB in {len(experts):,} tensors"
        )
        command = [sys.executable, "-m", "loadstone"]
        machine = str(eight_gpus(Path(name) / "machine.json"))
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "loadstone --help": [*command, "--help"],
            "inspect 70B, 30 shards": [*command, "inspect", str(large)],
            "inspect 70B, 30 shards, --json": [*command, "inspect", str(large), "--json"],
            "inspect 1.5 TB, 60,000 tensors": [*command, "inspect", str(huge)],
            "inspect 1.5 TB, 60,000 tensors, --json": [*command, "inspect", str(huge), "--json"],
            "plan 70B, 8 GPUs": [*command, "plan", str(large), "--machine", machine],
            "plan 1.5 TB, 60,000 tensors, 8 GPUs": [*command, "plan", str(huge), "--machine", machine],
        }

        def run(what: str) -> dict[str, Any]:
            return {"s": import_time() if what == "import loadstone" else timed(commands[what])}

        runs = harness.in_turn(["import loadstone", *commands], arguments.repeats, run)
    medians = {what: harness.median(of_command, "s") for what, of_command in runs.items()}
    for what, seconds in medians.items():
        print(f"{what:42} {seconds:.3f} s")
    goals = [harness.verdict(what, medians[what], goal) for what, goal in GOALS_S.items()]
    print("\n".join(goals))
    print(f"written to {harness.save('startup', {'goals': goals, 'median_s': medians, 'runs': runs})}")


if __name__ == "__main__":
    main()
