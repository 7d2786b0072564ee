import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from loadstone.checkpoint.values import Checkpoint, CheckpointFile, Format, TensorInfo
from loadstone.report.inspection import inspect_checkpoint, render, to_json

SNAPSHOT = Path(__file__).with_name("inspection_at_66_columns.txt")


@pytest.fixture
def checkpoint() -> Checkpoint:
    names = {
        "model.embed_tokens.weight": (4, 3),
        "model.layers.0.mlp.up.weight": (2, 3),
        "model.layers.1.mlp.up.weight": (2, 3),
        "model.norm.weight": (6,),
        "lm_head.weight": (4, 3),
    }
    tensors, offset = {}, 16
    for name, shape in names.items():
        numel = shape[0] * (shape[1] if len(shape) > 1 else 1)
        tensors[name] = TensorInfo(
            name=name,
            dtype="bfloat16",
            shape=shape,
            file=Path("folder/model.safetensors"),
            offset=offset,
            nbytes=2 * numel,
        )
        offset += 2 * numel
    return Checkpoint(
        format=Format.SAFETENSORS,
        root=Path("folder"),
        files=(CheckpointFile(path=Path("folder/model.safetensors"), nbytes=100),),
        tensors=tensors,
        config={"architectures": ["LlamaForCausalLM"], "vocab_size": 4, "hidden_size": 3},
    )


def test_the_drawing_at_66_columns(checkpoint: Checkpoint) -> None:
    drawn = io.StringIO()
    render(inspect_checkpoint(checkpoint), Console(file=drawn, width=66, color_system=None))
    lines = [line.rstrip() for line in drawn.getvalue().splitlines()]
    assert "\n".join(lines) + "\n" == SNAPSHOT.read_text()


def test_everything_is_plain_data(checkpoint: Checkpoint) -> None:
    data = json.loads(json.dumps(to_json(inspect_checkpoint(checkpoint))))
    assert data["totals"] == {"tensors": 5, "parameters": 42, "nbytes": 84, "nbytes_by_dtype": {"bfloat16": 84}}
    assert data["tensors"][1]["offset"] == 40
    assert data["config"][1]["consequence"] == "the embedding table has 12 parameters"


def test_a_missing_head_is_tied_or_missing_as_the_config_says(checkpoint: Checkpoint) -> None:
    from dataclasses import replace

    tensors = {name: info for name, info in checkpoint.tensors.items() if name != "lm_head.weight"}
    for tied, word in ((True, "tied: there is no output head"), (False, "missing: there is no output head")):
        config = {**(checkpoint.config or {}), "tie_word_embeddings": tied}
        remarks = inspect_checkpoint(replace(checkpoint, tensors=tensors, config=config)).remarks
        assert any(remark.startswith(word) for remark in remarks)


def test_no_config_is_remarked(checkpoint: Checkpoint) -> None:
    from dataclasses import replace

    remarks = inspect_checkpoint(replace(checkpoint, config=None)).remarks
    assert any("no config.json" in remark for remark in remarks)
