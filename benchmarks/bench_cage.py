"""What happens when a model is larger than the memory that its process may use?

A checkpoint of TinyLlama's geometry (2.2 GB of bfloat16, with a small tokenizer, and as a GGUF of Q8_0 blocks) is run
in a memory cgroup of 900 MB, by Loadstone and by transformers: as stored, cast to float32, and from the GGUF. The table
says how each run ended, when its first token came and how long the others took, and the most the group used.

    python benchmarks/bench_cage.py /tmp/cage                     # `loadstone run`, with no options at all
    python benchmarks/bench_cage.py /tmp/cage --through api       # with all blocks, the head and the embedding streamed

The imports alone are measured too: what is anonymous stays, what is file-backed must stay hot.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import harness
import make_checkpoint
from cage import Cage, Caged, NoCage

GEOMETRY = "tinyllama-1.1b"
PROMPT = "a b c d e f g h"
CASES = ("bfloat16", "float32", "gguf")
PEERS = ("loadstone", "transformers")
_WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]


def write_all(folder: Path) -> dict[str, Path]:
    """Write the checkpoint, its tokenizer and its GGUF, once.

    Returns:
        The source of each case.
    """
    checkpoint = make_checkpoint.write(GEOMETRY, folder / GEOMETRY)
    if not (checkpoint / "tokenizer.json").exists():
        _write_tokenizer(checkpoint)
    gguf = folder / "gguf" / f"{GEOMETRY}.Q8_0.gguf"
    if not gguf.exists():
        gguf.parent.mkdir(exist_ok=True)
        part = gguf.with_suffix(".part")
        _write_gguf(checkpoint, part)
        part.rename(gguf)
    return {"bfloat16": checkpoint, "float32": checkpoint, "gguf": gguf}


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(_WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def _write_gguf(checkpoint: Path, path: Path) -> None:
    import gguf
    import numpy as np
    from safetensors import safe_open

    settings = make_checkpoint.GEOMETRIES[GEOMETRY]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, int(str(settings["num_hidden_layers"])))
    writer = gguf.GGUFWriter(path, "llama")
    for add, field in (
        (writer.add_context_length, "max_position_embeddings"),
        (writer.add_block_count, "num_hidden_layers"),
        (writer.add_embedding_length, "hidden_size"),
        (writer.add_feed_forward_length, "intermediate_size"),
        (writer.add_head_count, "num_attention_heads"),
        (writer.add_head_count_kv, "num_key_value_heads"),
        (writer.add_layer_norm_rms_eps, "rms_norm_eps"),
        (writer.add_vocab_size, "vocab_size"),
    ):
        add(settings[field])
    writer.add_rope_dimension_count(64)
    _add_vocabulary(writer, int(str(settings["vocab_size"])))
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                values = file.get_tensor(name).float().numpy()
                stem, _, suffix = name.rpartition(".")
                raw = values if values.ndim == 1 else gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
                kind = None if values.ndim == 1 else gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(raw), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: Any, num_words: int) -> None:
    words = [*_WORDS, "ab"]
    words += [f"<filler_{number}>" for number in range(len(words), num_words)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3, *[1] * (len(words) - 3)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


class Clock:
    """Receives tokens from `generate()` and prints a line of JSON for each, which a process that is killed has told."""

    def __init__(self) -> None:
        self._num_tokens = -1  # the prompt comes first

    def put(self, value: Any) -> None:
        """Take the prompt or a token."""
        self._num_tokens += 1
        if self._num_tokens:
            print(json.dumps({"token": self._num_tokens, "at_s": harness.since_process_start()}), flush=True)

    def end(self) -> None:
        """Nothing is left over."""


def run_loadstone(path: Path, case: str, num_tokens: int) -> dict[str, Any]:
    """In the cage: load with everything but the last norm streamed, and generate."""
    import torch

    import loadstone
    from loadstone.api.begun import Request
    from loadstone.api.load import carry_out
    from loadstone.execute.values import Streaming

    layers = int(str(make_checkpoint.GEOMETRIES[GEOMETRY]["num_hidden_layers"]))
    units = ("model.embed_tokens", *(f"model.layers.{number}" for number in range(layers)), "lm_head")
    streaming = Streaming(units=units, num_slots=2, tensors=_names(path, units))
    model: Any = carry_out(Request(source=path, dtype="float32" if case == "float32" else None, streaming=streaming))
    loaded_s = harness.since_process_start()
    tokens = loadstone.load_tokenizer(path)(PROMPT, return_tensors="pt", return_token_type_ids=False)
    before = loadstone.of(model).stats()
    with torch.inference_mode():
        model.generate(**tokens, **_options(num_tokens))
    after = loadstone.of(model).stats()
    if before is None or after is None:
        raise SystemExit("nothing was streamed")
    return {"loaded_s": loaded_s, "stall_s": after.stall_s, "pass_bytes": after.pass_bytes, "passes": after.passes}


def _names(path: Path, units: tuple[str, ...]) -> frozenset[str]:
    """The checkpoint's names of what is streamed."""
    from loadstone.checkpoint.open import open_checkpoint

    if path.suffix == ".gguf":
        return frozenset(name for name in open_checkpoint(path).tensors if not name.startswith("output_norm"))
    starts = tuple(f"{unit}." for unit in units)
    return frozenset(name for name in open_checkpoint(path).tensors if name.startswith(starts))


