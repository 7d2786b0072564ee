"""How long does a GGUF file take to become a model and a tokenizer, how fast is each block format, and at what peak?

- `load`: Loadstone, transformers and, where it is installed, llama.cpp load the same file (by default the demo model),
  each in fresh processes, one after the other, with the page cache warm. `calls` are the two calls alone, after the
  libraries have been imported; `process` counts from the start of the process. llama.cpp keeps the blocks packed; the
  other two decode them to float32 (or to what --dtype says), which is more work. Every tensor and the logits must be
  bit-equal.
- `formats`: random blocks of every format that gguf-py can decode, 268 MB of floats. `gguf-py` and `load` begin with a
  file in the page cache and end with floats in fresh memory: `GGUFReader` with `dequantize` (one thread), and what
  `loadstone.load` does (all cores). `1 thread` and `all cores` are our decoder by itself, from memory into memory that
  was touched before. The floats must be bit-equal.
- `peaks`: the most anonymous memory that loading the file adds to a process, in float32 and bfloat16.

    python benchmarks/bench_gguf.py --repeats 3
    python benchmarks/bench_gguf.py --part formats [--formats Q4_K,Q8_0]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from importlib import util
from pathlib import Path
from typing import Any

import harness

PARTS = ("load", "formats", "peaks")
# Rows and columns of the tensors of `formats`.
NUM_TENSORS, ROWS, COLUMNS = 8, 2048, 4096
PEAK_DTYPES = ("float32", "bfloat16")
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


def formats_of_gguf_py() -> list[str]:
    """The block formats that gguf-py has a decoder for."""
    from gguf import GGMLQuantizationType, quants

    from loadstone.dtypes import GGML_BLOCKS

    kinds = {name: kind for name, kind in GGMLQuantizationType.__members__.items() if kind in quants._type_traits}
    return [block.name for block in GGML_BLOCKS.values() if block.name in kinds]


def format_child(encoding: str) -> None:
    """Decode one format in every way; print a line of JSON."""
    import gguf
    import numpy as np

    from loadstone.checkpoint.open import open_checkpoint
    from loadstone.dtypes import GGML_BLOCKS
    from loadstone.events import ignore
    from loadstone.hardware.memory import num_cores
    from loadstone.stream.dequantize import dequantize
    from loadstone.stream.host import Ahead
    from loadstone.stream.read import CHUNK_BYTES

    block = next(block for block in GGML_BLOCKS.values() if block.name == encoding)
    kind = gguf.GGMLQuantizationType[encoding]
    shape = (NUM_TENSORS, ROWS, COLUMNS // block.block_numel * block.block_nbytes)
    blocks = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    touched = np.zeros(NUM_TENSORS * ROWS * COLUMNS, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "blocks.gguf")
        write_blocks(path, blocks, kind)

        def gguf_py() -> list[Any]:
            with np.errstate(all="ignore"):
                return [gguf.dequantize(tensor.data, kind) for tensor in gguf.GGUFReader(path).tensors]

        def load() -> list[Any]:
            ahead = Ahead(ignore)
            ahead.begin(open_checkpoint(path), lambda _: "float32", decode=True)
            ahead.wait()
            ahead.close()
            return [decoded.data for decoded in ahead.decoded.values()]

        def decode(num_threads: int) -> None:
            step = CHUNK_BYTES // block.block_nbytes
            num_blocks = blocks.size // block.block_nbytes
            flat, starts = blocks.reshape(-1), iter(range(0, num_blocks, step))

            def work() -> None:
                for start in starts:
                    end = min(start + step, num_blocks)
                    stored = flat[start * block.block_nbytes : end * block.block_nbytes]
                    dequantize(stored, encoding, touched[start * block.block_numel : end * block.block_numel])

            in_threads(work, num_threads)

        equal = [
            a.view(np.uint8).tobytes() == b.view(np.uint8).tobytes() for a, b in zip(gguf_py(), load(), strict=True)
        ]
        result: dict[str, Any] = {
            "gguf_py_s": median_seconds(gguf_py),
            "load_s": median_seconds(load),
            "one_thread_s": median_seconds(lambda: decode(1)),
            "all_cores_s": median_seconds(lambda: decode(num_cores())),
        }
    print(json.dumps({**result, "nbytes": touched.nbytes, "equal": all(equal)}))


def write_blocks(path: Path, blocks: Any, kind: Any) -> None:
    """A GGUF file of tensors of one format, by gguf-py's writer."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for number, tensor in enumerate(blocks):
        writer.add_tensor(f"{number}", tensor, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_threads(work: Callable[[], None], num_threads: int) -> None:
    """Run the same in several threads."""
    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def median_seconds(call: Callable[[], Any]) -> float:
    """The median of three calls; what a call returns is dropped before the next."""
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def report_formats(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The table of formats, printed, and the goals."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="GB of float32 a second, medians; in brackets times gguf-py")
    for column in ("format", "gguf-py", "load", "1 thread", "all cores", "bits"):
        table.add_column(column)
    ratios, loads = {}, {}
    for name, of_format in runs.items():
        rate = {key: of_format[0]["nbytes"] / 1e9 / harness.median(of_format, key) for key in
                ("gguf_py_s", "load_s", "one_thread_s", "all_cores_s")}  # fmt: skip
        times = {key: 1 / statistics.median(run[key] / run["gguf_py_s"] for run in of_format) for key in rate}
        ratios[name] = times["all_cores_s"]
        loads[name] = times["load_s"]
        ours = [f"{rate[key]:.2f} ({times[key]:.1f})" for key in ("load_s", "one_thread_s", "all_cores_s")]
        equal = all(run["equal"] for run in of_format)
        table.add_row(name, f"{rate['gguf_py_s']:.2f}", *ours, "equal" if equal else "DIFFER")
    Console(width=100).print(table)
    goals = []
    for what, times_of in (("all cores, touched memory", ratios), ("load, fresh memory", loads)):
        figure, slowest = min((times, name) for name, times in times_of.items())
        goals.append(harness.at_least(f"{what} / gguf-py, slowest of {len(runs)} formats ({slowest})", figure, 5))
    differ = [name for name, of_format in runs.items() if not all(run["equal"] for run in of_format)]
    goals.append(f"DIFFER  {', '.join(differ)}" if differ else "equal   floats of all formats, bit by bit")
    print("\n".join(goals))
    return goals


def peak_child(path: Path, peer: str, dtype: str) -> None:
    """Load the model once and watch memory; print a line of JSON."""
    import_everything(path, peer)
    before = harness.anonymous_bytes()
    watch = harness.AnonymousPeak()
    if peer == "loadstone":
        import loadstone

        model = loadstone.load(path, dtype=dtype)
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    print(json.dumps({"peak_bytes": watch.peak_bytes - before, "weights_bytes": sum(weights.values())}))


def report_peaks(runs: dict[str, dict[str, list[dict[str, Any]]]]) -> list[str]:
    """The table of peaks, printed, and how they stand beside the weights."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="peak anonymous memory added by the load, MB, medians; in brackets times the weights")
    for column in ("dtype", "weights", *next(iter(runs.values()))):
        table.add_column(column)
    lines = []
    for dtype, of_dtype in runs.items():
        weights = harness.median(of_dtype["loadstone"], "weights_bytes")
        peaks = {peer: harness.median(of_peer, "peak_bytes") for peer, of_peer in of_dtype.items()}
        cells = [f"{peak / 1e6:.0f} ({peak / weights:.2f})" for peak in peaks.values()]
        table.add_row(dtype, f"{weights / 1e6:.0f}", *cells)
        lines += [f"{dtype}: {peer} peaks at {peak / weights:.2f} times the weights" for peer, peak in peaks.items()]
    Console(width=100).print(table)
    return lines


def installed(peers: Sequence[str]) -> list[str]:
    """The peers that can run here."""
    needs = {"transformers": ("transformers", "accelerate")}
    missing = {peer: [name for name in needs.get(peer, (peer,)) if util.find_spec(name) is None] for peer in peers}
    for peer, names in missing.items():
        if names:
            print(f"{peer} is left out: {', '.join(names)} is not installed", file=sys.stderr)
    return [peer for peer in peers if not missing[peer]]


def saved_results() -> dict[str, Any]:
    """What earlier runs have left."""
    saved = harness.RESULTS / "gguf.json"
    return json.loads(saved.read_text()) if saved.exists() else {}


def run_load(arguments: argparse.Namespace) -> dict[str, Any]:
    """The part `load`."""

    def run(peer: str) -> dict[str, Any]:
        return harness.run_child(__file__, str(arguments.path), "--peer", peer, "--dtype", arguments.dtype)

    runs = harness.in_turn(installed(arguments.peers.split(",")), arguments.repeats, run)
    return {"file": arguments.path.name, "dtype": arguments.dtype, "goals": report(runs), "peers": runs}


def run_formats(arguments: argparse.Namespace) -> dict[str, Any]:
    """The part `formats`; of the formats that are not asked for, the saved runs are kept."""
    asked = arguments.formats.split(",") if arguments.formats else formats_of_gguf_py()
    fresh = harness.in_turn(asked, arguments.repeats, lambda name: harness.run_child(__file__, "--format", name))
    runs = saved_results().get("formats", {}).get("runs", {}) | fresh
    return {"formats": {"goals": report_formats(runs), "runs": runs}}


def run_peaks(arguments: argparse.Namespace) -> dict[str, Any]:
    """The part `peaks`."""
    runs = {}
    for dtype in PEAK_DTYPES:

        def run(peer: str, dtype: str = dtype) -> dict[str, Any]:
            return harness.run_child(__file__, str(arguments.path), "--peak", peer, "--dtype", dtype)

        runs[dtype] = harness.in_turn(installed(("loadstone", "transformers")), arguments.repeats, run)
    return {"peaks": {"figures": report_peaks(runs), "runs": runs}}


RUN = {"load": run_load, "formats": run_formats, "peaks": run_peaks}


def main() -> None:
    """Run the parts asked for; results of the others are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", help="a GGUF file (the demo model)")
    parser.add_argument("--part", choices=PARTS, action="append", help="what to measure (everything)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--formats", help="only these, with commas between (all)")
    for child_of in ("--peer", "--format", "--peak"):
        parser.add_argument(child_of, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.format:
        format_child(arguments.format)
        return
    parts = arguments.part or PARTS
    if arguments.path is None and set(parts) != {"formats"}:
        from loadstone.checkpoint.demo import demo_model

        arguments.path = demo_model()
    if arguments.path is not None:
        arguments.path = arguments.path.resolve()
    if arguments.peer:
        child(arguments)
        return
    if arguments.peak:
        peak_child(arguments.path, arguments.peak, arguments.dtype)
        return
    if arguments.path is not None:
        harness.warm_caches([arguments.path])
    content = saved_results()
    content.pop("machine", None)
    for part in parts:
        content |= RUN[part](arguments)
    print(f"written to {harness.save('gguf', content)}")


if __name__ == "__main__":
    main()
