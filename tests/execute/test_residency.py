"""A model whose units come from its files in each pass computes what the resident model computes, bit by bit."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "architecture"))

from test_gguf_families import CASES, build, gguf_tensors, metadata

import builders
import loadstone
from gguf_builders import Gguf, Stored
from loadstone.api.begun import Request
from loadstone.api.load import carry_out
from loadstone.errors import FileChanged, LoadstoneError, StreamedModel, UnreadableFile
from loadstone.execute.prefetch import Order
from loadstone.execute.slots import State
from loadstone.execute.values import Streaming, StreamStats
from loadstone.hardware.memory import resident

SPREAD = [
    ("causal", "llama"),
    ("causal", "qwen2"),
    ("causal", "qwen3_moe"),
    ("causal", "mixtral"),
    ("causal", "gemma3_text"),
    ("causal", "gpt2"),
    ("causal", "mamba"),
    ("causal", "falcon"),
    ("seq2seq", "t5"),
    ("seq2seq", "bart"),
    ("encoder", "bert"),
    ("encoder", "albert"),
    ("speech", "whisper"),
    ("contrastive", "clip"),
    ("ctc", "wav2vec2"),
]
RESIDENT_SHARES = (0.0, 0.3, 0.7)
PROMPT = torch.arange(3, 15)[None]


pytestmark = pytest.mark.usefixtures("quiet")


def units_of(model: nn.Module, resident_share: float = 0.0) -> tuple[str, ...]:
    """Every numbered block, every embedding and every head, less a share of them that is spread evenly."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{unit}.") for unit in found)
        is_block = name.rpartition(".")[2].isdigit() and not isinstance(module, nn.ModuleList)
        is_end = isinstance(module, nn.Embedding) or name in ("lm_head", "proj_out", "cls.predictions")
        if not inside and (is_block or is_end):
            found.append(name)
    kept = round(resident_share * len(found))
    return tuple(
        unit for index, unit in enumerate(found) if not (index * kept // len(found)) < (index + 1) * kept // len(found)
    )


def streamed(
    path: Path,
    units: tuple[str, ...],
    *,
    num_slots: int = 2,
    slot_bytes: int = 0,
    read_bytes: int | None = None,
    slices: dict[str, int] | None = None,
    dtype: str | None = None,
    **more: Any,
) -> Any:
    streaming = Streaming(
        units=units, num_slots=num_slots, slot_bytes=slot_bytes, read_bytes=read_bytes, slices=slices or {}
    )
    return carry_out(Request(source=path, dtype=dtype, streaming=streaming, **more))


def stats(model: nn.Module) -> StreamStats:
    found = loadstone.of(model).stats()
    assert found is not None
    return found


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) > 0 and all(map(torch.equal, ours, theirs))


