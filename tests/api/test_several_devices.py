"""Models on several devices: each module computes where its weights lie, and the numbers are those of one device."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import builders
import fake_devices
import loadstone
from loadstone.api import planned
from loadstone.errors import PlanNotSupported
from loadstone.hardware.fake import FakeLink
from loadstone.hardware.spec import Machine
from loadstone.plan.budget import CONTEXT_BYTES, DEVICE_MARGIN_SHARE
from loadstone.plan.values import HOST, Plan, UnitKind
from loadstone.stream import transfer

# One of each manner of building a model: what is around blocks, and what blocks are given.
MODELS = [
    ("causal", "llama"),
    ("causal", "gpt2"),
    ("causal", "mamba"),
    ("causal", "mixtral"),
    ("causal", "gemma3_text"),
    ("causal", "longcat_flash"),
    ("seq2seq", "t5"),
    ("seq2seq", "bart"),
    ("encoder", "bert"),
    ("encoder", "albert"),
    ("encoder", "xlm"),
    ("speech", "whisper"),
    ("contrastive", "clip"),
    ("seq2seq", "fsmt"),
    ("image", "siglip"),
]
# The products of processors depend on where their operands lie in memory, in the last bit.
LAST_BITS = {"rtol": 1e-5, "atol": 2e-6}
PROMPT = torch.tensor([[5, 9, 3, 17, 11, 2], [7, 4, 4, 8, 21, 13]])


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def far_gpu(fake_gpus: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cuda:0` has the host's memory, at the other end of a link that works late: it can be streamed to."""
    del fake_gpus
    monkeypatch.setitem(transfer.STAND_INS, "cuda:0", "cpu")
    monkeypatch.setitem(transfer.LINKS, "cpu", lambda _: FakeLink(delay_s=0.0002))


def outputs(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(builders.SEED)
    with torch.no_grad():
        return builders.flat(model(**inputs))


def check_against_the_host(model: nn.Module, folder: Path, times: int = 1) -> None:
    """Its numbers are those of the host alone, each time."""
    expected = outputs(loadstone.load(folder, device="cpu"), {"input_ids": PROMPT})
    for _ in range(times):
        torch.testing.assert_close(outputs(model, {"input_ids": PROMPT}), expected, **LAST_BITS)


def written(kind: str, model_type: str, folder: Path) -> nn.Module:
    model = builders.tiny_model(model_type, kind)
    builders.write_checkpoint(model, folder)
    return model


def devices_of(model: nn.Module) -> set[str]:
    return {str(parameter.device) for parameter in model.parameters()}


def plan_of(model: nn.Module) -> Plan:
    plan = loadstone.of(model).plan
    assert plan is not None
    return plan


def beside_the_host(plan: Plan, kinds: tuple[UnitKind, ...]) -> Plan:
    """The same plan, in which the host computes some units where they lie."""
    placements = tuple(replace(one, home=HOST, compute=HOST) if one.kind in kinds else one for one in plan.placements)
    return replace(plan, placements=placements)


@pytest.mark.parametrize(("kind", "model_type"), MODELS)
def test_the_numbers_are_those_of_one_device(fake_gpus: Machine, tmp_path: Path, kind: str, model_type: str) -> None:
    built = written(kind, model_type, tmp_path)
    inputs = builders.sample_inputs(built, kind)
    load = {"architecture": type(built).__name__, "dtype": "float32"}
    expected = outputs(loadstone.load(tmp_path, device="cuda:0", **load), inputs_on("fake:0", inputs))
    model = loadstone.load(tmp_path, device_map=fake_devices.in_parts(tmp_path, fake_gpus), **load)
    assert devices_of(model) == {"fake:0", "fake:1", "fake:2"}
    found = outputs(model, inputs)
    assert {tensor.device.type for tensor in found} == {"cpu"}  # where the inputs came from
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.cpu(), **LAST_BITS)


def inputs_on(device: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"custom_generate": "assist"},
        {"use_cache": False},
    ],
    ids=lambda how: "-".join(map(str, how)) or "plain",
)
def test_generated_tokens_are_those_of_one_device(fake_gpus: Machine, tmp_path: Path, how: dict[str, Any]) -> None:
    written("causal", "llama", tmp_path)
    one = loadstone.load(tmp_path, device="cpu")
    many = loadstone.load(tmp_path, device_map=fake_devices.in_parts(tmp_path, fake_gpus))

    def generated(model: Any) -> list[list[int]]:
        more = {**how, "custom_generate": loadstone.of(model).assist()} if "custom_generate" in how else how
        prompt = PROMPT[:1] if "custom_generate" in how else PROMPT
        mask = torch.ones_like(prompt)
        mask[-1, 0] = 0 if len(prompt) > 1 else 1
        found = model.generate(
            prompt.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=12, do_sample=False, **more
        )
        tokens: list[list[int]] = found.tolist()
        return tokens

    assert generated(many) == generated(one)


