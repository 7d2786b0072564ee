"""How fast do the bytes of a checkpoint arrive in memory, beside the best that this disk and memory give?

Two questions, each with a cold and a warm page cache, on a 3.1 GB checkpoint of four shards:

- `touched`: all bytes into memory that was touched before. Loadstone's reader beside a plain preadv loop, whose mode
  (through or past the page cache), number of threads and chunk size are searched first; the three best settings run in
  turn with the reader.
- `tensors`: from nothing to tensors whose every page was touched, in fresh processes that have imported everything:
  what `load` does beside safetensors, runai-model-streamer, fastsafetensors and tensorizer, those that are installed;
  and the reader into fresh memory, as for what cannot be mapped. tensorizer reads a file of its own format, written
  for it before.

    python benchmarks/bench_read.py --repeats 5
    python benchmarks/bench_read.py --question tensors --heat warm
"""

from __future__ import annotations

import argparse
import importlib.util
import json
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
from loadstone.api.pause import paused_gc
from loadstone.checkpoint.open import open_checkpoint
from loadstone.events import ignore
from loadstone.hardware.pages import anonymous
from loadstone.stream.host import Ahead
from loadstone.stream.materialize import as_tensor
from loadstone.stream.read import Reader
from loadstone.stream.spans import Fill

THREADS = (1, 2, 4, 8, 16)
CHUNKS = (1 << 20, 4 << 20, 16 << 20)
NUM_BEST = 3
QUESTIONS, HEATS = ("tensors", "touched"), ("cold", "warm")
PEERS = ("loadstone", "loadstone_reader", "safetensors", "runai_model_streamer", "fastsafetensors", "tensorizer")


