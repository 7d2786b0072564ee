"""Loads that follow a plan: what does not fit is read in each pass, with the same numbers."""

from pathlib import Path

import pytest
import torch
from torch import nn

import loadstone
from loadstone.cli.loading import LoadOptions
from loadstone.cli.run_command import _planned_for
from loadstone.errors import DoesNotFit, InvalidPlan
from loadstone.execute.values import Prompt
from loadstone.hardware.machine_file import find_machine
from loadstone.plan.plan_file import from_json, to_json

TOKENS = torch.arange(3, 9)[None]
AWAY = {"": "cpu", "model.layers.0": "disk", "model.layers.1.mlp": "disk", "model.embed_tokens": "disk"}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_a_device_map_leaves_on_the_disk_is_read_in_each_pass(llama_folder: Path, dtype: str) -> None:
    whole = loadstone.load(llama_folder, dtype=dtype)
    model = loadstone.load(llama_folder, dtype=dtype, device_map=AWAY)
    loaded = loadstone.of(model)
    assert loaded.plan is not None
    assert {one.unit for one in loaded.plan.placements if one.is_streamed} >= {"model.layers.0", "model.embed_tokens"}
    for _ in range(2):
        assert torch.equal(logits(model), logits(whole))
    stats = loaded.stats()
    assert stats is not None
    assert stats.passes == 2
    assert stats.streamed_bytes >= 2 * stats.pass_bytes
    assert stats.slot_bytes <= loaded.plan.devices[-1].reservation.slot_bytes
    blocks = [one.moved_bytes for one in loaded.plan.placements if one.kind.value != "embedding"]
    assert stats.pass_bytes == sum(blocks)
    assert "read in each pass" in next(phase.detail for phase in loaded.report.phases if phase.stage == "plan")
    names = {name for name, parameter in model.named_parameters() if "Streamed" in type(parameter).__name__}
    assert "model.layers.1.mlp.up_proj.weight" in names
    assert "model.layers.1.self_attn.q_proj.weight" not in names


def test_everything_that_fits_with_ease_needs_no_plan(llama_folder: Path) -> None:
    loaded = loadstone.of(loadstone.load(llama_folder))
    assert loaded.plan is None
    assert loaded.stats() is None


def test_a_plan_that_was_saved_is_followed(llama_folder: Path) -> None:
    plan = from_json(to_json(loadstone.plan(llama_folder, device_map=AWAY, context=64)))
    model = loadstone.load(llama_folder, plan=plan)
    assert loadstone.of(model).plan == plan
    assert torch.equal(logits(model), logits(loadstone.load(llama_folder)))


def test_a_plan_of_another_checkpoint_says_what_changed(llama_folder: Path, llama_copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    plan = loadstone.plan(llama_folder)
    path = llama_copy / "model.safetensors"
    state = load_file(path)
    state["model.norm.weight"] = state["model.norm.weight"].float()
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(InvalidPlan, match=r"no longer fits what it was made for: .*; make it anew"):
        loadstone.load(llama_copy, plan=plan)


def test_a_plan_for_another_machine_says_what_changed(llama_folder: Path) -> None:
    plan = loadstone.plan(llama_folder, machine=find_machine("laptop-rtx4060-8gb"))
    with pytest.raises(InvalidPlan, match="no longer fits"):
        loadstone.load(llama_folder, plan=plan)


def test_a_budget_that_nothing_fits_in_is_refused_before_anything_is_read(llama_folder: Path) -> None:
    with pytest.raises(DoesNotFit, match="does not fit") as found:
        loadstone.load(llama_folder, max_memory="1MB")
    assert found.value.shortfall_bytes > 0


def test_arguments_that_contradict_a_plan_are_refused(llama_folder: Path) -> None:
    plan = loadstone.plan(llama_folder)
    for more in ({"context": 100}, {"dtype": "float32"}, {"device": "cpu"}, {"max_memory": "1GB"}):
        with pytest.raises(ValueError, match="plan= says everything already"):
            loadstone.load(llama_folder, plan=plan, **more)
    with pytest.raises(ValueError, match=r"a plan needs config\.json and cannot go with into="):
        loadstone.load(llama_folder / "model.safetensors", into=nn.Linear, max_memory="1GB")


def test_a_run_is_planned_for_the_prompt_that_it_has() -> None:
    wanted, prompt_tokens = _planned_for(LoadOptions(), Prompt(text="héllo", system="be kind"), 100)
    assert prompt_tokens == 6 + 7 + 64
    assert wanted.context == prompt_tokens + 100
    assert _planned_for(LoadOptions(context=20), Prompt(text="x" * 50), 100)[1] == 20
    assert _planned_for(LoadOptions(plan=Path("plan.json")), Prompt(text="x"), 9)[1] is None


def test_a_block_that_uses_a_weight_inside_it_directly_has_its_numbers(tmp_path: Path) -> None:
    """Mamba multiplies with the weight of its convolution and never calls it."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=2)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    whole = loadstone.load(tmp_path)
    away = {"": "cpu", "backbone.layers.0.mixer.conv1d": "disk", "backbone.layers.1.mixer.in_proj": "disk"}
    model = loadstone.load(tmp_path, device_map=away)
    assert torch.equal(logits(model), logits(whole))
    with pytest.raises(loadstone.LoadstoneError, match="read from its file only while"):
        model.backbone.layers[0].mixer.conv1d.weight.sum()


def test_what_a_wrapper_put_in_front_of_names_does_not_keep_a_plan_from_being_followed(
    llama_folder: Path, llama_copy: Path
) -> None:
    """`torch.compile` and data parallelism do that; nothing was streamed, whatever the plan said."""
    from safetensors.torch import load_file, save_file

    path = llama_copy / "model.safetensors"
    save_file({f"module.{name}": one for name, one in load_file(path).items()}, path, metadata={"format": "pt"})
    model = loadstone.load(llama_copy, device_map=AWAY)
    expected = loadstone.load(llama_folder, device_map=AWAY)
    stats, wanted = loadstone.of(model).stats(), loadstone.of(expected).stats()
    assert stats is not None
    assert wanted is not None
    assert (stats.num_units, stats.pass_bytes) == (wanted.num_units, wanted.pass_bytes)
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("is_small", [False, True])
def test_the_host_is_planned_for_where_a_driver_has_no_device(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, is_small: bool
) -> None:
    """`CUDA_VISIBLE_DEVICES=""` hides a driver's devices; what is too large for the host was loaded all the same."""
    from loadstone.api import load, planned

    for module in (planned, load):
        monkeypatch.setattr(module, "may_have_accelerator", lambda: True)
    if is_small:
        monkeypatch.setattr(planned, "host_memory", lambda *_: (10**9, 10**9))
    model = loadstone.load(llama_folder)
    assert (loadstone.of(model).plan is not None) == is_small
    assert torch.equal(logits(model), logits(loadstone.load(llama_folder, device="cpu")))