def run_transformers(path: Path, case: str, num_tokens: int) -> dict[str, Any]:
    """In the cage: `from_pretrained` and `generate`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = (path.parent, {"gguf_file": path.name}) if case == "gguf" else (path, {})
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **file).eval()
    loaded_s = harness.since_process_start()
    tokens = AutoTokenizer.from_pretrained(folder, **file)(PROMPT, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        model.generate(**tokens, **_options(num_tokens))
    return {"loaded_s": loaded_s}


def _options(num_tokens: int) -> dict[str, Any]:
    return {
        "min_new_tokens": num_tokens,
        "max_new_tokens": num_tokens,
        "do_sample": False,
        "pad_token_id": 0,
        "streamer": Clock(),
    }


def run_imports(path: Path, case: str, num_tokens: int) -> dict[str, Any]:
    """In the cage: what a load imports, and a first operation."""
    del path, case, num_tokens
    import torch
    from transformers import PreTrainedTokenizerFast
    from transformers.models.llama import modeling_llama

    import loadstone.api.assemble
    import loadstone.architecture.transformers_model
    import loadstone.execute.generate
    from loadstone.hardware.memory import resident

    del PreTrainedTokenizerFast, modeling_llama, loadstone
    torch.nn.Linear(64, 64)(torch.ones(2, 64))
    now = resident()
    return {"anonymous_bytes": now.anonymous_bytes, "file_bytes": now.file_bytes}


CHILDREN = {"loadstone": run_loadstone, "transformers": run_transformers, "imports": run_imports}


def measure(cage: Cage, peer: str, case: str, path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one peer on one case in the cage.

    Returns:
        How it ended, and what it told before.
    """
    child = [__file__, str(arguments.folder), "--child", peer, "--case", case, "--path", str(path)]
    command = [sys.executable, *child, "--tokens", str(arguments.tokens)]
    if peer == "loadstone" and arguments.through == "run":
        command = [sys.executable, "-m", "loadstone", "run", str(path), PROMPT, "--json"]
        command += ["--max-new-tokens", str(arguments.tokens), *(["--dtype", "float32"] if case == "float32" else [])]
    environment = harness.child_environment()
    if harness.can_drop_caches() and not arguments.keep_caches:
        harness.drop_caches()
    else:
        harness.drop_files(path.parent.glob("*") if path.is_file() else path.glob("*"))
    caged = cage.run(command, timeout_s=arguments.timeout, environment=environment)
    row: dict[str, Any] = {
        "peer": peer,
        "case": case,
        "outcome": caged.outcome,
        "seconds": caged.seconds,
        "peak_bytes": caged.peak_bytes,
        "anonymous_peak_bytes": caged.anonymous_bytes,
        **_told(caged),
    }
    if caged.outcome.startswith("failed"):
        row["error"] = caged.stderr[-2000:]
    harness.tell_row(f"{peer}, {case}", row)
    return row