@pytest.mark.parametrize("kinds", [(UnitKind.BLOCK,), (UnitKind.EMBEDDING, UnitKind.HEAD), (UnitKind.EXPERT,)])
def test_the_host_computes_beside_an_accelerator(
    fake_gpus: Machine, tmp_path: Path, kinds: tuple[UnitKind, ...]
) -> None:
    written("causal", "mixtral", tmp_path)
    plan = beside_the_host(loadstone.plan(tmp_path, machine=fake_gpus, device="cuda:0"), kinds)
    model = loadstone.load(tmp_path, plan=plan)
    assert devices_of(model) == {"fake:0", "cpu"}
    for name, parameter in model.named_parameters():
        is_expert = ".experts." in name
        kind = UnitKind.EXPERT if is_expert else UnitKind.BLOCK if ".layers." in name else UnitKind.EMBEDDING
        if "norm.weight" not in name:
            assert parameter.device.type == ("cpu" if kind in kinds else "fake"), name
    check_against_the_host(model, tmp_path)


@pytest.mark.usefixtures("far_gpu")
@pytest.mark.parametrize("away", ["disk", "cpu"])
def test_one_of_several_devices_is_streamed_to(fake_gpus: Machine, tmp_path: Path, away: str) -> None:
    written("causal", "llama", tmp_path)
    places = {"": "cuda:0", "model.layers.0": away, "model.layers.1": "cuda:1", "model.norm": "cuda:1"}
    model = loadstone.load(tmp_path, device_map=places)
    assert plan_of(model).computing == ("cuda:0", "cuda:1")
    stats = loadstone.of(model).stats()
    assert stats is not None
    assert stats.num_units == 1
    check_against_the_host(model, tmp_path, times=3)


@pytest.mark.usefixtures("far_gpu")
@pytest.mark.parametrize("away", ["disk", "cpu"])
def test_a_layer_comes_to_an_accelerator_with_all_of_its_experts(fake_gpus: Machine, tmp_path: Path, away: str) -> None:
    written("causal", "mixtral", tmp_path)
    model = loadstone.load(tmp_path, device_map={"": "cuda:0", "model.layers": away, "model.layers.0": "cuda:1"})
    streamed = [one for one in plan_of(model).placements if one.is_streamed]
    assert [(one.unit, one.kind) for one in streamed] == [("model.layers.1", UnitKind.BLOCK)]
    layer = sum(one.nbytes for one in loadstone.load(tmp_path, device="cpu").model.layers[1].parameters())
    assert streamed[0].home_bytes == streamed[0].moved_bytes == layer
    check_against_the_host(model, tmp_path, times=3)
    stats = loadstone.of(model).stats()
    assert stats is not None
    assert stats.expert_uses == 0
    assert stats.pass_bytes >= layer


def test_the_host_streams_from_the_disk_what_it_computes_beside_an_accelerator(
    fake_gpus: Machine, tmp_path: Path
) -> None:
    written("causal", "llama", tmp_path)
    plan = loadstone.plan(tmp_path, machine=fake_gpus, device_map={"": "cpu", "model.layers.1": "disk"})
    placements = tuple(
        replace(one, home="cuda:0", compute="cuda:0") if one.unit == "model.layers.0" else one
        for one in plan.placements
    )
    model = loadstone.load(tmp_path, plan=replace(plan, placements=placements))
    check_against_the_host(model, tmp_path, times=3)
    stats = loadstone.of(model).stats()
    assert stats is not None
    assert stats.uses == 3


def test_the_host_streams_experts_beside_an_accelerator_that_keeps_others(fake_gpus: Machine, tmp_path: Path) -> None:
    written("causal", "mixtral", tmp_path)
    found = loadstone.plan(tmp_path, machine=fake_gpus, device="cpu").placements
    experts = {one.unit: one.order for one in found if one.kind is UnitKind.EXPERT}
    last = max(experts.values())
    places = {"": "cpu"} | {unit: "disk" for unit, order in experts.items() if order == last}
    plan = loadstone.plan(tmp_path, machine=fake_gpus, device_map=places)
    placements = tuple(
        one if one.unit in places else replace(one, home="cuda:0", compute="cuda:0") for one in plan.placements
    )
    model = loadstone.load(tmp_path, plan=replace(plan, placements=placements))
    names = {name for name, one in model.named_parameters() if one.device.type == "cpu"}
    assert {name.rpartition(".")[0] for name in names} == {"model.layers.1.mlp.experts"}
    check_against_the_host(model, tmp_path, times=2)
    stats = loadstone.of(model).stats()
    assert stats is not None
    assert stats.expert_uses > 0
    layer = sum(one.home_bytes for one in plan.placements if one.unit in places)
    assert 0 < stats.room_bytes < layer


