import numpy as np
import pytest
import torch

from loadstone.stream.convert import KERNELS, kernel_for


def every_16_bit_value() -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(np.uint8)


def float32_values() -> np.ndarray:
    random = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32)
    special = "0 1 80000000 7F800000 FF800000 7F800001 FFFFFFFF 7FC00000 7F7FFFFF 3F808000 3F818000"
    edges = np.array([int(word, 16) for word in special.split()], dtype=np.uint32)
    return np.concatenate([random, edges]).view(np.uint8)


def as_torch(data: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(data.copy()).view(getattr(torch, dtype))


SOURCES = {"bfloat16": every_16_bit_value, "float16": every_16_bit_value, "float32": float32_values}


@pytest.mark.parametrize(("source", "destination"), [pair for pair in KERNELS if pair[0] in SOURCES])
def test_every_kernel_gives_the_bits_that_torch_gives(source: str, destination: str) -> None:
    data = SOURCES[source]()
    expected = as_torch(data, source).to(getattr(torch, destination))
    made = np.zeros(expected.numel() * expected.element_size(), np.uint8)
    kernel = kernel_for(source, destination)
    assert kernel is not None
    kernel(data, made)
    found = as_torch(made, destination)
    nan = torch.isnan(expected)
    assert torch.equal(torch.isnan(found), nan)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
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


def test_fresh_memory_needs_only_the_upper_halves() -> None:
    data = every_16_bit_value()
    made = np.zeros(data.size * 2, np.uint8)
    kernel = kernel_for("bfloat16", "float32", fresh=True)
    assert kernel is not None
    kernel(data, made)
    assert (made.view(np.uint16)[0::2] == 0).all()
    assert (made.view(np.uint16)[1::2] == data.view(np.uint16)).all()


def test_a_cast_numpy_does_not_have_is_left_to_torch() -> None:
    assert kernel_for("float8_e4m3fn", "bfloat16") is None
