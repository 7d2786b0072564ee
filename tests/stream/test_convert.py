import threading

import numpy as np
import pytest
import torch

from loadstone.dtypes import DTYPES
from loadstone.stream.convert import KERNELS, float32_to_bfloat16, kernel_for, through


def every_16_bit_value() -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(np.uint8)


def float32_values() -> np.ndarray:
    random = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32)
    special = "0 1 80000000 7F800000 FF800000 7F800001 FFFFFFFF 7FC00000 7F7FFFFF 3F808000 3F818000"
    edges = np.array([int(word, 16) for word in special.split()], dtype=np.uint32)
    return np.concatenate([random, edges]).view(np.uint8)


def float64_values() -> np.ndarray:
    random = np.random.default_rng(0).integers(0, 1 << 64, 100_000, dtype=np.uint64)
    usual = np.random.default_rng(1).standard_normal(100_000).view(np.uint64)
    # Just above and below a tie of the shorter formats: rounding once or twice makes a difference.
    ties = np.arange(1, 1 << 12, dtype=np.uint64) << np.uint64(41) | np.uint64(0x3FF0000000000000)
    return np.concatenate([random, usual, ties, ties + np.uint64(1), ties - np.uint64(1)]).view(np.uint8)


def every_byte_with_every_byte() -> np.ndarray:
    return every_16_bit_value()


def as_torch(data: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(data.copy()).view(getattr(torch, dtype))


SOURCES = {
    "bfloat16": every_16_bit_value,
    "float16": every_16_bit_value,
    "float32": float32_values,
    "float64": float64_values,
    **{name: every_byte_with_every_byte for name in DTYPES if name.startswith("float8")},
}
WANTED = ("bfloat16", "float16", "float32", "float64")


def test_every_pair_of_float_dtypes_has_a_kernel() -> None:
    assert set(KERNELS) == {(source, wanted) for source in SOURCES for wanted in WANTED if source != wanted}


@pytest.mark.parametrize(("source", "destination"), list(KERNELS))
def test_every_kernel_gives_the_bits_that_torch_gives(source: str, destination: str) -> None:
    data = SOURCES[source]()
    expected = as_torch(data, source).to(getattr(torch, destination))
    made = np.zeros(expected.numel() * expected.element_size(), np.uint8)
    kernel = kernel_for(source, destination)
    assert kernel is not None
    kernel(data, made)
    found = as_torch(made, destination)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    # What a NaN carries besides being one differs in torch from path to path.
    nan = torch.isnan(expected)
    assert torch.equal(torch.isnan(found), nan)
    assert torch.equal(found.view(bits)[~nan], expected.view(bits)[~nan])


@pytest.mark.parametrize("destination", [pair[1] for pair in KERNELS if pair[0] == "float64"])
def test_float64_rounds_as_torch_does(destination: str) -> None:
    wanted = getattr(torch, destination)
    random = torch.randn(10_000, dtype=torch.float64)
    # Beside a tie of float16 by less than float32 can tell, where rounding once and twice differ.
    ties = torch.tensor([1 + 2**-11 + 2**-40, 1 + 2**-9 - 2**-40, 65519.9999999], dtype=torch.float64)
    values = torch.cat([random, random * 1e30, random * 1e-7, ties, -ties, torch.tensor([float("inf"), -0.0])])
    made = np.zeros(values.numel() * wanted.itemsize, np.uint8)
    kernel = kernel_for("float64", destination)
    assert kernel is not None
    kernel(values.numpy().view(np.uint8), made)
    assert torch.equal(as_torch(made, destination), values.to(wanted))


@pytest.mark.parametrize("wanted", ["float32", "float64"])
@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("float8")])
def test_what_is_not_a_number_in_eight_bits_has_the_bits_that_torch_gives(name: str, wanted: str) -> None:
    data = np.arange(256).astype(np.uint8)
    made = np.zeros(256 * DTYPES[wanted].bits // 8, np.uint8)
    kernel = kernel_for(name, wanted)
    assert kernel is not None
    kernel(data, made)
    assert made.tobytes() == as_torch(data, name).to(getattr(torch, wanted)).view(torch.uint8).numpy().tobytes()


def test_an_odd_number_of_bytes_is_cast_to_its_end() -> None:
    kernel = kernel_for("float8_e5m2", "bfloat16")
    assert kernel is not None
    data = np.array([0x3C, 0x40, 0xC4], np.uint8)
    made = np.zeros(6, np.uint8)
    kernel(data, made)
    assert as_torch(made, "bfloat16").tolist() == [1.0, 2.0, -4.0]


def test_one_nan_among_many_numbers_becomes_one_nan() -> None:
    values = np.ones(100_001, np.float32)
    values.view(np.uint32)[70_000] = 0xFFFFFFFF
    made = np.zeros(200_002, np.uint8)
    float32_to_bfloat16(values.view(np.uint8), made)
    assert np.flatnonzero(made.view(np.uint16) != 0x3F80).tolist() == [70_000]
    assert made.view(np.uint16)[70_000] == 0x7FC0


def test_kernels_in_a_row_work_in_strips_and_in_many_threads() -> None:
    sizes: list[int] = []

    def widen(source: np.ndarray, destination: np.ndarray) -> None:
        sizes.append(destination.nbytes)
        np.copyto(destination.view(np.uint32), source)

    def narrow(source: np.ndarray, destination: np.ndarray) -> None:
        np.copyto(destination, source.view(np.uint32), casting="unsafe")

    run = through(widen, narrow, source=1, middle=4, destination=1)
    data = np.random.default_rng(0).integers(0, 256, (4, 1_000_003), dtype=np.uint8)
    made = np.zeros_like(data)
    threads = [threading.Thread(target=run, args=pair) for pair in zip(data, made, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(made, data)
    assert max(sizes) <= 1 << 20
    assert len(sizes) == 4 * 4


def test_fresh_memory_needs_only_the_upper_halves() -> None:
    data = every_16_bit_value()
    made = np.zeros(data.size * 2, np.uint8)
    kernel = kernel_for("bfloat16", "float32", fresh=True)
    assert kernel is not None
    kernel(data, made)
    assert (made.view(np.uint16)[0::2] == 0).all()
    assert (made.view(np.uint16)[1::2] == data.view(np.uint16)).all()


def test_a_cast_numpy_does_not_have_is_left_to_torch() -> None:
    assert kernel_for("bfloat16", "float8_e4m3fn") is None
