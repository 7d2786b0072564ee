"""A plan that streams experts gives them a room, and the process stays within the plan."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import loadstone
from loadstone.plan.values import UnitKind

# Experts of 201 MB, all else some 13 MB.
_CONFIG = MixtralConfig(
    vocab_size=512,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    num_local_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=256,
)

# In a process of its own, in which torch and the model code are imported before anything is measured.
_CHILD = """
import gc, json, sys
import torch
import transformers.models.mixtral.modeling_mixtral
import loadstone, loadstone.api.assemble
from loadstone.hardware.memory import PeakWatch, resident

run = dict(context=96, prompt_tokens=64)
plenty = loadstone.plan(sys.argv[1], **run).devices[-1].peak_bytes
torch.ones(64, 64) @ torch.ones(64, 64)
gc.collect()
before = resident().anonymous_bytes
with PeakWatch() as watch:
    model = loadstone.load(sys.argv[1], max_memory={'cpu': plenty - int(sys.argv[2])}, **run)
    with torch.inference_mode():
        answer = model.generate(torch.arange(64)[None], max_new_tokens=32, min_new_tokens=32, do_sample=False)
loaded = loadstone.of(model)
host, stats = loaded.plan.devices[-1], loaded.stats()
print(json.dumps({
    "growth": watch.peak.anonymous_bytes - before, "bound": host.anonymous_bytes, "streams": loaded.plan.streams,
    "slots": host.reservation.slot_bytes, "room": stats.room_bytes, "read": stats.expert_bytes,
    "kept": sum(one.home_bytes for one in loaded.plan.placements if one.kind.value == "expert" and not one.is_streamed),
    "hits": stats.expert_hits, "uses": stats.expert_uses, "answer": answer.tolist(),
}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    MixtralForCausalLM(_CONFIG).to(torch.bfloat16).save_pretrained(path)
    return path


def test_the_process_stays_within_the_plan(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(folder), "130000000"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["streams"]
    assert row["room"] <= row["kept"] + row["slots"] < 100_000_000
    assert row["growth"] <= row["bound"]
    assert row["growth"] < 150_000_000, "all experts are 201 MB"
    assert 0 < row["hits"] < row["uses"]
    whole = loadstone.load(folder)
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    assert whole.generate(torch.arange(64)[None], **options).tolist() == row["answer"]


def test_experts_that_stay_and_experts_that_come_share_a_room(folder: Path) -> None:
    away = {"": "cpu"} | {
        f"model.layers.{layer}.block_sparse_moe.experts.{one}": "disk" for layer in (2, 5) for one in range(4)
    }
    model = loadstone.load(folder, device_map=away)
    loaded = loadstone.of(model)
    assert loaded.plan is not None
    experts = [one for one in loaded.plan.placements if one.kind is UnitKind.EXPERT]
    assert sum(one.is_streamed for one in experts) == 8
    stats = loaded.stats()
    assert stats is not None
    expert_bytes = 3 * 512 * 1024 * 2
    assert 50 * expert_bytes < stats.room_bytes <= (56 + 2) * expert_bytes
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, loadstone.load(folder)(tokens).logits)
