"""Names and shapes of many families -> units."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plan_models import checkpoint, llama

import builders
from gguf_builders import Gguf, stored_array
from loadstone.architecture.gguf import config_from_metadata
from loadstone.checkpoint.open import open_checkpoint
from loadstone.checkpoint.values import Checkpoint
from loadstone.plan.facts import facts_of
from loadstone.plan.units import Inventory, inventory
from loadstone.plan.values import Unit, UnitKind


def found(given: Checkpoint, dtype: str = "bfloat16") -> Inventory:
    return inventory(given, facts_of(given.config), dtype)


def kinds(given: Checkpoint) -> list[tuple[str, str]]:
    return [(unit.name, unit.kind.value) for unit in found(given).units]


def one(inventory_: Inventory, name: str) -> Unit:
    return next(unit for unit in inventory_.units if unit.name == name)


def test_a_llama_is_embedding_blocks_norm_and_head_in_this_order() -> None:
    assert kinds(llama(layers=2)) == [
        ("model.embed_tokens", "embedding"),
        ("model.layers.0", "block"),
        ("model.layers.1", "block"),
        ("model.norm", "other"),
        ("lm_head", "head"),
    ]


def test_a_block_is_added_up_and_divided_by_modules() -> None:
    units = found(llama(layers=1, width=8, inner=16))
    block = one(units, "model.layers.0")
    numel = 4 * 64 + 3 * 128 + 8
    assert (block.num_parameters, block.stored_bytes, block.memory_bytes) == (numel, 2 * numel, 2 * numel)
    assert (block.mappable_bytes, block.largest_bytes, block.use_share) == (2 * numel, 256, 1)
    parts = units.parts(block)
    assert [part.name for part in parts][-1] == "model.layers.0.input_layernorm"
    assert sum(part.memory_bytes for part in parts) == block.memory_bytes
    assert {part.order for part in parts} == {block.order}


def test_another_dtype_is_wider_and_cannot_be_mapped() -> None:
    block = one(found(llama(layers=1), "float32"), "model.layers.0")
    assert (block.memory_bytes, block.mappable_bytes) == (2 * block.stored_bytes, 0)


def test_what_is_tied_is_one_unit_whether_the_head_is_stored_or_not() -> None:
    absent = found(llama(tied=True))
    assert [unit.name for unit in absent.units if unit.kind is UnitKind.HEAD] == ["model.embed_tokens"]
    stored = llama()
    tied = found(
        checkpoint(
            {n: i.shape for n, i in stored.tensors.items()}, {**(stored.config or {}), "tie_word_embeddings": True}
        )
    )
    head = one(tied, "model.embed_tokens")
    assert (head.kind, head.tensors) == (UnitKind.HEAD, ("model.embed_tokens.weight", "lm_head.weight"))
    assert head.memory_bytes == 2 * 1000 * 64
    assert head.use_share == 1
    assert head.order == max(unit.order for unit in tied.units)


def test_a_table_that_is_not_tied_is_used_by_rows() -> None:
    table = one(found(llama(vocab=500)), "model.embed_tokens")
    assert (table.kind, table.use_share) == (UnitKind.EMBEDDING, 1 / 500)


def test_a_base_model_has_no_head_to_tie_its_table_to() -> None:
    given = llama(tied=True)
    bare = checkpoint(
        {n: i.shape for n, i in given.tensors.items()}, {**(given.config or {}), "architectures": ["LlamaModel"]}
    )
    assert one(found(bare), "model.embed_tokens").kind is UnitKind.EMBEDDING


def test_experts_with_tensors_of_their_own_are_units_of_their_own() -> None:
    units = found(llama(layers=2, experts=4))
    experts = [unit for unit in units.units if unit.kind is UnitKind.EXPERT]
    assert [unit.name for unit in experts][:2] == ["model.layers.0.mlp.experts.0", "model.layers.0.mlp.experts.1"]
    assert len(experts) == 8
    assert {unit.use_share for unit in experts} == {0.5}
    assert {unit.mappable_bytes for unit in experts} == {0}  # they become slices of one tensor
    assert experts[0].order == one(units, "model.layers.0").order


def test_experts_in_one_tensor_are_one_unit_of_each_layer() -> None:
    shapes = {
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
        "model.layers.0.mlp.router.weight": (4, 8),
        "model.layers.0.mlp.experts.gate_up_proj": (4, 8, 16),
        "model.layers.0.mlp.experts.gate_up_proj_bias": (4, 16),
        "model.layers.0.mlp.shared_expert.up_proj.weight": (8, 8),
    }
    config = {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 1}
    units = found(checkpoint(shapes, config))
    assert kinds(checkpoint(shapes, config)) == [("model.layers.0", "block"), ("model.layers.0.mlp.experts", "expert")]
    assert one(units, "model.layers.0.mlp.experts").use_share == 0.25


def test_encoders_come_before_decoders_and_towers_before_the_language_model() -> None:
    t5 = {
        "shared.weight": (100, 8),
        "decoder.block.0.layer.0.SelfAttention.q.weight": (8, 8),
        "encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8),
        "decoder.embed_tokens.weight": (100, 8),
        "encoder.embed_tokens.weight": (100, 8),
        "lm_head.weight": (100, 8),
    }
    assert kinds(checkpoint(t5, {"model_type": "t5", "is_encoder_decoder": True, "tie_word_embeddings": False})) == [
        ("shared", "embedding"),
        ("encoder.block.0", "block"),
        ("decoder.block.0", "block"),
        ("lm_head", "head"),
    ]
    table = found(checkpoint(t5, {"is_encoder_decoder": True})).units[0]
    assert (len(table.tensors), table.num_parameters) == (3, 800)
    towers = {
        "language_model.model.layers.0.q.weight": (8, 8),
        "vision_tower.encoder.layers.0.q.weight": (8, 8),
    }
    assert [name for name, _ in kinds(checkpoint(towers, {}))] == [
        "vision_tower.encoder.layers.0",
        "language_model.model.layers.0",
    ]


def test_wrapper_prefixes_are_dropped_from_names() -> None:
    given = checkpoint({"_orig_mod.module.model.layers.0.q.weight": (8, 8)})
    unit = found(given).units[0]
    assert (unit.name, unit.tensors) == ("model.layers.0", ("_orig_mod.module.model.layers.0.q.weight",))


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [
        ("qwen2", "causal"),
        ("mixtral", "causal"),
        ("qwen3_moe", "causal"),
        ("gpt_oss", "causal"),
        ("gpt2", "causal"),
        ("gemma3_text", "causal"),
        ("deepseek_v3", "causal"),
        ("mamba", "causal"),
        ("jamba", "causal"),
        ("t5", "seq2seq"),
        ("bert", "encoder"),
        ("vit", "image"),
        ("llava", "image-text"),
        ("whisper", "speech"),
    ],
)
def test_every_tensor_of_a_real_model_is_in_one_unit(tmp_path: Path, model_type: str, kind: str) -> None:
    model: Any = builders.tiny_model(model_type, kind)
    given = open_checkpoint(builders.write_checkpoint(model, tmp_path))
    units = found(given, "float32")
    assert sorted(name for unit in units.units for name in unit.tensors) == sorted(given.tensors)
    blocks = [unit for unit in units.units if unit.kind is UnitKind.BLOCK]
    assert len(blocks) >= 2
    assert [unit.order for unit in units.units] == sorted(unit.order for unit in units.units)
    experts = [unit for unit in units.units if unit.kind is UnitKind.EXPERT]
    assert bool(experts) is (model_type in {"mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "jamba"})
    assert {unit.use_share for unit in experts} <= {0.5}
    heads = [unit for unit in units.units if unit.kind is UnitKind.HEAD]
    assert heads or model_type == "llava"


def test_gguf_names_are_the_modules_and_rearranged_tensors_cannot_be_mapped(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def stored(*shape: int) -> Any:
        return stored_array(rng.standard_normal(shape, np.float32))

    tensors = {
        "token_embd.weight": stored(32, 64),
        "output_norm.weight": stored(64),
        **{f"blk.0.attn_{name}.weight": stored(64, 64) for name in ("q", "k", "v", "output")},
        "blk.0.attn_norm.weight": stored(64),
        "blk.0.ffn_norm.weight": stored(64),
        "blk.0.ffn_gate.weight": stored(96, 64),
        "blk.0.ffn_up.weight": stored(96, 64),
        "blk.0.ffn_down.weight": stored(64, 96),
    }
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 4,
        "llama.context_length": 128,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    path = Gguf(metadata=metadata, tensors=tensors).write(tmp_path / "model.gguf")
    given = open_checkpoint(path)
    config = config_from_metadata(given)
    units = found(replace(given, config=config), "float32")
    assert [(unit.name, unit.kind.value) for unit in units.units] == [
        ("model.layers.0", "block"),
        ("model.norm", "other"),
        ("model.embed_tokens", "head"),
    ]
    block = one(units, "model.layers.0")
    # Queries and keys are permuted; everything else is float32 where it lies.
    assert block.memory_bytes - block.mappable_bytes == 2 * 64 * 64 * 4
    assert "blk.0.attn_q.weight" in block.tensors


def test_a_layer_is_whole_with_its_experts_unless_it_is_divided() -> None:
    mixture = found(llama(layers=2, experts=4))
    whole = mixture.whole_layers(mixture.units)
    layers = [unit for unit in whole if unit.kind is UnitKind.BLOCK]
    assert [unit.expert_tensors for unit in layers] == [12, 12]
    assert sum(unit.memory_bytes for unit in whole) == sum(unit.memory_bytes for unit in mixture.units)
    assert sum(unit.mappable_bytes for unit in whole) == sum(unit.mappable_bytes for unit in mixture.units)
    assert not any(unit.kind is UnitKind.EXPERT for unit in whole)
    assert mixture.parts(layers[0]) == (layers[0],)
    divided = [part for unit in mixture.units for part in mixture.parts(unit)]
    assert mixture.whole_layers(divided) == divided
    assert mixture.placed([unit.name for unit in whole]) == {unit.name: unit for unit in whole}
    assert mixture.placed([unit.name for unit in mixture.units]) == {unit.name: unit for unit in mixture.units}