def _told(caged: Caged) -> dict[str, Any]:
    """What the child has said: lines with tokens, and a result at the end, or the JSON of `loadstone run`."""
    if caged.stdout.lstrip().startswith("{\n"):
        told = json.loads(caged.stdout)
        per_token = 1 / told["tokens_per_s"] if told["tokens_per_s"] else None
        return {
            "loaded_s": told["load_s"],
            "first_token_s": told["load_s"] + told["first_token_s"],
            "token_s": per_token,
        }
    lines = [json.loads(line) for line in caged.stdout.splitlines() if re.match(r"\{.*\}$", line)]
    times = [line["at_s"] for line in lines if "token" in line]
    result: dict[str, Any] = next((line for line in lines if "token" not in line), {})
    result["num_tokens"] = len(times)
    if times:
        result["first_token_s"] = times[0]
    if len(times) > 1:
        result["token_s"] = (times[-1] - times[0]) / (len(times) - 1)
    return result


def disk_rate(path: Path, num_bytes: int = 1 << 30) -> float:
    """How fast the file can be read past the page cache, by Loadstone's reader with nothing to do on the way."""
    from loadstone.hardware.pages import anonymous
    from loadstone.stream.read import Reader
    from loadstone.stream.source import OpenFiles, streaming_manners
    from loadstone.stream.spans import Fill, prepare

    nbytes = min(num_bytes, path.stat().st_size) // 4096 * 4096
    data = anonymous(min(nbytes, 128 << 20))
    step = data.size
    fills = [
        Fill(file=path, offset=begin, nbytes=min(step, nbytes - begin), destination=data[: min(step, nbytes - begin)])
        for begin in range(0, nbytes, step)
    ]
    files, reader = OpenFiles(streaming_manners([path])), Reader()
    rates = []
    for _ in range(3):
        begin_s = time.perf_counter()
        reader.repeat(prepare(fills), files).wait()
        rates.append(nbytes / (time.perf_counter() - begin_s))
    reader.close()
    files.close()
    return max(rates)


def draw(rows: list[dict[str, Any]], rate: float) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"in the cage; the disk reads {rate / 1e9:.2f} GB/s past the page cache")
    for column in ("case", "peer", "outcome", "first token", "s/token", "disk alone", "peak", "anonymous"):
        table.add_column(column, justify="left" if column in ("case", "peer", "outcome") else "right")
    for row in rows:
        alone = row["pass_bytes"] / rate if "pass_bytes" in row else None
        seconds = (row.get("first_token_s"), row.get("token_s"), alone)
        table.add_row(
            row["case"],
            row["peer"],
            row["outcome"],
            *("" if value is None else f"{value:.2f}" for value in seconds),
            *(f"{row[key] / 1e6:.0f} MB" for key in ("peak_bytes", "anonymous_peak_bytes")),
        )
    Console(width=110).print(table)


def child(arguments: argparse.Namespace) -> None:
    """Run one peer; print lines of JSON."""
    result = CHILDREN[arguments.child](arguments.path, arguments.case, arguments.tokens)
    print(json.dumps(result), flush=True)


def main() -> None:
    """Run every peer on every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoints are, or are written to (4 GB)")
    parser.add_argument("--memory", type=int, default=900_000_000, help="bytes the group may use")
    parser.add_argument("--through", choices=("run", "api"), default="run")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a run may take")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--keep-caches", action="store_true", help="drop only the checkpoint from the page cache")
    parser.add_argument("--child", choices=sorted(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    paths = write_all(arguments.folder)
    rate = disk_rate(sorted(paths["bfloat16"].glob("*.safetensors"))[0])
    try:
        with Cage(arguments.memory) as cage:
            imports = measure(cage, "imports", "", arguments.folder, arguments)
            rows = [
                measure(cage, peer, case, paths[case], arguments)
                for case in arguments.cases.split(",")
                for peer in arguments.peers.split(",")
            ]
    except NoCage as reason:
        raise SystemExit(f"no memory cgroup can be made here: {reason}") from None
    draw(rows, rate)
    content = {"memory_bytes": arguments.memory, "through": arguments.through, "disk_bytes_per_s": rate}
    print(f"written to {harness.save('cage', {**content, 'imports': imports, 'runs': rows})}")


if __name__ == "__main__":
    main()
