"""Measure what a layer does beside its large products: small steps, attention, and results that are handed on.

The layer is a miniature of what transformers' classes have in common, with its norms, its rotary positions, its gated
feed-forward and a cache that grows by concatenation, so that a step costs what it costs there: operators, module calls
and threads that have gone to sleep in between.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu

from loadstone.hardware.spec import MANY_TOKENS

# Seconds of something that a device does, as `measure_compute` takes them.
Timer = Callable[[Callable[[], object], torch.device], float]

_WIDTH, _INNER, _NUM_LAYERS = 512, 1408, 8
_HEADS, _HEAD_DIM = 8, 64


class _Norm(nn.Module):
    """As `LlamaRMSNorm`: in float32, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        dtype = hidden.dtype
        hidden = hidden.to(torch.float32)
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * hidden.to(dtype)


class _Layer(nn.Module):
    """As `LlamaDecoderLayer`."""

    def __init__(self) -> None:
        super().__init__()

        def linear(width: int, out: int) -> nn.Linear:
            return nn.Linear(width, out, bias=False)

        self.first, self.second = _Norm(_WIDTH), _Norm(_WIDTH)
        self.query, self.out = linear(_WIDTH, _WIDTH), linear(_WIDTH, _WIDTH)
        self.key, self.value = linear(_WIDTH, _WIDTH // 4), linear(_WIDTH, _WIDTH // 4)
        self.gate, self.up, self.down = linear(_WIDTH, _INNER), linear(_WIDTH, _INNER), linear(_INNER, _WIDTH)

    def forward(self, hidden: torch.Tensor, turn: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        normed = self.first(hidden)
        shape = (*hidden.shape[:2], -1, _HEAD_DIM)
        query, key, value = (part(normed).view(shape).transpose(1, 2) for part in (self.query, self.key, self.value))
        query, key = query * turn + _rotated(query) * turn, key * turn + _rotated(key) * turn
        keys, values = torch.cat((kept, key), dim=-2), torch.cat((kept, value), dim=-2)
        heads = scaled_dot_product_attention(query, keys, values, enable_gqa=True)
        hidden = hidden + self.out(heads.transpose(1, 2).reshape(hidden.shape))
        normed = self.second(hidden)
        fed: torch.Tensor = self.down(silu(self.gate(normed)) * self.up(normed))
        return hidden + fed


def _rotated(heads: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def step_s(dtype: torch.dtype, device: torch.device, weight_bytes_per_s: float, timer: Timer) -> float:
    """Seconds for each tensor of weights beside reading it, in a pass of one token.

    Args:
        dtype: of the weights.
        device: that computes.
        weight_bytes_per_s: at which it reads large weights.
        timer: of what is to be timed.
    """
    layers = [_Layer().to(device=device, dtype=dtype) for _ in range(_NUM_LAYERS)]
    hidden = torch.ones((1, 1, _WIDTH), dtype=dtype, device=device)
    turn = torch.ones((1, 1, 1, _HEAD_DIM), dtype=dtype, device=device)
    kept = torch.ones((1, _HEADS // 4, 1, _HEAD_DIM), dtype=dtype, device=device)

    def decode() -> None:
        passed = hidden
        for layer in layers:
            passed = layer(passed, turn, kept)

    weights = [parameter for layer in layers for parameter in layer.parameters()]
    reading_s = sum(parameter.nbytes for parameter in weights) / weight_bytes_per_s
    return max(1e-9, (timer(decode, device) - reading_s) / len(weights))


def attention_flops_per_s(dtype: torch.dtype, device: torch.device, num_queries: int, timer: Timer) -> float:
    """Floating-point operations of attention to 512 keys and values, with one query or with as many.

    Args:
        dtype: of them.
        device: that computes.
        num_queries: of the sequence.
        timer: of what is to be timed.
    """
    kept = torch.ones((1, _HEADS, MANY_TOKENS, _HEAD_DIM), dtype=dtype, device=device)
    asked = kept[:, :, :num_queries]
    pairs = num_queries * MANY_TOKENS / (1 if num_queries == 1 else 2)  # what lies ahead is left out
    repeats = max(1, 16 // num_queries)

    def attend() -> None:
        for _ in range(repeats):
            scaled_dot_product_attention(asked, kept, kept, is_causal=num_queries > 1)

    return repeats * 4 * _HEADS * _HEAD_DIM * pairs / timer(attend, device)


def activation_bytes_per_s(dtype: torch.dtype, device: torch.device, timer: Timer) -> float:
    """Bytes of results that operations without weights write in a second, with many tokens.

    Args:
        dtype: of them.
        device: that computes.
        timer: of what is to be timed.
    """
    gate = torch.ones((MANY_TOKENS, 4096), dtype=dtype, device=device)
    return 2 * gate.nbytes / timer(lambda: silu(gate) * gate, device)
