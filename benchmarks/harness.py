"""What the benchmarks share: fresh processes, a cold or a warm page cache, peers in turn, medians, results as JSON."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
_DROP = Path("/proc/sys/vm/drop_caches")
_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "gguf",
    "runai-model-streamer",
    "fastsafetensors",
    "tensorizer",
    "loadstone",
)


def can_drop_caches() -> bool:
    """Whether the page cache can be emptied (Linux, as root)."""
    return os.access(_DROP, os.W_OK)


def drop_caches() -> None:
    """Empty the page cache."""
    os.sync()
    _DROP.write_text("3\n")


def drop_files(paths: Iterable[Path]) -> None:
    """Drop single files from the page cache, whatever else is in it."""
    for path in paths:
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm_caches(paths: Iterable[Path]) -> None:
    """Read files, so that they are in the page cache."""
    buffer = bytearray(8 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def child_environment() -> dict[str, str]:
    """What a child finds: no network, no bars, and the moment before its start (seconds since the epoch)."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "BENCH_START": repr(time.time())}


def is_left_out(peer: str, package: str | None) -> bool:
    """Whether the package that a peer needs is missing, which is said."""
    missing = package is not None and importlib.util.find_spec(package) is None
    if missing:
        print(f"  {peer}: left out, {package} is not installed", file=sys.stderr, flush=True)
    return missing


def tell_row(name: str, row: dict[str, Any]) -> None:
    """Say what became of a run, with its figures."""
    figures = "  ".join(f"{key} {value:.3g}" for key, value in row.items() if isinstance(value, float))
    print(f"  {name}: {row['outcome']}  {figures}", file=sys.stderr, flush=True)


def run_child(script: str, *arguments: str) -> dict[str, Any]:
    """Run a script of ours in a fresh process and take the JSON of its last line.

    The child finds the moment before its start in BENCH_START (seconds since the epoch).
    """
    environment = child_environment()
    # Compiled modules are kept, as on a user's machine.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def since_process_start() -> float:
    """In a child: seconds since just before it was started."""
    return time.time() - float(os.environ["BENCH_START"])


class AnonymousPeak:
    """In a child: samples anonymous resident memory every 5 ms."""

    def __init__(self) -> None:
        self.peak_bytes = anonymous_bytes()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())
            time.sleep(0.005)


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def digest(tensor: Any) -> str:
    """The SHA-256 of a tensor's bytes."""
    import torch

    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def in_turn(
    peers: Sequence[str], repeats: int, run: Callable[[str], dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """Run the peers A B C C B A ..., so that what drifts, and what runs before, hits all of them."""
    runs: dict[str, list[dict[str, Any]]] = {peer: [] for peer in peers}
    for round_number in range(repeats):
        for peer in peers if round_number % 2 == 0 else reversed(peers):
            result = run(peer)
            runs[peer].append(result)
            figures = "  ".join(f"{key} {value:.3f}" for key, value in result.items() if isinstance(value, float))
            print(f"  round {round_number + 1}, {peer}: {figures}", file=sys.stderr, flush=True)
    return runs


def median(runs: Sequence[dict[str, Any]], key: str) -> float:
    """The median of one figure."""
    return float(statistics.median(run[key] for run in runs))


def median_ratio(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], key: str) -> float:
    """The median over rounds of ours / theirs."""
    return float(statistics.median(a[key] / b[key] for a, b in zip(ours, theirs, strict=True)))


def verdict(name: str, figure: float, goal: float) -> str:
    """A goal with its figure, and whether it was reached."""
    return f"{'reached' if figure <= goal else 'MISSED'}  {name}: {figure:.3g} (goal at most {goal:.3g})"


def at_least(name: str, figure: float, goal: float) -> str:
    """The same for a figure that should be large."""
    return f"{'reached' if figure >= goal else 'MISSED'}  {name}: {figure:.3g} (goal at least {goal:.3g})"


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": pages * page,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def save(name: str, content: dict[str, Any]) -> Path:
    """Write results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n")
    return path
