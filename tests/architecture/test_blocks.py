from pathlib import Path

from loadstone.architecture.blocks import group_blocks, tied_groups
from loadstone.checkpoint.values import TensorInfo


def infos(*names: str, offset: int | None = None) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(
            name=name,
            dtype="float32",
            shape=(2, 3),
            file=Path("a"),
            offset=24 * index if offset is None else offset,
            nbytes=24,
        )
        for index, name in enumerate(names)
    }


def fqns(*names: str) -> list[str]:
    return [block.fqn for block in group_blocks(infos(*names))]


def test_a_decoder_runs_from_embedding_to_head_in_natural_order() -> None:
    names = [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.10.mlp.up.weight",
        "model.layers.2.mlp.up.weight",
        "model.layers.2.mlp.down.weight",
        "model.norm.weight",
    ]
    order = ["model.embed_tokens", "model.layers.2", "model.layers.10", "model.norm", "lm_head"]
    assert fqns(*names) == order


def test_names_of_many_families_are_understood() -> None:
    for stack in (
        "transformer.h",
        "encoder.layer",
        "bert.encoder.layer",
        "blk",
        "model.decoder.layers",
        "gpt_neox.layers",
    ):
        blocks = group_blocks(infos(f"{stack}.1.attn.weight", f"{stack}.0.attn.weight"))
        assert [(block.stack, block.fqn) for block in blocks] == [(stack, f"{stack}.0"), (stack, f"{stack}.1")]


def test_an_encoder_runs_before_its_decoder() -> None:
    assert fqns("decoder.block.0.layer.0.weight", "encoder.block.0.layer.0.weight", "shared.weight") == [
        "shared",
        "encoder.block.0",
        "decoder.block.0",
    ]


def test_experts_belong_to_their_block_and_are_counted() -> None:
    names = [f"model.layers.0.mlp.experts.{index}.up_proj.weight" for index in range(4)]
    (block,) = group_blocks(infos(*names, "model.layers.0.mlp.gate.weight"))
    assert (block.fqn, block.num_experts, len(block.tensors)) == ("model.layers.0", 4, 5)
    assert (block.nbytes, block.num_parameters) == (5 * 24, 5 * 6)


def test_every_tensor_is_in_one_block() -> None:
    names = ["weight", "a.b", "x.0", "layers.0.w", "layers.0.1.w", "1.w", "experts.3.w"]
    blocks = group_blocks(infos(*names))
    assert sorted(name for block in blocks for name in block.tensors) == sorted(names)
    assert [block.order for block in blocks] == list(range(len(blocks)))


def test_names_that_share_bytes_are_tied() -> None:
    assert tied_groups(infos("a", "b", offset=0)) == (("a", "b"),)
    assert tied_groups(infos("a", "b")) == ()
