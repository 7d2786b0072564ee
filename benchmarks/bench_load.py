"""How long from nothing, or from imported libraries, to the first forward of a 3.1 GB model? And with how much memory?

A Qwen2.5-1.5B geometry in bf16 (random weights, four shards) is loaded as stored and as float32 by Loadstone,
transformers, accelerate and safetensors+assign, each in fresh processes, one after the other, with the page cache cold
and warm. `process` counts from the start of the process, imports included; `load` starts when everything is imported.

Beside the float32 loads stands what no loader can be spared, in processes that have imported the same: `find_memory`
only asks the kernel for the pages of the weights, with a thread for each core; `plain_cast` also reads the files
(through the page cache when warm, past it with eight threads when cold) and casts, without a model or a check.

    python benchmarks/bench_load.py --repeats 3
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import harness
import make_checkpoint

PARAMETER_BYTES = {"bfloat16": 2, "float32": 4}
FLOORS = ("find_memory", "plain_cast")
CHUNK_BYTES, BLOCK_BYTES, DIRECT_THREADS = 1 << 20, 4096, 8
MADV_POPULATE_WRITE = 23


def load_loadstone(folder: Path, dtype: str) -> Any:
    """`loadstone.load`."""
    import loadstone

    return loadstone.load(folder, dtype=dtype)


def load_transformers(folder: Path, dtype: str) -> Any:
    """`AutoModelForCausalLM.from_pretrained`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def load_accelerate(folder: Path, dtype: str) -> Any:
    """`init_empty_weights` and `load_checkpoint_and_dispatch`."""
    import torch
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.tie_weights()
    return load_checkpoint_and_dispatch(model, folder, device_map={"": "cpu"}, dtype=getattr(torch, dtype)).eval()


def load_safetensors(folder: Path, dtype: str) -> Any:
    """`load_file` for each shard into a meta model with `assign=True`."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    for shard in sorted(folder.glob("*.safetensors")):
        state = load_file(shard)
        for name in list(state):
            state[name] = state[name].to(getattr(torch, dtype))
        model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


PEERS = {
    "loadstone": load_loadstone,
    "transformers": load_transformers,
    "accelerate": load_accelerate,
    "safetensors": load_safetensors,
}


def floor(folder: Path, what: str, *, cold: bool) -> float:
    """Seconds of a plain loop over all bytes of the checkpoint: memory twice as large is found, and cast into."""
    files = sorted(folder.glob("*.safetensors"))
    begin = time.perf_counter()
    libc = ctypes.CDLL(None)
    pieces, lock = _pieces(files, os.O_DIRECT if cold else 0), threading.Lock()

    def work() -> None:
        buffer = mmap.mmap(-1, CHUNK_BYTES)
        read = np.frombuffer(buffer, np.uint16)
        while True:
            with lock:
                piece = next(pieces, None)
            if piece is None:
                return
            descriptor, offset, weights = piece
            # Python's own madvise holds the interpreter's lock meanwhile.
            libc.madvise(
                ctypes.c_void_p(weights.ctypes.data + 2 * offset), ctypes.c_size_t(2 * CHUNK_BYTES), MADV_POPULATE_WRITE
            )
            if what == "plain_cast":
                count = os.preadv(descriptor, [buffer], offset)
                # A bfloat16 is the upper half of a float32, and new memory is zero.
                weights[offset + 1 : offset + count : 2] = read[: count // 2]

    workers = [threading.Thread(target=work) for _ in range(DIRECT_THREADS if cold else os.cpu_count() or 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - begin


def _pieces(files: list[Path], flags: int) -> Iterator[tuple[int, int, Any]]:
    """Chunks of files: descriptor, offset, and the memory of all of the file as float32, whole chunks."""
    for path in files:
        nbytes = -(-path.stat().st_size // CHUNK_BYTES) * CHUNK_BYTES
        descriptor, weights = os.open(path, os.O_RDONLY | flags), np.frombuffer(mmap.mmap(-1, 2 * nbytes), np.uint16)
        for offset in range(0, nbytes, CHUNK_BYTES):
            yield descriptor, offset, weights


def import_everything(peer: str) -> None:
    """What the peer imports by itself during a load, imported beforehand."""
    import torch  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: F401
    from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM  # noqa: F401

    if peer == "accelerate":
        import accelerate  # noqa: F401
    if peer == "loadstone":
        import loadstone.api.assemble
        import loadstone.api.load
        import loadstone.architecture.transformers_model  # noqa: F401


def child(arguments: argparse.Namespace) -> None:
    """Load once, run once, print a line of JSON."""
    before = 0
    if arguments.child == "load":
        import_everything(arguments.peer)
        before = harness.anonymous_bytes()
        if arguments.cold:
            harness.drop_caches()
    if arguments.peer in FLOORS:
        print(json.dumps({"load_s": floor(arguments.folder, arguments.peer, cold=arguments.cold)}))
        return
    watch = harness.AnonymousPeak()
    begin = time.perf_counter()
    model = PEERS[arguments.peer](arguments.folder, arguments.dtype)
    loaded = time.perf_counter()
    load_peak = watch.peak_bytes
    import torch

    with torch.inference_mode():
        logits = model(torch.arange(32)[None]).logits
    done = time.perf_counter()
    result = {
        "process_s": harness.since_process_start(),
        "load_s": loaded - begin,
        "forward_s": done - loaded,
        "sum_s": done - begin,
        "before_bytes": before,
        "load_peak_bytes": load_peak,
        "peak_bytes": watch.peak_bytes,
        "finite": bool(torch.isfinite(logits).all()),
        "logits": harness.digest(logits),
        "weights": checksum(model),
    }
    print(json.dumps(result))


def checksum(model: Any) -> int:
    """The sum of all weights' bits: tells whether a difference in the logits came from the load or from the forward."""
    import torch

    words = {2: torch.int16, 4: torch.int32}
    return sum(int(tensor.view(words[tensor.element_size()]).sum(dtype=torch.int64)) for tensor in model.parameters())


