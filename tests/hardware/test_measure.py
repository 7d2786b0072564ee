"""Measuring the disk, the memory and the devices, and what is remembered of it."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loadstone.hardware import measure, measure_compute, measure_layer, measured
from loadstone.hardware.measured import MeasuredDevice
from loadstone.hardware.spec import ComputeRate, Cpu, Device, Machine, Rates, TokensRate

RATE = ComputeRate(weight_bytes_per_s=1e9, flops_per_s=1e12)
HOST = Device(id="cpu", kind="cpu", name="a processor", total_bytes=1 << 34, free_bytes=1 << 33)
GPU = Device(id="cuda:0", kind="cuda", name="a GPU", total_bytes=1 << 33, free_bytes=1 << 32, link_bytes_per_s=1e10)
MACHINE = Machine(devices=(GPU, HOST), cpu=Cpu(name="a processor", num_cores=4))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring a little takes little time."""
    for name in ("_MEMORY_BYTES", "_DISK_BYTES", "_EXPANDED_BYTES"):
        monkeypatch.setattr(measure, name, 16 << 20)
    for name, value in {"_OUT": 64, "_IN": 64, "_HOST_WEIGHT_BYTES": 1 << 18, "_LINK_BYTES": 1 << 16}.items():
        monkeypatch.setattr(measure_compute, name, value)


@pytest.mark.usefixtures("small")
def test_rates_are_measured_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(9 << 20))
    rates = measure.measure(weights, tmp_path / "cache")
    for rate in (rates.cached_bytes_per_s, rates.copy_bytes_per_s, rates.touch_bytes_per_s, rates.expand_bytes_per_s):
        assert rate is not None
        assert rate > 1e6
    monkeypatch.setattr(measure, "measure_rates", lambda _: pytest.fail("measured again"))
    assert measure.measure(weights, tmp_path / "cache") == rates


@pytest.mark.usefixtures("small")
def test_a_cache_that_cannot_be_written_costs_only_the_next_measurement(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(5 << 20))
    (tmp_path / "cache").touch()
    assert measure.measure(weights, tmp_path / "cache").copy_bytes_per_s
    assert measured.known_rates(weights, tmp_path / "cache") is None


@pytest.mark.parametrize("content", ["", "[1]", '{"bananas": 1}', '{"disk_bytes_per_s": 1e9, "copy_bytes_per_s": 1e9}'])
def test_a_damaged_or_older_cache_is_as_none(tmp_path: Path, content: str) -> None:
    measured.remember_rates(Rates(disk_bytes_per_s=1e9), tmp_path, tmp_path)
    assert measured.known_rates(tmp_path / "to come", tmp_path) == Rates(disk_bytes_per_s=1e9)
    (file,) = (tmp_path / "rates").iterdir()
    file.write_text(content)
    assert measured.known_rates(tmp_path, tmp_path) is None


def test_a_number_that_cannot_be_measured_is_not_believed(tmp_path: Path) -> None:
    measured.remember_rates(Rates(disk_bytes_per_s=-1.0), tmp_path, tmp_path)
    assert measured.known_rates(tmp_path, tmp_path) is None


def test_a_disk_that_refuses_direct_reads_has_no_cold_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(5 << 20))

    def refuse(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "preadv", refuse)
    assert measure._read_rate(weights, os.O_RDONLY, 2, 1) is None
    monkeypatch.setattr(os, "open", refuse)
    assert measure._read_rate(weights, os.O_RDONLY, 2, 1) is None


def test_a_disk_that_is_fast_at_first_is_believed_only_what_it_does_most_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(13 << 20))
    monkeypatch.setattr(measure, "_LOOK_BYTES", 4 << 20)
    rates = iter([3e9, 1.2e9, 1e9])
    seen: list[list[int]] = []

    def look(_: int, offsets: range, *__: object) -> float:
        seen.append(list(offsets))
        return next(rates)

    monkeypatch.setattr(measure, "_rate_of_reads", look)
    assert measure._read_rate(weights, os.O_RDONLY, 2, 8) == 1.2e9
    assert seen == [[0], [4 << 20], [8 << 20]]


