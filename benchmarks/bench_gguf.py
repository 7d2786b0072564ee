"""How long does a GGUF file take from nothing to a model and its tokenizer?

Loadstone, transformers and, where it is installed, llama.cpp load the same file, each in fresh processes, one after
the other, with the page cache warm. Two times are taken: with imports (process start to ready) and without (the calls
alone, after the libraries have been imported). llama.cpp keeps the blocks as they are; the other two decode them to
float32 (or to what --dtype says), which is more work.

    python benchmarks/bench_gguf.py SmolLM2-135M-Instruct.Q4_1.gguf --repeats 5
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata, util
from pathlib import Path

HERE = Path(__file__).resolve().parent
TEXT = "The capital of France is Paris; 12 + 345 = 357."


def loadstone(path: Path, dtype: str) -> dict[str, object]:
    """`loadstone.load` and `loadstone.load_tokenizer`."""
    import torch

    import loadstone as library

    library.load, library.load_tokenizer  # noqa: B018 - imports what the calls import at their first use
    _import_classes(path)
    imported = time.perf_counter()
    model = library.load(path, dtype=getattr(torch, dtype))
    loaded = time.perf_counter()
    tokenizer = library.load_tokenizer(path)
    return _outcome(imported, loaded, tokenizer(TEXT)["input_ids"], model.num_parameters())


def transformers(path: Path, dtype: str) -> dict[str, object]:
    """`from_pretrained(..., gguf_file=)`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _import_classes(path)
    imported = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=getattr(torch, dtype))
    loaded = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return _outcome(imported, loaded, tokenizer(TEXT)["input_ids"], model.num_parameters())


def llama_cpp(path: Path, dtype: str) -> dict[str, object]:
    """`llama_cpp.Llama`, which holds model and tokenizer; the blocks stay packed."""
    del dtype
    from llama_cpp import Llama

    imported = time.perf_counter()
    model = Llama(str(path), n_ctx=512, verbose=False)
    loaded = time.perf_counter()
    return _outcome(imported, loaded, model.tokenize(TEXT.encode(), add_bos=False, special=True), 0)


PEERS = {"loadstone": loadstone, "transformers": transformers, "llama_cpp": llama_cpp}


def _import_classes(path: Path) -> None:
    """Import the model class that the file will need, so that no call pays for it."""
    import transformers as library

    from loadstone.architecture.gguf import config_from_metadata
    from loadstone.checkpoint.gguf import read_gguf

    getattr(library, config_from_metadata(read_gguf(path))["architectures"][0])
    library.PreTrainedTokenizerFast, library.AutoTokenizer  # noqa: B018


def _outcome(imported: float, loaded: float, tokens: list[int], parameters: int) -> dict[str, object]:
    done = time.perf_counter()
    return {
        "imported": imported,
        "model_s": loaded - imported,
        "tokenizer_s": done - loaded,
        "calls_s": done - imported,
        "tokens": list(tokens),
        "parameters": parameters,
        "peak_rss_bytes": _peak_rss_bytes(),
    }


def _peak_rss_bytes() -> int:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run_child(peer: str, path: Path, dtype: str) -> dict[str, object]:
    """One load in a fresh process; `total_s` counts from before its start."""
    command = [sys.executable, __file__, str(path), "--child", peer, "--dtype", dtype]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    begin = time.perf_counter()
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    total = time.perf_counter() - begin
    if finished.returncode:
        raise SystemExit(f"{peer} failed:\n{finished.stderr[-2000:]}")
    return {**json.loads(finished.stdout.splitlines()[-1]), "total_s": total}


def warm(path: Path) -> float:
    """Read the file once, so that every peer finds it in the page cache; returns the rate of a second reading."""
    for _ in range(2):
        begin = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(1 << 22)
            while file.readinto(buffer):
                pass
        seconds = time.perf_counter() - begin
    return path.stat().st_size / seconds


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """All peers, in turn, so that a disturbance of the machine meets each of them."""
    peers = [peer for peer in PEERS if peer in arguments.peers and (util.find_spec(peer) is not None)]
    for peer in sorted(set(arguments.peers) - set(peers)):
        print(f"{peer} is not installed: left out", file=sys.stderr)
    rate = warm(arguments.path)
    runs: dict[str, list[dict[str, object]]] = {peer: [] for peer in peers}
    for _ in range(arguments.repeats):
        for peer in peers:
            runs[peer].append(run_child(peer, arguments.path, arguments.dtype))
    return {
        "file": arguments.path.name,
        "file_bytes": arguments.path.stat().st_size,
        "dtype": arguments.dtype,
        "warm_read_bytes_per_s": rate,
        "machine": {"cpus": os.cpu_count(), "processor": platform.processor(), "python": platform.python_version()},
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
        "peers": {peer: summary(found) for peer, found in runs.items()},
    }


def summary(runs: list[dict[str, object]]) -> dict[str, object]:
    """Medians and bests of one peer."""
    found: dict[str, object] = {
        "tokens": runs[0]["tokens"],
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
    }
    for name in ("total_s", "calls_s", "model_s", "tokenizer_s"):
        times = [float(str(run[name])) for run in runs]
        found[name] = {"median": statistics.median(times), "best": min(times), "all": times}
    return found


def table(result: dict[str, object]) -> str:
    """The medians as text, and how many times Loadstone's they are."""
    peers: dict[str, dict] = result["peers"]  # type: ignore[assignment]
    lines = [f"{'':14}{'calls':>9}{'model':>9}{'tokenizer':>11}{'with imports':>14}{'peak RSS':>11}   times ours"]
    ours = peers.get("loadstone")
    for peer, found in peers.items():
        numbers = [found[name]["median"] for name in ("calls_s", "model_s", "tokenizer_s", "total_s")]
        calls, model, tokenizer, total = numbers
        ratio = "" if ours is None else f"{calls / ours['calls_s']['median']:8.2f} (calls)"
        if ours is not None:
            ratio += f" {total / ours['total_s']['median']:6.2f} (with imports)"
        rss = found["peak_rss_bytes"] / 1e6
        lines.append(f"{peer:14}{calls:8.2f}s{model:8.2f}s{tokenizer:10.2f}s{total:13.2f}s{rss:8.0f} MB{ratio}")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line; run as a parent, or as the child that loads once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a GGUF file of an architecture that transformers reads")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes for each peer (3)")
    parser.add_argument("--dtype", default="float32", help="dtype of the loaded parameters (float32)")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="who takes part (all)")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "gguf.json", help="where the JSON goes")
    parser.add_argument("--child", choices=PEERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.path = arguments.path.resolve()
    if arguments.child:
        print(json.dumps(PEERS[arguments.child](arguments.path, arguments.dtype)))
        return
    result = measure(arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(f"page cache read: {result['warm_read_bytes_per_s'] / 1e9:.1f} GB/s; written to {arguments.output}")  # type: ignore[operator]


if __name__ == "__main__":
    main()