def measure(arguments: argparse.Namespace, mode: str, dtype: str, cold: bool) -> dict[str, list[dict[str, Any]]]:
    """All peers in turn in one case."""
    files = sorted(arguments.folder.glob("*.safetensors"))

    def run(peer: str) -> dict[str, Any]:
        if cold and mode == "process":
            harness.drop_caches()
        elif not cold:
            harness.warm_caches(files)
        flags = ["--cold"] if cold else []
        return harness.run_child(
            __file__, "--child", mode, "--peer", peer, "--dtype", dtype, "--folder", str(arguments.folder), *flags
        )

    print(f"{mode}, {dtype}, {'cold' if cold else 'warm'}", flush=True)
    floors = FLOORS if mode == "load" and dtype == "float32" else ()
    return harness.in_turn([*arguments.peers.split(","), *floors], arguments.repeats, run)


def report(cases: dict[str, dict[str, list[dict[str, Any]]]], weight_bytes: dict[str, int]) -> list[str]:
    """The table, printed, and the goals."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="seconds, medians")
    for column in ("case", "peer", "load", "forward", "sum", "process", "peak anonymous GB"):
        table.add_column(column)
    for case, runs in cases.items():
        for peer, of_peer in runs.items():
            if peer in FLOORS:
                table.add_row(case, peer, f"{harness.median(of_peer, 'load_s'):.2f}")
                continue
            figures = [f"{harness.median(of_peer, key):.2f}" for key in ("load_s", "forward_s", "sum_s", "process_s")]
            table.add_row(case, peer, *figures, f"{harness.median(of_peer, 'peak_bytes') / 1e9:.2f}")
    Console(width=120).print(table)
    goals = []
    for case, runs in cases.items():
        mode, dtype, heat = case.split()
        ours, theirs = runs["loadstone"], runs.get("transformers")
        goals.extend(
            f"DIFFER  {case}: the peers' {what} are not bit-equal"
            for what in ("weights", "logits")
            if len({run[what] for of_peer in runs.values() for run in of_peer if what in run}) > 1
        )
        if mode == "load" and dtype == "bfloat16":
            rivals = [of_peer for peer, of_peer in runs.items() if peer != "loadstone"]
            best = min(rivals, key=lambda of_peer: harness.median(of_peer, "sum_s"))
            ratio = harness.median_ratio(ours, best, "sum_s")
            goals.append(harness.verdict(f"{case}: load + first forward / best peer", ratio, 1.0))
        if mode == "load" and dtype == "float32" and theirs:
            ratio = harness.median_ratio(ours, theirs, "load_s")
            goals.append(harness.verdict(f"{case}: load / transformers", ratio, 0.6 if heat == "cold" else 0.7))
            for peer in FLOORS:
                least = harness.median_ratio(runs[peer], theirs, "load_s")
                goals.append(f"floor    {case}: {peer} / transformers: {least:.3g}")
            peak = harness.median(ours, "load_peak_bytes") / weight_bytes[dtype]
            goals.append(harness.verdict(f"{case}: peak anonymous RSS / float32 weights", peak, 1.05))
        if mode == "process" and theirs:
            ratio = harness.median_ratio(ours, theirs, "process_s")
            goals.append(harness.verdict(f"{case}: process start to first forward / transformers", ratio, 0.9))
    print("\n".join(goals))
    return goals


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "loadstone-bench" / "qwen2.5-1.5b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--cases", default="process,load", help="process, load, or both")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--results", default="load", help="the name of the JSON file in results/")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    make_checkpoint.write("qwen2.5-1.5b", arguments.folder)
    heats = [False, True] if harness.can_drop_caches() else [False]
    if len(heats) == 1:
        print("the page cache cannot be dropped (not root): warm only")
    cases = {
        f"{mode} {dtype} {'cold' if cold else 'warm'}": measure(arguments, mode, dtype, cold)
        for mode in arguments.cases.split(",")
        for dtype in arguments.dtypes.split(",")
        for cold in heats
    }
    stored = sum(path.stat().st_size for path in arguments.folder.glob("*.safetensors"))
    weight_bytes = {dtype: stored * width // 2 for dtype, width in PARAMETER_BYTES.items()}
    goals = report(cases, weight_bytes)
    print(f"written to {harness.save(arguments.results, {'goals': goals, 'cases': cases})}")


if __name__ == "__main__":
    main()
