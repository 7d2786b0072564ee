"""How long does a GGUF file take to become a model and its tokenizer?

Loadstone, transformers and, where it is installed, llama.cpp load the same file (by default the demo model), each in
fresh processes, one after the other, with the page cache warm. `calls` are the two calls alone, after the libraries
have been imported; `process` counts from the start of the process. llama.cpp keeps the blocks packed; the other two
decode them to float32 (or to what --dtype says), which is more work. Every tensor and the logits must be bit-equal.

    python benchmarks/bench_gguf.py --repeats 3
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from importlib import util
from pathlib import Path
from typing import Any

import harness

TEXT = "The capital of France is Paris; it has two million people."


def load_loadstone(path: Path, dtype: str) -> tuple[Any, Any, float]:
    """`loadstone.load` and `loadstone.load_tokenizer`."""
    import loadstone

    model = loadstone.load(path, dtype=dtype)
    loaded = time.perf_counter()
    return model, loadstone.load_tokenizer(path), loaded


def load_transformers(path: Path, dtype: str) -> tuple[Any, Any, float]:
    """`from_pretrained(..., gguf_file=)`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    loaded = time.perf_counter()
    return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name), loaded


def load_llama_cpp(path: Path, dtype: str) -> tuple[Any, Any, float]:
    """`llama_cpp.Llama`, which holds model and tokenizer."""
    del dtype
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=512, verbose=False)
    return None, lambda text: {"input_ids": model.tokenize(text.encode(), add_bos=False)}, time.perf_counter()


PEERS = {"loadstone": load_loadstone, "transformers": load_transformers, "llama_cpp": load_llama_cpp}


def import_everything(path: Path, peer: str) -> None:
    """What the peer's calls import at their first use."""
    if peer == "llama_cpp":
        import llama_cpp  # noqa: F401

        return
    import torch  # noqa: F401
    import transformers

    from loadstone.architecture.gguf import config_from_metadata
    from loadstone.checkpoint.gguf import read_gguf

    getattr(transformers, config_from_metadata(read_gguf(path))["architectures"][0])
    transformers.PreTrainedTokenizerFast, transformers.AutoTokenizer  # noqa: B018
    if peer == "loadstone":
        import loadstone.api.assemble
        import loadstone.api.load
        import loadstone.api.tokenizer
        import loadstone.architecture.transformers_model  # noqa: F401


def child(arguments: argparse.Namespace) -> None:
    """Load once; print a line of JSON."""
    import_everything(arguments.path, arguments.peer)
    begin = time.perf_counter()
    model, tokenizer, loaded = PEERS[arguments.peer](arguments.path, arguments.dtype)
    done = time.perf_counter()
    result: dict[str, Any] = {
        "model_s": loaded - begin,
        "tokenizer_s": done - loaded,
        "calls_s": done - begin,
        "process_s": harness.since_process_start(),
        "peak_bytes": harness.anonymous_bytes(),
        "tokens": [int(token) for token in tokenizer(TEXT)["input_ids"]],
    }
    if model is not None:
        result.update(_digests(model))
    print(json.dumps(result))


def _digests(model: Any) -> dict[str, str]:
    import torch

    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(f"{name} {harness.digest(tensor)}".encode())
    with torch.inference_mode():
        logits = model(torch.arange(32)[None]).logits
    return {"weights": weights.hexdigest()[:16], "logits": harness.digest(logits)}


def report(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The table, printed, and the goals."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="seconds, medians")
    for column in ("peer", "model", "tokenizer", "calls", "process"):
        table.add_column(column)
    for peer, of_peer in runs.items():
        keys = ("model_s", "tokenizer_s", "calls_s", "process_s")
        table.add_row(peer, *(f"{harness.median(of_peer, key):.2f}" for key in keys))
    Console(width=100).print(table)
    goals = []
    if "transformers" in runs:
        ours, theirs = runs["loadstone"], runs["transformers"]
        ratio = harness.median_ratio(ours, theirs, "calls_s")
        goals.append(harness.verdict("model and tokenizer / transformers", ratio, 0.1))
        for key in ("weights", "logits"):
            equal = {run[key] for run in (*ours, *theirs)}
            goals.append(f"{'equal ' if len(equal) == 1 else 'DIFFER'}  {key}, bit by bit")
    print("\n".join(goals))
    return goals


def main() -> None:
    """Run all peers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", help="a GGUF file (the demo model)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.path is None:
        from loadstone.checkpoint.demo import demo_model

        arguments.path = demo_model()
    arguments.path = arguments.path.resolve()
    if arguments.peer:
        child(arguments)
        return
    peers = [peer for peer in arguments.peers.split(",") if util.find_spec(peer) is not None]
    for peer in sorted(set(arguments.peers.split(",")) - set(peers)):
        print(f"{peer} is not installed: left out", file=sys.stderr)
    harness.warm_caches([arguments.path])

    def run(peer: str) -> dict[str, Any]:
        return harness.run_child(__file__, str(arguments.path), "--peer", peer, "--dtype", arguments.dtype)

    runs = harness.in_turn(peers, arguments.repeats, run)
    content = {"file": arguments.path.name, "dtype": arguments.dtype, "goals": report(runs), "peers": runs}
    print(f"written to {harness.save('gguf', content)}")


if __name__ == "__main__":
    main()