def batched(inputs: dict[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
    """The same inputs `size` times, each a little different."""
    return {
        name: torch.cat(
            [tensor + index if not tensor.is_floating_point() else tensor * (1 + index) for index in range(size)]
        )
        for name, tensor in inputs.items()
    }


@pytest.mark.parametrize(("number", "kind", "model_type"), [(i, *one) for i, one in enumerate(SPREAD)])
def test_the_numbers_are_those_of_the_resident_model(tmp_path: Path, number: int, kind: str, model_type: str) -> None:
    # Casts, shares, slots and batches go round so that each occurs with many types.
    dtype = ("float32", "auto")[number // 2 % 2]
    made = builders.tiny_model(model_type, kind, torch.bfloat16)
    builders.write_checkpoint(made, tmp_path, "sharded safetensors" if number % 2 else "safetensors")
    more: dict[str, Any] = {"dtype": dtype, "architecture": type(made).__name__}
    whole = loadstone.load(tmp_path, **more)
    share, num_slots, batch = RESIDENT_SHARES[number % 3], 1 + number % 4, 1 + number // 3 % 4
    model = streamed(tmp_path, units_of(whole, share), num_slots=num_slots, **more)
    inputs = batched(builders.sample_inputs(whole, kind), batch)
    expected = builders.outputs(whole, inputs)
    for _ in range(3):
        assert equal(builders.outputs(model, inputs), expected)
    if getattr(model, "can_generate", lambda: False)() and kind in ("causal", "seq2seq"):
        options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
        options |= {"decoder_start_token_id": 0} if kind == "seq2seq" else {}
        tokens = inputs["input_ids"]
        assert torch.equal(model.generate(tokens, **options), whole.generate(tokens, **options))
    assert stats(model).streamed_bytes > 0
    assert loadstone.of(model).report.notes == loadstone.of(whole).report.notes
    loadstone.of(model).close()


def quantised(stored: dict[str, Stored]) -> dict[str, Stored]:
    """Matrices as Q8_0 blocks where their rows are whole blocks."""
    from gguf import GGMLQuantizationType, quants

    made = {}
    for name, tensor in stored.items():
        if len(tensor.shape) == 2 and tensor.shape[1] % 32 == 0 and tensor.data is not None:
            array = np.frombuffer(tensor.data, np.float32).reshape(tensor.shape)
            made[name] = Stored(tensor.shape, 8, quants.quantize(array, GGMLQuantizationType.Q8_0).tobytes())
        else:
            made[name] = tensor
    return made


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize(
    "name", ["llama", "llama, tied", "mixtral", "gemma2", "gpt2", "gptneox", "falcon 40b", "gpt-oss", "t5"]
)
def test_a_gguf_gives_the_numbers_of_the_resident_model(tmp_path: Path, name: str, dtype: str | None) -> None:
    case = CASES[name]
    tensors = quantised(gguf_tensors(build(case), case))
    path = Gguf(metadata(case), tensors).write(tmp_path / "m.gguf")
    whole = loadstone.load(path, dtype=dtype)
    model = streamed(path, units_of(whole), dtype=dtype)
    tokens = torch.arange(3, 40)[None]
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if case.seq2seq else {})
    for _ in range(3):
        assert equal(builders.outputs(model, inputs), builders.outputs(whole, inputs))
    assert loadstone.of(model).report.notes == loadstone.of(whole).report.notes
    loadstone.of(model).close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    config = builders.tiny_config("llama")
    config.num_hidden_layers, config.tie_word_embeddings = 6, False
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


LAYERS = tuple(f"model.layers.{number}" for number in range(6))


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """The folder, with files that a test may damage."""
    import shutil

    return Path(shutil.copytree(folder, tmp_path / "llama"))


def logits(model: Any, tokens: torch.Tensor = PROMPT) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(tokens).logits
    return found


def test_the_second_pass_foresees_every_unit(folder: Path) -> None:
    model = streamed(folder, (*LAYERS, "lm_head", "model.embed_tokens"), num_slots=3)
    logits(model)
    before = stats(model)
    logits(model)
    after = stats(model)
    assert (after.passes, after.uses - before.uses, after.unforeseen) == (2, 7, 0)
    # Each unit once, though the ring reads on into the next pass; the rows of the prompt are kept.
    assert after.streamed_bytes - before.streamed_bytes == after.pass_bytes


def test_units_that_all_fit_into_the_slots_are_read_once(folder: Path) -> None:
    model = streamed(folder, LAYERS[:2], num_slots=2)
    for _ in range(3):
        logits(model)
    assert stats(model).streamed_bytes == stats(model).pass_bytes


class Odd(nn.Module):
    """Blocks that are called twice or left out, whose weight is taken directly, or that keep hold of their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
        self.direct = Direct()
        self.recurrent = nn.GRU(16, 16)
        self.tail = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        table = self.direct(x)
        x = self.twice(self.twice(x) + table[0])
        for number, layer in enumerate(self.tail):
            if number != 1 or x.sum() > 0:
                x = layer(x)
        return self.recurrent(x)[0], table


class Direct(nn.Module):
    """Gives away a part of its own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.weight[:2] if self.inner(x).isfinite().all() else x


@pytest.mark.parametrize(
    "units", [("twice", "direct", "recurrent", "tail.0", "tail.1"), ("twice", "twice.0", "tail.1")]
)
def test_unusual_control_flow_gives_the_same_numbers(tmp_path: Path, units: tuple[str, ...]) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path / "shared.safetensors"
    save_file(Odd().state_dict(), path)
    whole = loadstone.load(path, into=Odd)
    model = streamed(path, units, num_slots=1, into=Odd)
    with torch.inference_mode():
        for number in range(4):
            x = torch.randn(3, 16) * 10 + number
            assert equal(list(model(x)), list(whole(x)))


def test_threads_take_turns(folder: Path) -> None:
    whole, model = loadstone.load(folder), streamed(folder, LAYERS)
    prompts = [PROMPT + number for number in range(4)]
    expected = [logits(whole, prompt) for prompt in prompts]
    wrong: list[int] = []

    def work(number: int) -> None:
        found = [logits(model, prompts[number]) for _ in range(5)]
        wrong.extend(number for one in found if not torch.equal(one, expected[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert stats(model).passes == 20


class Stack(nn.Sequential):
    """The least that has all of it: rows that are looked up, blocks, a head."""

    def __init__(self) -> None:
        super().__init__(nn.Embedding(500, 64), *(nn.Linear(64, 64) for _ in range(4)), nn.Linear(64, 500))


def test_memory_does_not_grow(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "stack.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in Stack().state_dict().items()}, path)
    model = streamed(path, tuple("012345"), dtype="float32", into=Stack)
    tokens = torch.randint(500, (320, 8))
    with torch.inference_mode():
        for prompt in tokens[:20]:
            model(prompt)
        before = resident().anonymous_bytes
        for prompt in tokens[20:]:
            model(prompt)
    assert resident().anonymous_bytes - before < 2_000_000
    assert (stats(model).passes, stats(model).num_units) == (320, 5)


@pytest.mark.parametrize("change", ["replace", "write", "truncate", "remove"])
def test_a_file_that_changes_while_the_model_runs_is_named(copied: Path, change: str) -> None:
    path = copied / "model.safetensors"
    model = streamed(copied, (*LAYERS, "model.embed_tokens"))
    logits(model)
    if change == "replace":
        other = path.with_suffix(".other")
        other.write_bytes(bytes(path.stat().st_size))
        other.rename(path)
    elif change == "write":
        with path.open("r+b") as file:
            file.seek(-1000, os.SEEK_END)
            file.write(bytes(1000))
        os.utime(path, ns=(0, 0))
    elif change == "truncate":
        os.truncate(path, 100)
    else:
        path.unlink()
    for _ in range(2):
        with pytest.raises(
            UnreadableFile if change == "remove" else LoadstoneError, match=r"model\.safetensors: expected"
        ):
            logits(model)


def test_a_replaced_file_is_a_changed_file_for_the_blocks_too(copied: Path) -> None:
    model = streamed(copied, LAYERS)
    logits(model)
    os.utime(copied / "model.safetensors", ns=(0, 0))
    with pytest.raises(FileChanged, match="was replaced or written to"):
        logits(model)


def test_after_an_error_in_a_block_the_model_still_works(folder: Path) -> None:
    model = streamed(folder, LAYERS)
    expected = logits(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    handle = model.model.layers[3].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        logits(model)
    handle.remove()
    assert torch.equal(logits(model), expected)


def interrupted(model: Any, layer: int) -> None:
    """A forward that ends in Ctrl-C."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[layer].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model)
    handle.remove()


def test_after_an_interrupt_the_model_still_works(folder: Path) -> None:
    model = streamed(folder, LAYERS)
    expected = logits(model)
    interrupted(model, 3)
    assert torch.equal(logits(model), expected)
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(logits(model)))
    thread.start()
    thread.join(30)
    assert equal(found, [expected])


def test_gradients_are_refused(folder: Path) -> None:
    for units in (LAYERS, ("model.embed_tokens",)):
        model = streamed(folder, units)
        with pytest.raises(StreamedModel, match=r"forward without gradients.*Use torch\.inference_mode\(\)"):
            model(PROMPT)
        assert logits(model).shape[:2] == PROMPT.shape


@pytest.mark.parametrize("name", ["state_dict", "half", "double", "save_pretrained"])
def test_what_needs_all_weights_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    model = streamed(folder, LAYERS)
    logits(model)
    refused = r"model\.layers\.0\.\S+: expected its elements for \w+, found a parameter that is read from its file only"
    with pytest.raises(StreamedModel, match=refused):
        getattr(model, name)(*([tmp_path] if name == "save_pretrained" else []))
    with pytest.raises(StreamedModel, match=refused):
        model.model.layers[0].mlp.gate_proj.weight.sum()


def test_facts_are_told_without_the_weights(folder: Path) -> None:
    whole, model = loadstone.load(folder), streamed(folder, LAYERS)
    for copying in (lambda: copy.deepcopy(model), lambda: pickle.dumps(model)):
        with pytest.raises(StreamedModel, match="to copy or pickle, found one that is streamed"):
            copying()
    assert model.to("cpu") is model
    assert model.to(torch.bfloat16) is model
    whole.to(torch.bfloat16)  # casts the buffers of both
    assert (model.device, model.dtype) == (whole.device, whole.dtype)
    assert model.num_parameters() == whole.num_parameters()
    assert model.get_memory_footprint() == whole.get_memory_footprint()
    weight = model.model.layers[0].mlp.gate_proj.weight
    assert repr(weight) == (
        "StreamedParameter(model.layers.0.mlp.gate_proj.weight, [96, 64], torch.bfloat16, streamed with model.layers.0)"
    )
    assert torch.equal(logits(model), logits(whole))


def test_what_cannot_be_streamed_is_kept_and_noted(folder: Path) -> None:
    model = streamed(folder, ("model.layers", "nowhere", *LAYERS[:2]))
    notes = "\n".join(loadstone.of(model).report.notes)
    assert "model.layers is kept in memory: it is a container of modules" in notes
    assert "nowhere is kept in memory: it is no module" in notes
    assert torch.equal(logits(model), logits(loadstone.load(folder)))


def test_a_closed_model_says_so(folder: Path) -> None:
    model = streamed(folder, LAYERS)
    loadstone.of(model).close()
    with pytest.raises(StreamedModel, match="its model was closed"):
        logits(model)


def test_threads_end_with_the_model(folder: Path) -> None:
    model = streamed(folder, LAYERS)
    logits(model)
    residency = weakref.ref(loadstone.of(model).residency)  # type: ignore[arg-type]
    del model
    gc.collect()
    assert residency() is None
    assert not [thread for thread in threading.enumerate() if thread.name in ("loadstone-read", "loadstone-expand")]


def test_a_resident_model_has_nothing_to_tell(folder: Path) -> None:
    model = loadstone.load(folder)
    assert loadstone.of(model).stats() is None
    loadstone.of(model).close()
    assert logits(model).shape[:2] == PROMPT.shape


def test_the_slots_are_where_the_parameters_are_and_only_then(folder: Path) -> None:
    model = streamed(folder, LAYERS, num_slots=2)
    residency: Any = loadstone.of(model).residency
    slots = [(slot.data.data_ptr(), slot.data.numel()) for slot in residency._ring.slots]
    seen: list[bool] = []

    def look(module: nn.Module, *_: Any) -> None:
        pointers = [parameter.data_ptr() for parameter in module.parameters()]
        seen.append(any(all(begin <= pointer < begin + size for pointer in pointers) for begin, size in slots))
        assert [slot.state for slot in residency._ring.slots].count(State.USED) == 1

    for layer in model.model.layers:
        layer.register_forward_pre_hook(look)
    logits(model)
    assert seen == [True] * 6
    assert all(type(parameter).__name__ == "StreamedParameter" for parameter in model.model.layers.parameters())
    assert State.USED not in [slot.state for slot in residency._ring.slots]


def test_the_walk_is_learnt_with_what_came_before() -> None:
    order = Order(("a", "b", "shared"))
    assert order.coming(2) == ["a", "b"]
    walk = ["a", "shared", "b", "shared"]
    for unit in walk * 2:
        order.visit(unit)
    order.visit("a")
    assert order.coming(3) == ["shared", "b", "a"]
    order.visit("shared")
    assert order.coming(1) == ["b"]
    assert Order(("only",)).coming(3) == ["only"]
