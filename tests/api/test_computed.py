"""What only torch can compute of streamed parts comes from a file of the cache, and is the same to the last bit."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import builders
import loadstone
from loadstone.api import computed
from loadstone.api.begun import Request
from loadstone.api.load import carry_out
from loadstone.checkpoint.cache import cache_folder
from loadstone.execute.values import Streaming

UNITS = ("model.language_model.layers.0", "model.language_model.layers.1")


@dataclass(frozen=True)
class Sample:
    """A checkpoint whose experts are stored transposed, and what its model computes."""

    folder: Path
    inputs: dict[str, torch.Tensor]
    expected: list[torch.Tensor]

    def is_same(self, model: Any) -> bool:
        found = builders.outputs(model, self.inputs)
        return all(map(torch.equal, found, self.expected))


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    model = builders.tiny_model("qwen3_vl_moe", "image-text")
    folder = builders.write_checkpoint(model, tmp_path_factory.mktemp("transposed"))
    inputs = builders.sample_inputs(model, "image-text")
    return Sample(folder, inputs, builders.outputs(loadstone.load(folder), inputs))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOADSTONE_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"
    return tmp_path / "cache" / "computed"


def streamed(folder: Path, **more: Any) -> Any:
    return carry_out(Request(source=folder, streaming=Streaming(units=UNITS, num_slots=2), **more))


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.safetensors"))


def notes(model: Any) -> str:
    return " ".join(loadstone.of(model).report.notes)


def test_the_experts_are_streamed_and_the_numbers_are_those_of_the_resident_model(sample: Sample, cache: Path) -> None:
    model = streamed(sample.folder)
    assert "computed once, and kept in" in notes(model)
    assert "kept in memory" not in notes(model)
    assert all(type(one).__name__ == "StreamedParameter" for one in model.model.language_model.layers.parameters())
    assert sample.is_same(model)
    assert sample.is_same(model)
    assert len(files(cache)) == 1


def test_the_next_load_finds_the_file_and_computes_nothing(
    sample: Sample, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed(sample.folder)
    (file,) = files(cache)
    written = file.stat().st_ino
    monkeypatch.setattr(computed, "_values", lambda *_: pytest.fail("computed again"))
    model = streamed(sample.folder)
    assert f"found in {file}" in notes(model)
    assert sample.is_same(model)
    assert [path.stat().st_ino for path in files(cache)] == [written]


def test_other_files_other_dtypes_and_other_configs_are_computed_anew(
    sample: Sample, cache: Path, tmp_path: Path
) -> None:
    streamed(sample.folder)
    streamed(sample.folder, dtype="bfloat16")
    assert len(files(cache)) == 2
    (weights,) = sample.folder.glob("*.safetensors")
    before = weights.stat()
    os.utime(weights, (before.st_atime, before.st_mtime + 1))
    try:
        assert "computed once" in notes(streamed(sample.folder))
        assert len(files(cache)) == 3
    finally:
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    config = sample.folder / "config.json"
    text = config.read_text()
    try:
        config.write_text(text.replace("{", '{"said": "otherwise",', 1))
        assert "computed once" in notes(streamed(sample.folder))
    finally:
        config.write_text(text)
    assert len(files(cache)) == 4


def test_in_bfloat16_too(sample: Sample) -> None:
    expected = builders.outputs(loadstone.load(sample.folder, dtype="bfloat16"), sample.inputs)
    found = builders.outputs(streamed(sample.folder, dtype="bfloat16"), sample.inputs)
    assert all(map(torch.equal, found, expected))


def test_without_room_they_stay_in_memory(sample: Sample, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(computed.LIMIT_VARIABLE, "1 kB")
    model = streamed(sample.folder)
    assert "computed weights are kept in memory" in notes(model)
    assert "found a limit of 1.00 kB" in notes(model)
    assert sample.is_same(model)
    assert not files(cache)


def test_a_cache_that_cannot_be_written_is_no_fault(sample: Sample, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    model = streamed(sample.folder)
    assert "set LOADSTONE_CACHE to a folder that may be written to" in notes(model)
    assert sample.is_same(model)


def test_a_limit_that_is_no_size_is_refused(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(computed.LIMIT_VARIABLE, "plenty")
    with pytest.raises(ValueError, match=r"LOADSTONE_COMPUTED_LIMIT: .*plenty"):
        streamed(sample.folder)


def test_a_model_keeps_its_file_and_lets_it_go(sample: Sample, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed(sample.folder)
    (file,) = files(cache)
    monkeypatch.setenv(computed.LIMIT_VARIABLE, str(file.stat().st_size + 1000))
    other = streamed(sample.folder, dtype="bfloat16")
    assert "computed weights are kept in memory" in notes(other)
    assert files(cache) == [file]
    assert sample.is_same(model)
    del model
    third = streamed(sample.folder, dtype="bfloat16")
    assert "computed once" in notes(third)
    assert file not in files(cache)
    assert len(files(cache)) == 1


def test_it_is_parked_and_woken_with_the_rest(sample: Sample) -> None:
    model = streamed(sample.folder)
    assert sample.is_same(model)
    loadstone.of(model).park()
    assert sample.is_same(model)
    loadstone.of(model).limit(None)
    assert not any(type(one).__name__ == "StreamedParameter" for one in model.parameters())
    assert sample.is_same(model)


def test_a_file_that_is_lost_while_running_is_named(sample: Sample, cache: Path) -> None:
    model = streamed(sample.folder)
    (file,) = files(cache)
    file.unlink()
    with pytest.raises(loadstone.errors.LoadstoneError, match=file.name):
        builders.outputs(model, sample.inputs)
