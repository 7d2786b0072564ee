"""When transformers' conversions are asked, and when they need not be."""

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, conversion_mapping

from loadstone.architecture import transformers_keymap
from loadstone.architecture.blueprint import Surroundings
from loadstone.architecture.skeleton import slots_of, without_parameters
from loadstone.checkpoint.values import Checkpoint, Format, TensorInfo


@pytest.fixture
def llama() -> tuple[LlamaForCausalLM, Surroundings]:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4
    )
    with without_parameters():
        model = LlamaForCausalLM(config)
    slots = slots_of(model)
    checkpoint = Checkpoint(
        format=Format.SAFETENSORS,
        root=Path(),
        files=(),
        tensors={
            slot.fqn: TensorInfo(
                name=slot.fqn, dtype=slot.dtype, shape=slot.shape, file=Path("w"), offset=0, nbytes=4 * prod(slot.shape)
            )
            for slot in slots.values()
        },
    )
    return model, Surroundings(checkpoint=checkpoint, slots=slots, dtypes={}, source=lambda name: torch.empty(0))


def test_every_family_that_has_conversions_is_recognised() -> None:
    assert set(conversion_mapping._build_checkpoint_conversion_mapping()) <= transformers_keymap._converted_families()


def test_equal_names_of_a_family_without_conversions_need_none(
    llama: tuple[LlamaForCausalLM, Surroundings], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, around = llama
    monkeypatch.setattr(transformers_keymap, "get_model_conversion_mapping", lambda _: pytest.fail("asked"))
    keymap = transformers_keymap.map_keys(model, around)
    assert [assignment.target for assignment in keymap.assignments] == list(around.slots)
    assert all(assignment.parts[0].source == assignment.target for assignment in keymap.assignments)


def test_conversions_are_asked_where_a_name_differs_or_the_user_registered_some(
    llama: tuple[LlamaForCausalLM, Surroundings], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, around = llama
    assert transformers_keymap._fits_as_it_is(model, around)
    tensors = dict(around.checkpoint.tensors)
    tensors["layers.0.mlp.up_proj.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    renamed = replace(around, checkpoint=replace(around.checkpoint, tensors=tensors))
    assert not transformers_keymap._fits_as_it_is(model, renamed)
    monkeypatch.setattr(conversion_mapping, "USER_REGISTERED_MAPPINGS", {"llama"})
    assert not transformers_keymap._fits_as_it_is(model, around)
