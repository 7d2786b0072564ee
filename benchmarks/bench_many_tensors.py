"""What does a tensor cost? A small mixture of experts in 18,867 tensors, loaded by Loadstone and by transformers.

Imports are done before the clock starts; the page cache is warm; each load has a fresh process.

    python benchmarks/bench_many_tensors.py --repeats 5
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import make_checkpoint

GOAL = 0.3


def child(peer: str, folder: Path) -> None:
    """Load once and print a line of JSON."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM  # noqa: F401

    import loadstone
    import loadstone.api.assemble
    import loadstone.architecture.transformers_model

    begin = time.perf_counter()
    if peer == "loadstone":
        model = loadstone.load(folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    seconds = time.perf_counter() - begin
    with torch.inference_mode():
        logits = model(torch.arange(32)[None]).logits
    print(json.dumps({"load_s": seconds, "logits": harness.digest(logits)}))


def main() -> None:
    """Run both in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "loadstone-bench" / "many-tensors")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.folder)
        return
    make_checkpoint.write("qwen3-moe-many-tensors", arguments.folder)
    harness.warm_caches(arguments.folder.glob("*.safetensors"))

    def run(peer: str) -> dict[str, Any]:
        return harness.run_child(__file__, "--child", peer, "--folder", str(arguments.folder))

    runs = harness.in_turn(["loadstone", "transformers"], arguments.repeats, run)
    for peer, of_peer in runs.items():
        print(f"{peer:14} {harness.median(of_peer, 'load_s'):.3f} s")
    equal = len({result["logits"] for of_peer in runs.values() for result in of_peer}) == 1
    ratio = harness.median_ratio(runs["loadstone"], runs["transformers"], "load_s")
    goals = [
        harness.verdict("load / transformers", ratio, GOAL),
        f"{'equal' if equal else 'DIFFER'}  logits, bit by bit",
    ]
    print("\n".join(goals))
    print(f"written to {harness.save('many_tensors', {'goals': goals, 'runs': runs})}")


if __name__ == "__main__":
    main()
