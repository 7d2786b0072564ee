"""A head that comes in slices gives what the whole one gives, to the bit, in the memory of two of them."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_changing_files import CHANGES
from test_residency import PROMPT, equal, logits, stats, streamed, units_of
from torch.nn import functional

import builders
import loadstone
from loadstone.errors import LoadstoneError, StreamedModel
from loadstone.execute import sliced

VOCAB, WINDOW = 1501, 16384
LAYERS = ("model.layers.0", "model.layers.1")
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}

pytestmark = pytest.mark.usefixtures("quiet")


def written(folder: Path, model_type: str = "llama", kind: str = "causal", **changes: Any) -> Path:
    import transformers

    config = builders.tiny_config(model_type)
    for name, value in {"vocab_size": VOCAB, **changes}.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = getattr(transformers, builders.KINDS[kind].auto_class).from_config(config)
    builders.stir(model)
    return builders.write_checkpoint(model.to(torch.bfloat16), folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path, tie_word_embeddings=False)


def num_shown() -> int:
    return Path("/proc/self/maps").read_text().count("loadstone-slot")


def head_of(model: Any) -> str:
    """The parameter that the head multiplies with, as its checkpoint calls it."""
    head = model.get_output_embeddings().weight
    return next(name for name, one in model.named_parameters() if one is head).removesuffix(".weight")


@pytest.mark.parametrize(
    ("kind", "model_type", "changes"),
    [
        ("causal", "llama", {"tie_word_embeddings": False}),
        ("causal", "qwen2", {"tie_word_embeddings": True}),  # the table is looked up by rows as well
        ("causal", "gemma2", {}),  # what comes after the head changes it
        ("causal", "gpt2", {}),
        ("causal", "mamba", {}),
        ("causal", "mixtral", {}),
        ("seq2seq", "t5", {}),
        ("seq2seq", "bart", {}),
    ],
)
@pytest.mark.parametrize("streams_more", [False, True])
def test_the_numbers_are_those_of_the_resident_model(
    tmp_path: Path, kind: str, model_type: str, changes: dict[str, Any], streams_more: bool
) -> None:
    path = written(tmp_path, model_type, kind, **changes)
    whole: Any = loadstone.load(path)
    head = head_of(whole)
    units = tuple(dict.fromkeys((*(units_of(whole) if streams_more else ()), head)))
    model = streamed(path, units, slices={head: WINDOW})
    assert stats(model).window_bytes == 2 * WINDOW
    inputs = builders.sample_inputs(whole, kind)
    for _ in range(3):
        assert equal(builders.outputs(model, inputs), builders.outputs(whole, inputs))
    options: dict[str, Any] = GREEDY | ({"decoder_start_token_id": 0} if kind == "seq2seq" else {})
    for more in ({}, {"num_beams": 3}):
        found, expected = (one.generate(inputs["input_ids"], **options, **more) for one in (model, whole))
        assert torch.equal(found, expected)
    loadstone.of(model).close()


def test_each_pass_reads_all_of_it_once_and_takes_two_slices(folder: Path) -> None:
    model = streamed(folder, ("lm_head",), slices={"lm_head": WINDOW})
    logits(model)
    before = stats(model)
    for _ in range(4):
        logits(model)
    after, nbytes = stats(model), model.lm_head.weight.nbytes
    num_slices = -(-nbytes // (WINDOW - 8192))
    read = after.streamed_bytes - before.streamed_bytes
    assert nbytes == after.pass_bytes > 4 * WINDOW
    assert 4 * nbytes <= read <= 4 * (nbytes + num_slices * 8192)
    assert (after.memory_bytes, after.num_units) == (2 * WINDOW, 0)
    shown = num_shown()
    loadstone.of(model).park()
    gc.collect()
    assert num_shown() <= shown - 2 * (nbytes // WINDOW)  # each window was seen so often


@pytest.mark.parametrize("agrees", [True, False])
def test_where_slices_give_other_bits_the_whole_is_multiplied_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch, agrees: bool
) -> None:
    """On a machine whose library sums long rows in another order for a small matrix."""
    whole: Any = loadstone.load(folder)
    rows: list[int] = []
    real = functional.linear

    def linear(values: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows.append(matrix.shape[0])
        found = real(values, matrix, bias)
        return found if agrees or matrix.shape[0] == VOCAB else found + 1

    model = streamed(folder, ("lm_head",), slices={"lm_head": WINDOW})
    monkeypatch.setattr(sliced, "functional", SimpleNamespace(linear=linear))
    found = []
    for _ in range(2):
        found.append(logits(model))
        rows.append(0)
    monkeypatch.undo()
    assert all(torch.equal(one, logits(whole)) for one in found)
    first, second = rows[: rows.index(0)], rows[rows.index(0) + 1 : -1]
    assert first.count(VOCAB) == len(first) / 2  # each slice is compared once
    assert second.count(VOCAB) == (0 if agrees else len(second))


def test_nothing_of_the_matrix_is_copied_for_values_that_lie_apart(folder: Path) -> None:
    """As a prompt's last states do; torch copies a matrix that has no gradient then."""
    model = streamed(folder, ("lm_head",), slices={"lm_head": WINDOW})
    with torch.inference_mode():
        values = torch.randn(1, 8, model.config.hidden_size).bfloat16()[:, -1:]
        with torch.profiler.profile(profile_memory=True) as profile:
            for _ in range(2):  # with the whole, and with slices
                functional.linear(values, model.lm_head.weight)
    events: Any = profile.profiler
    allocated = [event.nbytes() for event in events.kineto_results.events() if event.name() == "[memory]"]
    assert 2 * VOCAB <= max(allocated) < model.lm_head.weight.nbytes / 4


