"""How fast is the command itself: `import loadstone`, `loadstone --help`, `inspect` and `plan` on huge checkpoints?

The checkpoints are sparse files: 70 billion parameters in 30 shards, and a 1.5 TB mixture of experts with more than
60,000 tensors; they are planned for a machine with eight GPUs. Whole commands are timed, the start of Python included,
in fresh processes. Beside `plan` stands accelerate's `infer_auto_device_map` on the same models, built empty, with the
same budgets: also a whole process, of which the imports are told apart. It places weights only; `plan` also bounds
cache and activations and predicts times.

    python benchmarks/bench_startup.py --repeats 5
"""

from __future__ import annotations

import argparse
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
from loadstone.hardware.machine_file import save_machine
from loadstone.hardware.spec import Cpu, Device, Machine

GOALS_S = {
    "import loadstone": 0.05,
    "inspect 70B, 30 shards": 0.5,
    "inspect 1.5 TB, 60,000 tensors": 2.0,
    "plan 70B, 8 GPUs": 0.3,
    "plan 1.5 TB, 60,000 tensors, 8 GPUs": 3.0,
}
NUM_GPUS, GPU_BYTES = 8, 79 * 10**9
PEER = "infer_auto_device_map"


def timed(command: list[str]) -> float:
    """Seconds of a whole command."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - begin


def eight_gpus(path: Path) -> Path:
    """Describe a machine with eight GPUs of 80 GB."""
    host = Device(id="cpu", kind="cpu", name="CPU", total_bytes=10**12, free_bytes=9 * 10**11)
    gpus = [
        Device(id=f"cuda:{index}", kind="cuda", name="GPU", total_bytes=80 * 10**9, free_bytes=GPU_BYTES)
        for index in range(NUM_GPUS)
    ]
    save_machine(Machine(name="eight", cpu=Cpu(name="CPU", num_cores=64), devices=(*gpus, host)), path)
    return path


# What accelerate's users run to see where a model would go.
_DEVICE_MAP = """
import sys, time
begin = time.perf_counter()
from accelerate import infer_auto_device_map, init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM
import torch
config = AutoConfig.from_pretrained(sys.argv[1])
AutoModelForCausalLM._model_mapping[type(config)]
imported = time.perf_counter()
with init_empty_weights():
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
built = time.perf_counter()
budgets = {**{index: int(sys.argv[2]) for index in range(int(sys.argv[3]))}, "cpu": 9 * 10**11}
made = infer_auto_device_map(model, budgets, no_split_module_classes=list(model._no_split_modules or ()))
assert made
print(imported - begin, built - imported, time.perf_counter() - built)
"""


def device_map_time(folder: Path) -> dict[str, float]:
    """Seconds of `infer_auto_device_map`: of the whole process, and of its parts."""
    command = [sys.executable, "-c", _DEVICE_MAP, str(folder), str(GPU_BYTES), str(NUM_GPUS)]
    begin = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    whole = time.perf_counter() - begin
    import_s, build_s, place_s = map(float, done.stdout.split())
    return {"s": whole, "import_s": import_s, "build_s": build_s, "place_s": place_s}


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

        peers = {f"{PEER}, 70B": large, f"{PEER}, 1.5 TB": huge}

        def run(what: str) -> dict[str, Any]:
            if what in peers:
                return device_map_time(peers[what])
            return {"s": import_time() if what == "import loadstone" else timed(commands[what])}

        runs = harness.in_turn(["import loadstone", *commands, *peers], arguments.repeats, run)
    medians = {what: harness.median(of_command, "s") for what, of_command in runs.items()}
    for what, seconds in medians.items():
        parts = [f"{name[:-2]} {harness.median(runs[what], name):.3f}" for name in runs[what][0] if name != "s"]
        print(f"{what:42} {seconds:.3f} s", f"({', '.join(parts)})" if parts else "")
    goals = [harness.verdict(what, medians[what], goal) for what, goal in GOALS_S.items()]
    print("\n".join(goals))
    print(f"written to {harness.save('startup', {'goals': goals, 'median_s': medians, 'runs': runs})}")


if __name__ == "__main__":
    main()
