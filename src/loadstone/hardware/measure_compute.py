"""Measure what a device can do with weights: matrix products by dtype, and the way there from the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch.nn.functional import linear

from loadstone.hardware.measure_layer import activation_bytes_per_s, attention_flops_per_s, step_s
from loadstone.hardware.spec import MANY_TOKENS, ComputeRate, Device, TokensRate

_DTYPES = ("float32", "bfloat16", "float16")
_OUT, _IN = 2048, 8192  # a projection of a model of 7 B parameters or so
_HOST_WEIGHT_BYTES = 256 << 20  # more than the caches hold
_DEVICE_WEIGHT_BYTES = 1 << 30  # the largest last-level cache of a GPU has 256 MB
_FEW_TOKENS = (2, 4, 16, 64)
_REPEATS = 3
_LINK_BYTES = 64 << 20
_AT_MOST_S = 0.35  # for one figure


def measure_compute(device: Device) -> Mapping[str, ComputeRate]:
    """Rates of matrix products with weights of each dtype; a dtype the device does not have is left out.

    Args:
        device: a device of this machine. A quarter of what it has free is used at most.
    """
    limit = _HOST_WEIGHT_BYTES if device.kind == "cpu" else _DEVICE_WEIGHT_BYTES
    nbytes = max(_OUT * _IN * 4, min(limit, device.free_bytes // 4))
    # Bytes that are ordinary numbers in each dtype, neither the same throughout (a GPU saves power on those and runs
    # faster than with weights) nor so small that the processor takes the slow way.
    weights = torch.randint(0x34, 0x40, (_OUT * _IN,), dtype=torch.uint8, device=device.id)
    weights = weights.repeat(nbytes // weights.numel())
    found = {}
    for name in _DTYPES:
        try:
            found[name] = _rate(weights.view(getattr(torch, name)).view(-1, _OUT, _IN))
        except (RuntimeError, TypeError):  # how torch says that a device lacks a dtype
            continue
    del weights
    release = getattr(torch.get_device_module(device.id), "empty_cache", None)
    if release is not None:
        release()
    return found


def _rate(matrices: torch.Tensor) -> ComputeRate:
    """With one token, over all matrices in turn; with more tokens, fewer of them; and what a layer does beside."""
    dtype, device = matrices.dtype, matrices.device
    with torch.inference_mode():
        weight_bytes_per_s = matrices.nbytes / _median_s(_products(matrices, 1, len(matrices)), device)
        num_tokens = MANY_TOKENS
        if 16 * _timed(_products(matrices, MANY_TOKENS // 16, 1), device) > _AT_MOST_S:
            num_tokens //= 4  # a slow device
        flops_per_s = _flops_per_s(matrices, num_tokens)
        return ComputeRate(
            weight_bytes_per_s=weight_bytes_per_s,
            flops_per_s=flops_per_s,
            few_tokens=tuple(
                TokensRate(tokens=few, flops_per_s=_flops_per_s(matrices, few))
                for few in _FEW_TOKENS
                if few < num_tokens
            ),
            query_flops_per_s=attention_flops_per_s(dtype, device, 1, _median_s),
            attention_flops_per_s=attention_flops_per_s(dtype, device, MANY_TOKENS, _median_s),
            activation_bytes_per_s=activation_bytes_per_s(dtype, device, _median_s),
            step_s=step_s(dtype, device, weight_bytes_per_s, _median_s),
        )


def _flops_per_s(matrices: torch.Tensor, tokens: int) -> float:
    """With so many tokens; with few of them over more matrices than caches hold."""
    count = max(1, len(matrices) * _FEW_TOKENS[0] // tokens)
    seconds = _median_s(_products(matrices, tokens, count), matrices.device)
    return 2 * tokens * count * _OUT * _IN / seconds


def _products(matrices: torch.Tensor, tokens: int, count: int) -> Callable[[], None]:
    several = matrices.new_ones((tokens, _IN))

    def work() -> None:
        for matrix in matrices[:count]:
            linear(several, matrix)

    return work


def measure_link(device: Device) -> float:
    """Bytes per second from page-locked host memory to an accelerator (from ordinary memory, where it is the same)."""
    source = torch.ones(_LINK_BYTES, dtype=torch.uint8, pin_memory=device.kind != "mps")
    target = torch.empty(_LINK_BYTES, dtype=torch.uint8, device=device.id)
    return _LINK_BYTES / _median_s(lambda: target.copy_(source, non_blocking=True), target.device)


def _median_s(work: Callable[[], object], device: torch.device) -> float:
    """Of a few repeats after a first one that does not count, unless it took so long that it must do."""
    first = _timed(work, device)
    times: list[float] = []
    while len(times) < _REPEATS and first + sum(times) < _AT_MOST_S:
        times.append(_timed(work, device))
    return statistics.median(times or [first])


def _timed(work: Callable[[], object], device: torch.device) -> float:
    wait = torch.get_device_module(device).synchronize
    wait()
    begin = time.perf_counter()
    work()
    wait()
    return max(time.perf_counter() - begin, 1e-9)