def test_its_rows_elements_and_copies_are_refused_or_right(folder: Path) -> None:
    whole: Any = loadstone.load(folder)
    model = streamed(folder, ("lm_head",), slices={"lm_head": WINDOW})
    weight = model.lm_head.weight
    assert weight.requires_grad
    assert (weight.shape, weight.dtype) == (whole.lm_head.weight.shape, torch.bfloat16)
    with torch.inference_mode():
        values = torch.randn(2, 3, weight.shape[1]).bfloat16()
        assert torch.equal(functional.linear(values, weight), functional.linear(values, whole.lm_head.weight))
        bias = torch.randn(VOCAB).bfloat16()
        assert torch.equal(functional.linear(values, weight, bias), real_with_bias(values, whole, bias))
    for wrong in (weight.sum, weight.clone, lambda: values @ weight.T, lambda: copy.deepcopy(model)):
        with pytest.raises(StreamedModel):
            wrong()
    with pytest.raises(StreamedModel, match="without gradients"):
        model(PROMPT)


def real_with_bias(values: torch.Tensor, whole: Any, bias: torch.Tensor) -> torch.Tensor:
    return functional.linear(values, whole.lm_head.weight, bias)


def test_it_comes_back_whole_and_goes_again(folder: Path) -> None:
    whole = loadstone.load(folder)
    expected = logits(whole)
    model = streamed(folder, (*LAYERS, "lm_head"), slices={"lm_head": WINDOW})
    loaded = loadstone.of(model)
    assert torch.equal(logits(model), expected)
    loaded.park()
    assert torch.equal(logits(model), expected)
    loaded.limit(None)
    assert torch.equal(logits(model), expected)
    assert stats(model).window_bytes == 0
    total = sum(one.nbytes for one in whole.parameters())
    loaded.limit(total // 2)
    for _ in range(2):
        assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="expected at least"):
        loaded.limit(2 * WINDOW)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("ran_before", [False, True])
def test_a_file_that_changes_is_told_and_can_come_back(folder: Path, change: Any, ran_before: bool) -> None:
    expected = logits(loadstone.load(folder))
    model, (path,) = streamed(folder, ("lm_head",), slices={"lm_head": WINDOW}), folder.glob("*.safetensors")
    if ran_before:
        assert torch.equal(logits(model), expected)
    undo = change(path)
    for _ in range(2):
        with pytest.raises(LoadstoneError, match=path.name):
            logits(model)
    undo()
    for _ in range(2):
        assert torch.equal(logits(model), expected)


def test_one_that_is_cast_comes_in_slices_too(folder: Path) -> None:
    expected = logits(loadstone.load(folder, dtype="float32"))
    model = streamed(folder, (*LAYERS, "lm_head"), slices={"lm_head": WINDOW}, dtype="float32")
    assert (stats(model).window_bytes, stats(model).num_units) == (2 * WINDOW, len(LAYERS))
    for _ in range(2):
        assert torch.equal(logits(model), expected)


def test_what_has_no_rows_of_its_own_comes_whole_and_is_noted(folder: Path) -> None:
    expected = logits(loadstone.load(folder))
    model = streamed(folder, ("lm_head",), slices={"lm_head": 8192})  # which rows do not fit into
    assert (stats(model).window_bytes, stats(model).num_units) == (0, 1)
    assert any("lm_head.weight comes whole" in note for note in loadstone.of(model).report.notes)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("streams_more", [False, True])
def test_a_whole_model_can_be_compiled(folder: Path, streams_more: bool) -> None:
    torch._dynamo.reset()
    expected = logits(loadstone.load(folder))
    units = ("model.embed_tokens", *(LAYERS if streams_more else ()), "lm_head")  # of the table rows are looked up
    model: Any = streamed(folder, units, slices={"lm_head": WINDOW})
    forwards = [vars(one).get("forward") for one in model.modules()]
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        assert torch.equal(logits(compiled), expected)
    assert stats(model).window_bytes == 2 * WINDOW
    assert sum(one is not None for one in forwards) == 2  # the table's and the head's are left alone
    loadstone.of(model).limit(None)
    assert torch.equal(logits(compiled), expected)


def test_a_thousand_passes_take_no_more_memory(folder: Path) -> None:
    from loadstone.hardware.memory import resident

    model = streamed(folder, ("lm_head",), slices={"lm_head": WINDOW})
    for _ in range(50):
        logits(model)
    before = resident().anonymous_bytes
    for _ in range(1000):
        logits(model)
    assert resident().anonymous_bytes <= before + (1 << 20)