def test_the_sample_is_the_largest_file_or_one_that_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_DISK_BYTES", 8 << 20)
    folder = tmp_path / "model"
    with measure._sample(folder) as path:
        assert path.stat().st_size == 8 << 20
        assert not folder.exists()
    assert list(tmp_path.iterdir()) == []
    folder.mkdir()
    (folder / "small").write_bytes(bytes(9))
    (folder / "large").write_bytes(bytes(8 << 20))
    with measure._sample(folder) as path:
        assert path.name == "large"
    with measure._sample(folder / "small") as path:
        assert path.name == "small"


@pytest.mark.usefixtures("small")
def test_products_are_measured_for_every_dtype_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure_compute.measure_compute(HOST).keys() == {"float32", "bfloat16", "float16"}
    linear = measure_compute.linear

    def no_bfloat16(tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if weights.dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return linear(tokens, weights)

    monkeypatch.setattr(measure_compute, "linear", no_bfloat16)
    found = measure_compute.measure_compute(HOST)
    assert found.keys() == {"float32", "float16"}
    assert all(rate.weight_bytes_per_s > 0 and rate.flops_per_s > 0 for rate in found.values())


@pytest.mark.usefixtures("small")
def test_what_was_taken_of_a_gpu_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    module = SimpleNamespace(synchronize=lambda: calls.append("wait"), empty_cache=lambda: calls.append("release"))
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    measure_compute.measure_compute(HOST)
    assert calls.count("release") == 1
    assert calls[-1] == "release"
    assert "wait" in calls


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("kind", "pinned"), [("cuda", True), ("xpu", True), ("mps", False)])
def test_the_link_is_measured_from_page_locked_memory_where_there_is_such(
    monkeypatch: pytest.MonkeyPatch, kind: str, pinned: bool
) -> None:
    asked = []

    def ones(*shape: int, pin_memory: bool, dtype: torch.dtype) -> torch.Tensor:
        asked.append(pin_memory)
        return torch.full(shape, 1, dtype=dtype)

    monkeypatch.setattr(torch, "ones", ones)
    device = replace(HOST, kind=kind)  # its id stays the host's: the copy is a real one
    assert measure_compute.measure_link(device) > 0
    assert asked == [pinned]


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer does beside its products is known."""
    figures = {"attention_flops_per_s": 4e9, "activation_bytes_per_s": 5e9, "step_s": 6e-5}
    for name, figure in figures.items():
        monkeypatch.setattr(measure_compute, name, lambda *_, figure=figure: figure)


@pytest.mark.usefixtures("beside")
def test_rates_are_bytes_and_operations_over_the_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_compute, "_OUT", 8)
    monkeypatch.setattr(measure_compute, "_IN", 4)
    few = [0.5] * 4 + [0.25] * 12
    times = iter([9.0, 0.1, 0.2, 0.1, 1e-4, 5.0, 0.2, 0.3, 0.4, *few])
    monkeypatch.setattr(measure_compute, "_AT_MOST_S", 10.0)
    monkeypatch.setattr(measure_compute, "_timed", lambda *_: next(times))
    rate = measure_compute._rate(torch.zeros(3, 8, 4))
    assert rate.weight_bytes_per_s == 3 * 8 * 4 * 4 / 0.1
    assert rate.flops_per_s == 2 * 512 * 8 * 4 / 0.3
    assert rate.few_tokens == tuple(
        TokensRate(tokens=tokens, flops_per_s=2 * tokens * count * 8 * 4 / seconds)
        for tokens, count, seconds in ((2, 3, 0.5), (4, 1, 0.25), (16, 1, 0.25), (64, 1, 0.25))
    )
    assert (rate.query_flops_per_s, rate.attention_flops_per_s) == (4e9, 4e9)
    assert (rate.activation_bytes_per_s, rate.step_s) == (5e9, 6e-5)


@pytest.mark.usefixtures("beside")
def test_a_slow_device_is_measured_with_fewer_tokens_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([2.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(measure_compute, "_timed", lambda *_: next(times))
    rate = measure_compute._rate(torch.zeros(1, 2048, 8192, device="meta"))
    assert rate.weight_bytes_per_s == 2048 * 8192 * 4 / 2.0
    assert rate.flops_per_s == 2 * 128 * 2048 * 8192 / 3.0
    assert [few.tokens for few in rate.few_tokens] == [2, 4, 16, 64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_is_measured_beside_its_products(dtype: torch.dtype) -> None:
    device = torch.device("cpu")

    def once(work: Callable[[], object], _: torch.device) -> float:
        work()
        return 0.5

    with torch.inference_mode():
        rate_of_reading = 1e12  # what is read takes nearly nothing then
        assert measure_layer.step_s(dtype, device, rate_of_reading, once) == pytest.approx(0.5 / 72, rel=1e-3)
        assert measure_layer.step_s(dtype, device, 1.0, once) == 1e-9  # never less than nothing
        pairs = 512 * 512 / 2
        assert measure_layer.attention_flops_per_s(dtype, device, 512, once) == 4 * 8 * 64 * pairs / 0.5
        assert measure_layer.attention_flops_per_s(dtype, device, 1, once) == 16 * 4 * 8 * 64 * 512 / 0.5
        assert measure_layer.activation_bytes_per_s(dtype, device, once) == 2 * 512 * 4096 * dtype.itemsize / 0.5


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("load", [0.5, 7.0])
def test_all_that_a_plan_needs_is_measured_and_later_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, load: float
) -> None:
    monkeypatch.setattr(measure_compute, "measure_compute", lambda device: {"float32": RATE} if device is HOST else {})
    monkeypatch.setattr(measure_compute, "measure_link", lambda _: 2e10)
    monkeypatch.setattr(measure.os, "getloadavg", lambda: (load, 0.0, 0.0))
    found = measure.measure_machine(MACHINE, tmp_path / "model", tmp_path / "cache")
    assert ("busy (load 7.0 on 4 cores)" in caplog.text) == (load > 4)
    assert found.rates.copy_bytes_per_s
    assert [device.compute for device in found.devices] == [{}, {"float32": RATE}]
    assert [device.link_bytes_per_s for device in found.devices] == [2e10, None]
    assert measured.known_rates(tmp_path, tmp_path / "cache") == found.rates
    assert measured.with_known_devices(MACHINE, tmp_path / "cache").devices == found.devices


@pytest.mark.usefixtures("small")
def test_what_cannot_be_measured_is_left_out_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: Device) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def read_only(_: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(measure_compute, "measure_link", full)
    monkeypatch.setattr(measure, "_write_sample", read_only)
    found = measure.measure_machine(MACHINE, tmp_path / "model", tmp_path / "cache")
    assert "cuda:0 was not measured, free its memory and try again: CUDA out of memory" in caplog.text
    assert "its disk was not measured, name a model there with --model: [Errno 30]" in caplog.text
    assert found.devices[0] == GPU
    assert found.host.compute.keys() == {"float32", "bfloat16", "float16"}
    assert found.rates.disk_bytes_per_s is found.rates.cached_bytes_per_s is None
    assert found.rates.copy_bytes_per_s
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_measures_of_another_machine_or_torch_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured.remember_devices(MACHINE, {"cpu": MeasuredDevice(compute={"float32": RATE})}, tmp_path)
    assert measured.with_known_devices(MACHINE, tmp_path).host.compute == {"float32": RATE}
    assert measured.with_known_devices(MACHINE, tmp_path).devices[0] == GPU  # what its slot says stays
    other = replace(MACHINE, cpu=Cpu(name="a processor", num_cores=8))
    assert measured.with_known_devices(other, tmp_path) == other
    (file,) = (tmp_path / "rates").iterdir()
    monkeypatch.setattr(measured.zlib, "crc32", lambda _: int(file.stem.partition("-")[2], 16))  # the same file name
    assert measured.with_known_devices(other, tmp_path) == other
    file.write_text(json.dumps({"key": 1}))
    assert measured.with_known_devices(MACHINE, tmp_path) == MACHINE


@pytest.mark.gpu
def test_a_gpu_is_faster_than_its_link() -> None:
    free, total = torch.cuda.mem_get_info(0)
    device = Device(id="cuda:0", kind="cuda", name="", total_bytes=total, free_bytes=free)
    link = measure_compute.measure_link(device)
    rates = measure_compute.measure_compute(device)
    assert 1e9 < link < rates["float32"].weight_bytes_per_s
    assert rates["float16"].flops_per_s > rates["float32"].flops_per_s
