"""What `load` promises beyond equal numbers: notes, threads, memory, no network, named faults."""

import gc
import json
import socket
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loadstone
from loadstone.errors import (
    CheckpointMismatch,
    DeviceUnavailable,
    InvalidConfig,
    RemoteCodeRefused,
    UnknownArchitecture,
    UnsupportedFormat,
)
from loadstone.events import BytesMoved, Event, StageFinished


def rewrite(folder: Path, change: dict[str, object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(change)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_a_loaded_model_generates_and_reports(llama_folder: Path) -> None:
    model = loadstone.load(llama_folder)
    tokens = model.generate(torch.arange(3, 8)[None], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] <= 9
    report = loadstone.of(model).report
    assert (report.model_class, report.dtype.value, report.device.value) == ("LlamaForCausalLM", "bfloat16", "cpu")
    assert [phase.stage for phase in report.phases][:4] == ["headers", "plan", "import", "class"]
    assert report.mapped_bytes == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert report.read_bytes == 0
    assert json.dumps(report.to_json(), default=str)


def test_parameters_of_the_stored_dtype_are_views_of_the_file(llama_folder: Path) -> None:
    model = loadstone.load(llama_folder)
    pointer = model.lm_head.weight.data_ptr()
    inside = [line for line in Path("/proc/self/maps").read_text().splitlines() if _contains(line, pointer)]
    assert inside
    assert inside[0].endswith("model.safetensors")


def _contains(line: str, pointer: int) -> bool:
    begin, end = (int(part, 16) for part in line.split(" ", 1)[0].split("-"))
    return begin <= pointer < end


def test_editing_a_weight_in_place_leaves_the_file_alone(llama_copy: Path) -> None:
    before = (llama_copy / "model.safetensors").read_bytes()
    model = loadstone.load(llama_copy)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert (llama_copy / "model.safetensors").read_bytes() == before


def test_a_cast_load_owns_its_memory_and_outlives_the_file(llama_copy: Path) -> None:
    expected = load_file(llama_copy / "model.safetensors")["lm_head.weight"].float()
    model = loadstone.load(llama_copy, dtype=torch.float32)
    (llama_copy / "model.safetensors").write_bytes(b"")
    gc.collect()
    assert torch.equal(model.lm_head.weight, expected)


def test_a_base_class_leaves_the_head_out_and_says_so(llama_folder: Path) -> None:
    model = loadstone.load(llama_folder, architecture="LlamaModel")
    assert type(model).__name__ == "LlamaModel"
    assert any("1 tensors belong to nothing" in note and "lm_head.weight" in note for note in _notes(model))


def _notes(model: torch.nn.Module) -> tuple[str, ...]:
    return loadstone.of(model).report.notes


def test_an_auto_class_is_resolved(llama_folder: Path) -> None:
    assert type(loadstone.load(llama_folder, architecture="AutoModelForCausalLM")).__name__ == "LlamaForCausalLM"


def test_wrapper_prefixes_are_dropped_and_noted(llama_copy: Path) -> None:
    path = llama_copy / "model.safetensors"
    expected = load_file(path)
    save_file({f"module._orig_mod.{name}": tensor for name, tensor in expected.items()}, path)
    model = loadstone.load(llama_copy)
    assert torch.equal(model.state_dict()["lm_head.weight"], expected["lm_head.weight"])
    assert any('began with "module._orig_mod."' in note for note in _notes(model))


def test_tensors_the_class_keeps_in_float32_are_noted(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)).save_pretrained(
        tmp_path
    )
    model = loadstone.load(tmp_path, dtype="bfloat16")
    kept = [name for name, tensor in model.named_parameters() if tensor.dtype == torch.float32]
    assert any("kept in float32" in note for note in _notes(model)) == bool(kept)


def test_complete_local_files_need_no_network(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    loadstone.load(llama_folder)


def test_events_tell_every_stage_and_every_byte(llama_folder: Path) -> None:
    events: list[Event] = []
    model = loadstone.load(llama_folder, dtype="float32", progress=events.append)
    finished = [event.stage for event in events if isinstance(event, StageFinished)]
    assert finished == [phase.stage for phase in loadstone.of(model).report.phases]
    moved = [event for event in events if isinstance(event, BytesMoved)]
    assert moved[-1].done_bytes == moved[-1].total_bytes


def test_loads_from_several_threads_are_equal(llama_folder: Path) -> None:
    expected = loadstone.load(llama_folder).state_dict()
    models: list[torch.nn.Module] = []
    dtypes = ["bfloat16", "float32"] * 3
    threads = [
        threading.Thread(target=lambda dtype=dtype: models.append(loadstone.load(llama_folder, dtype=dtype)))
        for dtype in dtypes
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(models) == len(dtypes)
    for model in models:
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor.to(torch.bfloat16), expected[name])
    assert torch.get_default_dtype() == torch.float32
    assert gc.isenabled()


def test_the_collector_runs_again_after_a_failed_load(tmp_path: Path) -> None:
    with pytest.raises(loadstone.LoadstoneError, match="found an empty folder"):
        loadstone.load(tmp_path)
    assert gc.isenabled()


def test_a_missing_tensor_is_an_error_that_names_it(llama_copy: Path) -> None:
    path = llama_copy / "model.safetensors"
    state = load_file(path)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, path)
    with pytest.raises(CheckpointMismatch, match=r"1 parameters are in no file: model\.layers\.1\.mlp\.up_proj"):
        loadstone.load(llama_copy)
    model = loadstone.load(llama_copy, allow_missing=["*.up_proj.weight"])
    assert model.model.layers[1].mlp.up_proj.weight.abs().sum() > 0


def test_a_left_over_tensor_is_an_error_unless_not_strict(llama_copy: Path) -> None:
    path = llama_copy / "model.safetensors"
    save_file({**load_file(path), "model.layers.0.extra.weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointMismatch, match=r"1 tensors belong to nothing in the module: model\.layers\.0\.extra"):
        loadstone.load(llama_copy)
    assert any("left out" in note for note in _notes(loadstone.load(llama_copy, strict=False)))


def test_a_wrong_shape_is_an_error_with_both_shapes(llama_copy: Path) -> None:
    rewrite(llama_copy, {"vocab_size": 65})
    with pytest.raises(CheckpointMismatch, match=r"expected \[65, 32\], found \[64, 32\]"):
        loadstone.load(llama_copy)


def test_another_models_weights_fail_even_when_not_strict(llama_copy: Path) -> None:
    save_file({"encoder.weight": torch.ones(2)}, llama_copy / "model.safetensors")
    with pytest.raises(CheckpointMismatch, match="none of its 1 tensors belongs to the module"):
        loadstone.load(llama_copy, strict=False)


@pytest.mark.parametrize("field", ["num_hidden_layers", "num_experts"])
def test_a_config_that_claims_ten_million_parts_is_not_built(llama_copy: Path, field: str) -> None:
    rewrite(llama_copy, {field: 10_000_000})
    with pytest.raises(InvalidConfig, match=rf"{field} is 10,000,000, but the checkpoint holds only 21 tensors"):
        loadstone.load(llama_copy)


def test_an_unknown_model_type_suggests_known_ones(llama_copy: Path) -> None:
    rewrite(llama_copy, {"model_type": "lama"})
    with pytest.raises(UnknownArchitecture, match=r'model_type "lama" is not one .* Did you mean .*llama'):
        loadstone.load(llama_copy)


def test_a_config_without_model_type_says_so(llama_copy: Path) -> None:
    rewrite(llama_copy, {"model_type": None})
    with pytest.raises(InvalidConfig, match='there is no "model_type"'):
        loadstone.load(llama_copy)


def test_an_unknown_class_suggests_known_ones(llama_folder: Path) -> None:
    with pytest.raises(UnknownArchitecture, match=r"no model class LlamaForCausalML\. Did you mean LlamaForCausalLM"):
        loadstone.load(llama_folder, architecture="LlamaForCausalML")


def test_a_config_class_that_refuses_is_reported_in_a_sentence(llama_copy: Path) -> None:
    rewrite(llama_copy, {"hidden_size": "wide"})
    with pytest.raises(InvalidConfig, match=r"config\.json: LlamaConfig does not accept it"):
        loadstone.load(llama_copy)


def test_code_in_a_checkpoint_is_not_run(llama_copy: Path) -> None:
    (llama_copy / "modeling.py").write_text("raise SystemExit('code was run')")
    rewrite(
        llama_copy,
        {"model_type": "brandnew", "auto_map": {"AutoConfig": "modeling.Config", "AutoModel": "modeling.Model"}},
    )
    with pytest.raises(RemoteCodeRefused, match=r"modeling\.Config.* is not run unless you read it"):
        loadstone.load(llama_copy)


def test_quantised_weights_are_refused_by_name(llama_copy: Path) -> None:
    rewrite(llama_copy, {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(UnsupportedFormat, match=r"quantised \(gptq\)"):
        loadstone.load(llama_copy)


def test_a_device_that_is_not_there_is_refused(llama_folder: Path) -> None:
    with pytest.raises(DeviceUnavailable, match=r'device="xla:7" is not on this machine, which has: .*cpu'):
        loadstone.load(llama_folder, device="xla:7")


def test_a_dtype_that_is_none_is_refused(llama_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype='int8': expected \"auto\" or a floating-point dtype"):
        loadstone.load(llama_folder, dtype="int8")


def test_a_model_that_was_not_loaded_here_is_unknown() -> None:
    with pytest.raises(ValueError, match=r"this Linear was not loaded by loadstone\.load"):
        loadstone.of(torch.nn.Linear(1, 1))


def test_the_way_to_another_device_runs_on_one_without_memory(llama_folder: Path) -> None:
    """The meta device stands in for an accelerator: tensors are cast there and nothing is computed on the host."""
    model = loadstone.load(llama_folder, device="meta", dtype="float32")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert loadstone.of(model).report.device.value == "meta"


def test_code_in_a_checkpoint_runs_when_it_is_trusted(tmp_path: Path) -> None:
    (tmp_path / "modeling_own.py").write_text(
        """
import torch
from transformers import PreTrainedConfig, PreTrainedModel

class OwnConfig(PreTrainedConfig):
    model_type = "brandnew"
    width: int = 3

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.linear = torch.nn.Linear(config.width, config.width)
        self.post_init()
    def forward(self, x):
        return self.linear(x)
"""
    )
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    config = {"model_type": "brandnew", "architectures": ["OwnModel"], "auto_map": auto_map, "width": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"linear.weight": torch.ones(2, 2), "linear.bias": torch.ones(2)}, tmp_path / "model.safetensors")
    model = loadstone.load(tmp_path, trust_remote_code=True)
    assert torch.equal(model(torch.ones(1, 2)), torch.full((1, 2), 3.0))
    with pytest.raises(RemoteCodeRefused, match="OwnConfig"):
        loadstone.load(tmp_path)


def test_tied_tensors_of_a_pickle_stay_one(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for dtype in ("float32", "bfloat16"):
        loaded = loadstone.load(tmp_path, dtype=dtype)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.to(loaded.dtype))


def test_nothing_is_read_for_a_checkpoint_that_lacks_a_tensor(
    llama_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loadstone.stream.materialize import Materializer

    path = llama_copy / "model.safetensors"
    state = load_file(path)
    del state["model.norm.weight"]
    save_file(state, path)
    monkeypatch.setattr(Materializer, "run", lambda *_: pytest.fail("tensors were made"))
    with pytest.raises(CheckpointMismatch, match=r"model\.norm\.weight"):
        loadstone.load(llama_copy)