def test_a_model_that_fits_on_no_one_device_is_spread_without_being_asked(fake_gpus: Machine, tmp_path: Path) -> None:
    model = builders.tiny_model("llama", "causal")
    builders.write_checkpoint(model, tmp_path)
    run = {"context": 64, "prompt_tokens": 32}
    least = loadstone.plan(tmp_path, machine=fake_gpus, device="cuda:0", **run).devices[0]
    fixed = least.peak_bytes - least.weight_bytes
    budget = fixed + 2 * least.weight_bytes // 3
    model = loadstone.load(tmp_path, max_memory={"cuda:0": budget, "cuda:1": budget, "cuda:2": 1}, **run)
    assert devices_of(model) == {"fake:0", "fake:1"}
    for device in plan_of(model).devices:
        assert device.peak_bytes <= device.budget_bytes
        held = sum(one.nbytes for one in model.parameters() if str(one.device) == device.device.replace("cuda", "fake"))
        assert held <= device.weight_bytes
    report = loadstone.of(model).report
    assert "cuda:0: the first block computes there; others on cuda:1" in str(report)
    assert "dispatch" in [phase.stage for phase in report.phases]


@pytest.mark.parametrize("device", [None, "cuda", "cuda:1"])
def test_a_model_that_is_too_large_for_an_accelerator_is_planned_unasked(
    fake_gpus: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str | None
) -> None:
    """Two of them take what one cannot; one that is asked for by name is streamed to."""
    written("causal", "llama", tmp_path)
    run = {"context": 64, "prompt_tokens": 32}
    least = loadstone.plan(tmp_path, machine=fake_gpus, device="cuda:0", **run).devices[0]
    free_bytes = int((least.peak_bytes - least.weight_bytes // 4) / (1 - DEVICE_MARGIN_SHARE)) + CONTEXT_BYTES["cuda"]
    small = tuple(replace(one, free_bytes=free_bytes) for one in fake_gpus.devices[:2])
    machine = replace(fake_gpus, devices=(*small, fake_gpus.host))
    monkeypatch.setattr(planned, "probe", lambda *_: machine)
    for name in ("cuda:0", "cuda:1") if device else ():
        monkeypatch.setitem(transfer.STAND_INS, name, "cpu")
        monkeypatch.setitem(transfer.LINKS, "cpu", lambda _: FakeLink(delay_s=0.0002))
    expected = outputs(loadstone.load(tmp_path, device="cpu"), {"input_ids": PROMPT})
    model = loadstone.load(tmp_path, device=device, **run)
    if device is None:
        assert devices_of(model) == {"fake:0", "fake:1"}
    else:
        assert plan_of(model).computing == ("cuda:0" if device == "cuda" else device,)
        assert plan_of(model).streams
    stages = [phase.stage for phase in loadstone.of(model).report.phases]
    assert "plan for accelerators" in stages
    for _ in range(2):
        torch.testing.assert_close(outputs(model, {"input_ids": PROMPT}), expected, **LAST_BITS)


def test_what_a_wrapper_put_in_front_of_names_does_not_matter(fake_gpus: Machine, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    written("causal", "llama", tmp_path)
    expected = outputs(loadstone.load(tmp_path, device="cpu"), {"input_ids": PROMPT})
    path = next(tmp_path.glob("*.safetensors"))
    save_file({f"module.{name}": tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    model = loadstone.load(tmp_path, device_map={"": "cuda:0", "model.layers.1": "cuda:1"})
    assert devices_of(model) == {"fake:0", "fake:1"}
    torch.testing.assert_close(outputs(model, {"input_ids": PROMPT}), expected, **LAST_BITS)


def test_masks_and_positions_travel_once_to_each_device(fake_gpus: Machine, tmp_path: Path) -> None:
    """accelerate, with the same modules on the same devices, copies them for each block."""
    accelerate = pytest.importorskip("accelerate")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4
    )
    built = transformers.LlamaForCausalLM(config)
    built.save_pretrained(tmp_path)
    places = {"": "cuda:0", **{f"model.layers.{number}": "cuda:1" for number in range(2, 6)}}
    ours = loadstone.load(tmp_path, device_map=places)
    inputs = {"input_ids": PROMPT.to("fake:0"), "attention_mask": torch.ones_like(PROMPT).to("fake:0")}
    fake_devices.COPIES.clear()
    outputs(ours, inputs)
    found = dict(fake_devices.COPIES)
    # The hidden state there and back; cosines, sines, position numbers and perhaps a mask.
    assert found["fake:1", "fake:0"] == 1
    assert found["fake:0", "fake:1"] <= 5
    modules = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "fake:0")
    modules |= {f"model.layers.{number}": "fake:1" if number > 1 else "fake:0" for number in range(6)}
    theirs = loadstone.load(tmp_path, device="cpu")
    for name, device in modules.items():
        theirs.get_submodule(name).to(device)
        hook = accelerate.hooks.AlignDevicesHook(torch.device(device), io_same_device=False)
        accelerate.hooks.add_hook_to_module(theirs.get_submodule(name), hook)
    fake_devices.COPIES.clear()
    outputs(theirs, inputs)
    assert fake_devices.COPIES["fake:0", "fake:1"] >= 3 * found["fake:0", "fake:1"] - 2


def test_forwards_of_several_threads_do_not_mix(fake_gpus: Machine, tmp_path: Path) -> None:
    written("causal", "llama", tmp_path)
    model = loadstone.load(tmp_path, device_map=fake_devices.in_parts(tmp_path, fake_gpus))
    prompts = [PROMPT[:, : 2 + number] + number for number in range(4)]
    expected = [outputs(model, {"input_ids": prompt}) for prompt in prompts]
    found: list[list[torch.Tensor]] = [[] for _ in prompts]

    def work(number: int) -> None:
        for _ in range(5):
            found[number] = outputs(model, {"input_ids": prompts[number]})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(found, expected, **LAST_BITS)


def test_copies_of_a_model_and_models_that_are_moved_compute(fake_gpus: Machine, tmp_path: Path) -> None:
    written("causal", "llama", tmp_path)
    model = loadstone.load(tmp_path, device_map=fake_devices.in_parts(tmp_path, fake_gpus))
    expected = outputs(model, {"input_ids": PROMPT})
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    copied = copy.deepcopy(model)
    del model
    torch.testing.assert_close(outputs(copied, {"input_ids": PROMPT}), expected, **LAST_BITS)
    copied.to("fake:2")
    assert devices_of(copied) == {"fake:2"}
    torch.testing.assert_close(outputs(copied, {"input_ids": PROMPT}), expected, **LAST_BITS)
    assert all(torch.equal(tensor.cpu(), state[name]) for name, tensor in copied.state_dict().items())


def test_what_needs_one_device_says_so(fake_gpus: Machine, tmp_path: Path) -> None:
    written("causal", "llama", tmp_path)
    model = loadstone.load(tmp_path, device_map=fake_devices.in_parts(tmp_path, fake_gpus))
    for work in (loadstone.of(model).park, lambda: loadstone.of(model).limit("1GB")):
        with pytest.raises(PlanNotSupported, match="a model that computes on one device, found one on cuda:0"):
            work()
    with pytest.raises(ValueError, match=r"parameters are on one device, found them on fake:0, fake:1, fake:2"):
        loadstone.offload(model)


def test_a_plan_that_streams_to_two_devices_is_named(fake_gpus: Machine, tmp_path: Path) -> None:
    written("causal", "llama", tmp_path)
    plan = loadstone.plan(tmp_path, machine=fake_gpus, device_map=fake_devices.in_parts(tmp_path, fake_gpus))
    placements = tuple(replace(one, home="disk") if one.kind is UnitKind.BLOCK else one for one in plan.placements)
    placements = tuple(replace(one, compute=f"cuda:{number % 2}") for number, one in enumerate(placements))
    with pytest.raises(PlanNotSupported, match=r"streams to cuda:0 and to cuda:1; expected one device that is"):
        loadstone.load(tmp_path, plan=replace(plan, placements=placements, num_slots=2))


def test_a_load_tells_the_host_memory_that_it_takes_by_device(fake_gpus: Machine, tmp_path: Path) -> None:
    """What is cast on a device takes none of the host's; what the host computes, and what it decodes, does."""
    built = written("causal", "llama", tmp_path)
    nbytes = sum(parameter.nbytes for parameter in built.parameters())
    half = {"dtype": "bfloat16"}
    on_host = loadstone.of(loadstone.load(tmp_path, device="cpu", **half)).report.foretold.weight_bytes
    assert on_host == nbytes // 2
    elsewhere = loadstone.load(tmp_path, device_map={"": "cuda:0", "model.layers.1": "cuda:1"}, **half)
    assert loadstone.of(elsewhere).report.foretold.weight_bytes == 0
    plan = beside_the_host(loadstone.plan(tmp_path, machine=fake_gpus, device="cuda:0", **half), (UnitKind.BLOCK,))
    beside = loadstone.of(loadstone.load(tmp_path, plan=plan)).report.foretold.weight_bytes
    assert beside == sum(one.home_bytes for one in plan.placements if one.kind is UnitKind.BLOCK)