def raw_read(files: list[Path], into: Any, *, direct: bool, threads: int, chunk: int) -> None:
    """A plain preadv loop: chunks of all files, taken in turn by the threads; direct reads go to aligned addresses."""
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
    descriptors = [os.open(path, flags) for path in files]
    pieces = iter(_pieces(files, chunk))
    lock, failed = threading.Lock(), []

    def work() -> None:
        while True:
            with lock:
                piece = next(pieces, None)
            if piece is None:
                return
            index, offset, nbytes, place = piece
            done = 0
            while done < nbytes:
                # Past the end of a file a whole block may be asked for; there is room for it.
                room = -(-(nbytes - done) // 4096) * 4096 if direct else nbytes - done
                count = os.preadv(descriptors[index], [into[place + done : place + done + room]], offset + done)
                if count <= 0:
                    failed.append(piece)
                    return
                done += count

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for descriptor in descriptors:
        os.close(descriptor)
    if failed:
        raise SystemExit(f"the raw loop met the end of a file: {failed[0]}")


def _pieces(files: list[Path], chunk: int) -> Iterator[tuple[int, int, int, int]]:
    place = 0
    for index, path in enumerate(files):
        nbytes = path.stat().st_size
        for offset in range(0, nbytes, chunk):
            yield index, offset, min(chunk, nbytes - offset), place + offset
        place += -(-nbytes // 4096) * 4096


def our_read(files: list[Path], into: Any) -> None:
    """The same bytes through Loadstone's reader."""
    destination, place, fills = np.frombuffer(into, np.uint8), 0, []
    for path in files:
        nbytes = path.stat().st_size
        fills.append(
            Fill(file=path, offset=0, nbytes=nbytes, destination=destination[place : place + nbytes], fresh=False)
        )
        place += -(-nbytes // 4096) * 4096
    reader = Reader()
    reader.submit(fills).wait()
    reader.close()


def touched(files: list[Path], cold: bool, repeats: int) -> dict[str, Any]:
    """In a child: the reader beside the best of the plain loop, into memory that was touched."""
    total = sum(path.stat().st_size for path in files)
    memory = anonymous(sum(-(-path.stat().st_size // 4096) * 4096 for path in files))
    memory[:] = 1
    into = memory.data

    def rate(run: Any) -> float:
        if cold:
            harness.drop_caches()
        else:
            harness.warm_caches(files)
        begin = time.perf_counter()
        run()
        return total / (time.perf_counter() - begin)

    settings = [
        {"direct": direct, "threads": threads, "chunk": chunk}
        for direct in ((False, True) if cold else (False,))
        for threads in THREADS
        for chunk in CHUNKS
    ]
    searched = [(rate(lambda s=s: raw_read(files, into, **s)), s) for s in settings]
    searched.sort(key=lambda found: -found[0])
    best = [setting for _, setting in searched[:NUM_BEST]]
    rounds = []
    for _ in range(repeats):
        ours = [rate(lambda: our_read(files, into))]
        theirs = []
        for setting in best:
            theirs.append(rate(lambda s=setting: raw_read(files, into, **s)))
            ours.append(rate(lambda: our_read(files, into)))
        # The best of as many runs of ours as of the loop, so that neither gains by being tried more often.
        rounds.append({"ours": max(ours[:NUM_BEST]), "raw": max(theirs), "every_ours": ours, "every_raw": theirs})
    return {"searched": [[figure, setting] for figure, setting in searched], "best": best, "rounds": rounds}


@paused_gc()
def read_loadstone(files: list[Path]) -> list[Any]:
    """As `load` does it for tensors that stay as stored: maps, brought in by threads of their own.

    `load` makes its objects without the garbage collector, of which one pass takes 80 ms where torch is imported.
    """
    checkpoint, ahead = open_checkpoint(files), Ahead(ignore)
    ahead.begin(checkpoint, lambda info: info.dtype, decode=True)
    ahead.wait()
    ahead.wait_for_pages()
    ahead.close()
    return [as_tensor(ahead.maps.bytes_of(info), info.dtype, info.shape) for info in checkpoint.tensors.values()]


def read_loadstone_reader(files: list[Path]) -> list[Any]:
    """As for what cannot be mapped: through the reader into fresh memory of its own."""
    checkpoint, reader = open_checkpoint(files), Reader()
    places = {file.path: anonymous(file.nbytes) for file in checkpoint.files}
    fills = [
        Fill(file=file.path, offset=0, nbytes=file.nbytes, destination=places[file.path]) for file in checkpoint.files
    ]
    reader.submit(fills).wait()
    reader.close()
    return [
        as_tensor(places[info.file][info.offset : info.offset + info.nbytes], info.dtype, info.shape)
        for info in checkpoint.tensors.values()
    ]


def read_safetensors(files: list[Path]) -> list[Any]:
    """`safetensors.torch.load_file`, a map whose pages are touched below."""
    from safetensors.torch import load_file

    return [tensor for path in files for tensor in load_file(path).values()]


def read_runai_model_streamer(files: list[Path]) -> list[Any]:
    """`SafetensorsStreamer`, with its own choice of threads."""
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path) for path in files])
        return [tensor for _, tensor in streamer.get_tensors()]


def read_fastsafetensors(files: list[Path]) -> list[Any]:
    """`SafeTensorsFileLoader` to the CPU, without GPUDirect."""
    import torch
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), torch.device("cpu"), nogds=True)
    loader.add_filenames({0: [str(path) for path in files]})
    buffers = loader.copy_files_to_device()
    return [buffers.get_tensor(name) for name in loader.get_keys()]


def read_tensorizer(files: list[Path]) -> list[Any]:
    """`TensorDeserializer` of a file in its own format."""
    from tensorizer import TensorDeserializer

    return [t for path in files for t in TensorDeserializer(str(_tensorized(path)), device="cpu").values()]


def _tensorized(path: Path) -> Path:
    return path.parent / "tensorized" / f"{path.stem}.tensors"


def write_tensorized(files: list[Path]) -> None:
    """The checkpoint in tensorizer's format, once."""
    from safetensors.torch import load_file
    from tensorizer import TensorSerializer

    for path in files:
        if not _tensorized(path).exists():
            _tensorized(path).parent.mkdir(exist_ok=True)
            serializer = TensorSerializer(str(_tensorized(path)))
            serializer.write_state_dict(load_file(path))
            serializer.close()


def tensors(files: list[Path], peer: str) -> dict[str, Any]:
    """In a child: from nothing to tensors whose pages were all touched."""
    import torch

    if not peer.startswith("loadstone"):
        importlib.import_module("safetensors.torch" if peer == "safetensors" else peer)
    peak = harness.AnonymousPeak()
    begin = time.perf_counter()
    made = globals()[f"read_{peer}"](files)
    for tensor in made:
        tensor.view(-1).view(torch.uint8)[::4096].max()
    seconds = time.perf_counter() - begin
    peak_bytes, nbytes = peak.peak_bytes, sum(tensor.nbytes for tensor in made)
    checksum = sum(int(tensor.view(-1).view(torch.int16).sum(dtype=torch.int64)) for tensor in made)
    return {"rate": nbytes / seconds / 1e9, "seconds": seconds, "peak_bytes": peak_bytes, "checksum": checksum}


def report(results: dict[str, Any]) -> list[str]:
    """The tables, printed, and the goals."""
    goals = []
    for heat, found in results["touched"].items():
        print(f"\ninto touched memory, {heat}; the plain loop's best settings:")
        for figure, setting in found["searched"][:5]:
            print(f"  {figure / 1e9:.2f} GB/s  {setting}")
        ratio = harness.median([{"ratio": one["ours"] / one["raw"]} for one in found["rounds"]], "ratio")
        for who in ("ours", "raw"):
            print(f"  {who}: {harness.median(found['rounds'], who) / 1e9:.2f} GB/s")
        goals.append(harness.at_least(f"touched, {heat}: reader / best plain loop", ratio, 0.95))
    for heat, runs in results["tensors"].items():
        print(f"\nto tensors, {heat}:")
        for peer, of_peer in runs.items():
            print(
                f"  {peer}: {harness.median(of_peer, 'rate'):.2f} GB/s, "
                f"peak {harness.median(of_peer, 'peak_bytes') / 1e9:.2f} GB anonymous"
            )
            if not peer.startswith("loadstone"):
                ratio = harness.median_ratio(runs["loadstone"], of_peer, "rate")
                goals.append(harness.at_least(f"tensors, {heat}: reader / {peer}", ratio, 1.0))
        if len({run["checksum"] for of_peer in runs.values() for run in of_peer}) > 1:
            goals.append(f"DIFFER  tensors, {heat}: not all read the same bytes")
    print("\n".join(["", *goals]))
    return goals


def measure(files: list[Path], arguments: argparse.Namespace) -> dict[str, Any]:
    """What is asked for; results of the rest are kept."""
    peers = [peer for peer in arguments.peers.split(",") if importlib.util.find_spec(peer.split("_reader")[0])]
    if "tensorizer" in peers:
        write_tensorized(files)
    saved = harness.RESULTS / "read.json"
    content = json.loads(saved.read_text()) if saved.exists() else {}
    results: dict[str, Any] = {question: content.get(question, {}) for question in QUESTIONS}
    questions = arguments.question or QUESTIONS
    common = ["--folder", str(arguments.folder), "--repeats", str(arguments.repeats)]
    for heat in arguments.heat or (HEATS if harness.can_drop_caches() else ("warm",)):
        flags = [*common, "--cold"] if heat == "cold" else common

        def run(peer: str, heat: str = heat, flags: list[str] = flags) -> dict[str, Any]:
            if heat == "cold":
                harness.drop_caches()
            else:
                harness.warm_caches([_tensorized(path) for path in files] if peer == "tensorizer" else files)
            return harness.run_child(__file__, "--child", peer, *flags)

        if "tensors" in questions:
            print(f"to tensors, {heat}", flush=True)
            results["tensors"][heat] = harness.in_turn(peers, arguments.repeats, run)
        if "touched" in questions:
            print(f"into touched memory, {heat}", flush=True)
            results["touched"][heat] = harness.run_child(__file__, "--child", "touched", *flags)
    return results


def main() -> None:
    """Run both questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "loadstone-bench" / "qwen2.5-1.5b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--question", choices=QUESTIONS, action="append", help="what to measure (both)")
    parser.add_argument("--heat", choices=HEATS, action="append", help="with which page cache (both)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    files = sorted(arguments.folder.glob("*.safetensors"))
    if arguments.child == "touched":
        print(json.dumps(touched(files, arguments.cold, arguments.repeats)))
        return
    if arguments.child:
        print(json.dumps(tensors(files, arguments.child)))
        return
    make_checkpoint.write("qwen2.5-1.5b", arguments.folder)
    files = sorted(arguments.folder.glob("*.safetensors"))
    results = measure(files, arguments)
    goals = report(results)
    print(f"written to {harness.save('read', {'goals': goals, **results})}")


if __name__ == "__main__":
    main()
