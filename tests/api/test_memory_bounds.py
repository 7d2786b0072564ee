"""The memory of a load stays under the bound computed from the headers, on every way through the engine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from gguf_builders import Gguf, Stored

ROWS, COLUMNS, LAYERS = 4096, 2048, 4

# Each case in a process of its own kind: everything imported, then one load after the other, smallest expected first.
_CHILD = """
import gc, json, sys
import torch
import loadstone, loadstone.api.assemble
from loadstone.hardware.memory import PeakWatch, resident

class Holder(torch.nn.Module):
    def __init__(self, rows, columns, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(columns, rows, bias=False) for _ in range(layers))

for case in json.loads(sys.argv[1]):
    gc.collect()
    before = resident().anonymous_bytes
    with PeakWatch() as watch:
        model = loadstone.load(
            case["path"], dtype=case["dtype"], into=Holder, config=case["config"], rename=case["rename"]
        )
    foretold = loadstone.of(model).report.foretold
    dtypes = {str(parameter.dtype) for parameter in model.parameters()}
    print(json.dumps({
        "case": case["name"], "peak": watch.peak.anonymous_bytes - before, "bound": foretold.anonymous_bytes,
        "weights": foretold.weight_bytes, "mapped": foretold.mapped_bytes, "dtypes": sorted(dtypes),
    }))
    del model
"""


def names() -> list[str]:
    return [f"layers.{index}.weight" for index in range(LAYERS)]


def write_safetensors(folder: Path, dtype: torch.dtype) -> Path:
    path = folder / f"{str(dtype).removeprefix('torch.')}.safetensors"
    save_file({name: torch.zeros(ROWS, COLUMNS, dtype=dtype) for name in names()}, path)
    return path


def write_askew(folder: Path) -> Path:
    """The same with data that begins at an odd offset."""
    path = write_safetensors(folder, torch.bfloat16)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    askew = folder / "askew.safetensors"
    askew.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :])
    return askew


def write_pickle(folder: Path, *, transposed: bool) -> Path:
    path = folder / f"{'transposed' if transposed else 'plain'}.bin"
    shape = (COLUMNS, ROWS) if transposed else (ROWS, COLUMNS)
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name in names()}
    torch.save({name: tensor.T if transposed else tensor for name, tensor in tensors.items()}, path)
    return path


def write_gguf(folder: Path) -> Path:
    path = folder / "blocks.gguf"
    tensors = {f"blk.{index}.weight": Stored(shape=(ROWS, COLUMNS), code=8) for index in range(LAYERS)}
    Gguf(tensors=tensors).write(path)
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bounds")
    bfloat16 = write_safetensors(folder, torch.bfloat16)
    sources = {
        "map": (bfloat16, "auto"),
        "askew": (write_askew(folder), "auto"),
        "cast to float32": (bfloat16, "float32"),
        "cast to float16": (bfloat16, "float16"),
        "cast by torch": (bfloat16, "float64"),
        "pickle": (write_pickle(folder, transposed=False), "auto"),
        "pickle cast": (write_pickle(folder, transposed=False), "float32"),
        "pickle of views": (write_pickle(folder, transposed=True), "auto"),
        "GGUF to float32": (write_gguf(folder), "float32"),
        "GGUF to bfloat16": (write_gguf(folder), "bfloat16"),
    }
    cases = [
        {
            "name": name,
            "path": str(path),
            "dtype": dtype,
            "config": {"rows": ROWS, "columns": COLUMNS, "layers": LAYERS},
            "rename": {"blk": "layers"},
        }
        for name, (path, dtype) in sources.items()
    ]
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps(cases)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for path, _ in sources.values():
        path.unlink(missing_ok=True)
    return {row["case"]: row for row in map(json.loads, done.stdout.splitlines())}


NBYTES = ROWS * COLUMNS * LAYERS
WEIGHTS = {
    "map": 0,
    "askew": 2 * NBYTES,
    "cast to float32": 4 * NBYTES,
    "cast to float16": 2 * NBYTES,
    "cast by torch": 8 * NBYTES,
    "pickle": 0,
    "pickle cast": 4 * NBYTES,
    "pickle of views": 2 * NBYTES,
    "GGUF to float32": 4 * NBYTES,
    "GGUF to bfloat16": 2 * NBYTES,
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_load_stays_under_its_bound_and_the_bound_is_near(measured: dict[str, Any], case: str) -> None:
    row = measured[case]
    assert row["weights"] == WEIGHTS[case]
    assert row["weights"] <= row["peak"] + 1_000_000, "the weights themselves must have been there"
    assert row["peak"] <= row["bound"]
    # Fixed buffers, and one tensor more on the ways where torch gathers it.
    assert row["bound"] <= row["weights"] + 64_000_000 + 12_000 * LAYERS + 8 * NBYTES // LAYERS
