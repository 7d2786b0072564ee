"""Decoding a GGUF file takes the memory of the weights and little more; measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gguf_builders import Gguf, Stored
from loadstone.dtypes import GGML_BLOCKS

# A staging buffer, a strip between two kernels and the strips of bytes and indices that a decoder makes, per thread.
THREAD_BYTES = 6 << 20
MOST_THREADS = 8

CHILD = """
import sys, threading, time
from pathlib import Path
from loadstone.checkpoint.open import open_checkpoint
from loadstone.events import ignore
from loadstone.stream.host import Ahead

def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def watch():
    while not done:
        peaks.append(anonymous())
        time.sleep(0.002)

path, dtype = sys.argv[1:]
checkpoint = open_checkpoint(path)
done, peaks = False, [anonymous()]
before = peaks[0]
thread = threading.Thread(target=watch)
thread.start()
ahead = Ahead(ignore)
ahead.begin(checkpoint, lambda info: dtype, decode=True)
ahead.wait()
peaks.append(anonymous())
done = True
thread.join()
print(max(peaks) - before, sum(decoded.data.nbytes for decoded in ahead.decoded.values()))
ahead.close()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon of Linux")
@pytest.mark.parametrize(("name", "dtype"), [("Q8_0", "float32"), ("IQ2_XS", "bfloat16")])
def test_a_gguf_file_is_decoded_in_the_memory_of_its_weights(tmp_path: Path, name: str, dtype: str) -> None:
    block = next(block for block in GGML_BLOCKS.values() if block.name == name)
    # One tensor that is most of the file, and many small ones.
    large = np.random.default_rng(0).integers(0, 256, (48 << 20) // block.block_nbytes * block.block_nbytes, np.uint8)
    small = large[: (1 << 20) // block.block_nbytes * block.block_nbytes]
    tensors = {f"small.{number}": small for number in range(16)} | {"large": large}
    stored = {
        key: Stored((data.size // block.block_nbytes, block.block_numel), block.code, data.tobytes())
        for key, data in tensors.items()
    }
    path = Gguf(tensors=stored).write(tmp_path / "model.gguf")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), dtype], capture_output=True, text=True, check=True, env=environment
    )
    peak_bytes, weights_bytes = map(int, done.stdout.split())
    elements = sum(data.size // block.block_nbytes * block.block_numel for data in tensors.values())
    assert weights_bytes == elements * {"float32": 4, "bfloat16": 2}[dtype]
    assert weights_bytes <= peak_bytes <= weights_bytes + MOST_THREADS * THREAD_BYTES
