"""Memory that is not weights, term by term; each term is an upper bound of what transformers and torch allocate.

The formulas follow the forward of Llama-like classes in transformers 5.23 with sdpa attention. Within one layer its
parts run after each other, so the largest of them counts; the residual stream and the cache stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loadstone.plan.facts import GATED_BLOCKS, Facts
from loadstone.plan.load_peak import TENSOR_BYTES
from loadstone.plan.values import Run

# What cuBLAS and cuDNN keep on a device once they have computed.
# Source: https://pytorch.org/docs/stable/notes/cuda.html#cublas-workspaces (32 MiB on Hopper, 8 MiB before, twice)
DEVICE_WORKSPACE_BYTES = 96_000_000
# The page-locked buffers on the host through which weights reach accelerators: two of 4 MB for each reading thread.
PINNED_RING_BYTES = 68_000_000
# How many units are in page-locked host memory at a time on their way from the disk to one device.
NUM_BUFFERS = 2
# How many numbers an accelerator decodes at a time of what travels to it as blocks, and the most bytes that each needs.
# Measured on a host: 9.3 to 12.6, of which accelerators need not 4, for casts (tests/stream/test_expand.py).
STRIP_NUMEL, STRIP_BYTES = 1 << 22, 13
_FLOAT32_BYTES = 4
_BF16_FEATURES = frozenset(("avx512_bf16", "amx_bf16", "bf16"))
# What glibc's malloc keeps of blocks that are freed, and the gaps between them, for each byte that a pass has in use at
# most, in float32 and in 16 bits: next to nothing up to this, for one model too, from run to run (bench_plan.py), and
# what an activation function in steps leaves beside it, a block for each that is alive beyond three (GPT-2).
# Blocks of 32 MB and more go back at once.
# Source: https://man7.org/linux/man-pages/man3/mallopt.3.html (M_MMAP_THRESHOLD)
HEAP_SHARE, HEAP_SHARE_16 = 1.05, 1.2
# Without a cache nothing is left between what a pass frees, and the next one finds it; of what is between operations.
_STEADY_SHARE = 0.75
# And at least so much of a layer's largest block for each layer: the cache's new tensors are put into the block that
# the layer before has freed, which is then too small for the next one. In float32 found where it was most: 24 layers,
# 10 MB. In 16 bits, whose products are another library's, 0.2 to 0.39 of 24 and 28 layers, 0.47 of 14, in 37 runs.
PINNED_SHARE, PINNED_SHARE_16 = 0.7, 0.5
_HEAP_BLOCK_BYTES = 32 << 20
# Threads, generators and kernels that come into being with the first pass, in float32 and in 16 bits; BERT took 8.9 and
# 5.6 for 64 tokens beside what is known, SmolLM2 6.2 in one of 44 processes.
FIRST_PASS_BYTES, FIRST_PASS_BYTES_16 = 9_000_000, 7_000_000
# Where MKL rearranges the matrices of a float32 product, for each thread; kept from the first product on. Measured with
# matrices of 768 x 30,522 to 2,048 x 8,192; in 16 bits (oneDNN) a product leaves about 1 MB in all.
PACKING_BYTES = 5_200_000
# What oneDNN keeps of a product in 16 bits for each number of rows that it has seen, for 1,024 of them: 0.57 to 0.60 MB
# with AVX-512 for bfloat16, 0.15 to 0.7 without; there are many, so the mean. Rows vary where a router sends tokens to
# experts.
# Source: https://uxlfoundation.github.io/oneDNN/dev_guide_primitive_cache.html
KERNEL_BYTES, _MAX_KERNELS = 585_000, 1024
_EXPERT_PRODUCTS = 2  # gate and up as one, and down
# How far the tokens of experts lie from their mean, of that mean, where a router has favourites: that of 32 experts
# with random weights sent 6 to 398 tokens to each, 128 on average. Six such layers gave their experts 41 to 49 numbers
# of 64 tokens that differ, 121 to 135 of 512 and 171 to 175 of 2,048; with this, 41, 134 and 174 are expected.
_FAVOUR = 0.6
# How far that distribution is followed, in standard deviations, and in how many steps.
_NUM_DEVIATIONS, _NUM_STEPS = 10, 256
# Staging buffers of the threads that read, where tensors are cast, and where blocks are decoded.
CAST_BYTES, DECODE_BYTES = 16_000_000, 64_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """The pass that needs the most.

    Attributes:
        run: context, batch and prompt.
        dtype_bits: of activations and cache, the model's main dtype.
        sums_apart: whether products are summed in float32 beside their result, as a host does in bfloat16 without
            instructions for it (`sums_apart`).
        num_threads: that the host multiplies with.
    """

    run: Run
    dtype_bits: int
    sums_apart: bool = False
    num_threads: int = 1

    @property
    def tokens(self) -> int:
        """Of all sequences, in the pass over the prompt."""
        return self.run.batch * self.run.prompt_tokens

    @property
    def width_bytes(self) -> int:
        """Of one element."""
        return max(1, self.dtype_bits // 8)

    @property
    def is_wide(self) -> bool:
        """Whether products are in float32: in 16 bits they are another library's, which keeps other things."""
        return self.width_bytes >= _FLOAT32_BYTES

    @property
    def sum_bytes(self) -> int:
        """Beside each element of a product, while it is computed."""
        return _FLOAT32_BYTES if self.sums_apart else 0


def strip_bytes(numel: int) -> int:
    """What an accelerator needs to decode a tensor of so many elements, strip by strip."""
    return STRIP_BYTES * min(numel, STRIP_NUMEL)


def sums_apart(dtype: str, features: Iterable[str]) -> bool:
    """Whether a host sums products of a dtype beside their result, in float32.

    Found with torch's profiler and oneDNN told to use fewer instructions: for bfloat16 without instructions for it,
    for float16 and float32 never.

    Args:
        dtype: torch's name.
        features: of the processor, `loadstone.hardware.spec.Cpu.features`.
    """
    return dtype == "bfloat16" and _BF16_FEATURES.isdisjoint(features)


def cache_bytes(facts: Facts, pressure: Pressure) -> tuple[int, ...]:
    """What each layer keeps at the end of the context, cross-attention included."""
    run, width = pressure.run, pressure.width_bytes
    source = facts.max_source or run.prompt_tokens
    cross = facts.cross_numel * source * width
    prompt, context = run.prompt_tokens, run.context
    if facts.cross_numel:  # the decoder begins anew, with one token
        prompt, context = 1, run.context - run.prompt_tokens + 1
    return tuple(run.batch * (layer.nbytes(context, prompt, width) + cross) for layer in facts.layers)


def terms(facts: Facts, pressure: Pressure) -> Mapping[str, int]:
    """Everything that one pass allocates beside weights and cache, in bytes, by what it is.

    Args:
        facts: of the config.
        pressure: the largest pass.

    Returns:
        `residual`, `mask` and `cache_growth` are there at all times; of `norm`, `attention`, `feed_forward` and
        `experts` one at a time; `logits` and `logits_float32` after the last layer.
    """
    tokens, width = pressure.tokens, pressure.width_bytes
    by_layer = cache_bytes(facts, pressure)
    return {
        # inputs_embeds, which forward holds to its end, the residual, its norm, and what is added to it
        "residual": 4 * tokens * facts.width * width,
        # RMSNorm.forward: a float32 copy, its square, and the product before it is cast back
        "norm": 3 * tokens * facts.width * _FLOAT32_BYTES,
        "attention": _attention(facts, pressure),
        "feed_forward": _feed_forward(facts, pressure),
        "experts": _experts(facts, pressure),
        # masking_utils.sdpa_mask: bools, made where sequences are padded or windows are narrower than the context
        "mask": _mask(facts, pressure),
        # DynamicLayer.update: torch.cat makes the longer keys and values while the shorter ones are alive
        "cache_growth": max(by_layer, default=0),
        "logits": _logits_rows(facts, pressure) * facts.vocab * width,
        # GenerationMixin: the last position is copied to float32, and processors and softmax make one each
        "logits_float32": 3 * pressure.run.batch * facts.vocab * _FLOAT32_BYTES if facts.caches else 0,
    }


def activation_bytes(found: Mapping[str, int]) -> int:
    """The most that lies between operations, of `terms`."""
    in_turn = max(found[name] for name in ("norm", "attention", "feed_forward", "experts"))
    return found["residual"] + found["mask"] + found["cache_growth"] + in_turn


def beside_cache(facts: Facts, pressure: Pressure, found: Mapping[str, int], cache: int) -> int:
    """The same on a host that computes everything, whose allocator uses freed memory for whatever comes next.

    An encoder is done when the cache of its decoder comes: of all that it had, its last states are left. One without a
    decoder is done when the scores of its tokens come, which lie where its layers did if they are not too large.

    Args:
        facts: of the config.
        pressure: the largest pass.
        found: `terms`.
        cache: bytes of the cache.
    """
    if not facts.caches:
        scores = found["logits"] if found["logits"] < _HEAP_BLOCK_BYTES else 0
        return max(activation_bytes(found) - scores, found["residual"])
    if not facts.cross_numel or facts.max_source:
        return activation_bytes(found)
    states = pressure.tokens * facts.width * pressure.width_bytes
    return max(activation_bytes(found) - cache, states + found["cache_growth"])


def logits_bytes(found: Mapping[str, int]) -> int:
    """What the scores over the vocabulary take, of `terms`."""
    return found["logits"] + found["logits_float32"]


def heap_bytes(facts: Facts, pressure: Pressure) -> int:
    """What a host's memory allocator keeps beside what a pass and the cache have in use, as measured.

    Args:
        facts: of the config.
        pressure: the largest pass.
    """
    found, blocks = terms(facts, pressure), _blocks(facts, pressure)
    # One of 32 MB takes more, with what malloc notes of it.
    small = {name: nbytes if blocks[name] < _HEAP_BLOCK_BYTES else 0 for name, nbytes in found.items()}
    always = FIRST_PASS_BYTES if pressure.is_wide else FIRST_PASS_BYTES_16
    always += _kept_by_products(facts, pressure)
    if not facts.caches:
        return int(_STEADY_SHARE * activation_bytes(small)) + always
    cache = sum(nbytes for nbytes in cache_bytes(facts, pressure) if nbytes < 2 * _HEAP_BLOCK_BYTES)
    share, pinned = (HEAP_SHARE, PINNED_SHARE) if pressure.is_wide else (HEAP_SHARE_16, PINNED_SHARE_16)
    kept = share * (beside_cache(facts, pressure, small, cache) + logits_bytes(small) + cache)
    if small["feed_forward"]:
        kept += (facts.inner_blocks - GATED_BLOCKS) * blocks["feed_forward"]
    of_layer = (blocks["attention"], blocks["feed_forward"])
    largest = max((nbytes for nbytes in of_layer if nbytes < _HEAP_BLOCK_BYTES), default=0)
    return int(max(kept, pinned * largest * len(facts.layers))) + always


def _kept_by_products(facts: Facts, pressure: Pressure) -> int:
    """What libraries of products keep for the next one."""
    if pressure.is_wide:
        return PACKING_BYTES * pressure.num_threads
    return KERNEL_BYTES * min(_MAX_KERNELS, _EXPERT_PRODUCTS * _kinds_of_rows(facts, pressure))


def _kinds_of_rows(facts: Facts, pressure: Pressure) -> int:
    """How many different numbers of tokens experts get in a pass, in 16 bits, as expected.

    The tokens that choose an expert are drawn by chance, and routers have favourites: a gamma distribution with the
    spread of both. A number is among those drawn unless all draws have missed it.
    """
    if not facts.num_chosen or not facts.num_experts:
        return 0
    share = min(1.0, facts.num_chosen / facts.num_experts)
    mean = pressure.tokens * share
    variance = mean * (1 - share) + (_FAVOUR * mean) ** 2
    shape, scale = mean**2 / variance, variance / mean
    num_drawn = facts.num_experts * len(facts.layers)
    log_norm = math.lgamma(shape) + math.log(scale)
    step = _NUM_DEVIATIONS * math.sqrt(variance) / _NUM_STEPS
    expected = 0.0
    for index in range(_NUM_STEPS):
        rows = (index + 0.5) * step / scale
        share_of_rows = math.exp((shape - 1) * math.log(rows) - rows - log_norm)
        expected -= step * math.expm1(-num_drawn * share_of_rows)
    return min(pressure.tokens, num_drawn, math.ceil(expected))


def _blocks(facts: Facts, pressure: Pressure) -> Mapping[str, int]:
    """How large the tensors are that `terms` adds up, one of each."""
    tokens, width = pressure.tokens, pressure.width_bytes
    chosen = tokens * facts.num_chosen
    rows = max(facts.num_heads * facts.key_dim, facts.num_kv_heads * facts.key_dim)
    return {
        "residual": tokens * facts.width * width,
        "norm": tokens * facts.width * _FLOAT32_BYTES,
        "attention": tokens * rows * width,
        "feed_forward": tokens * facts.inner * width,
        "experts": chosen * max(facts.width, 2 * facts.expert_inner) * width,
        "mask": _mask(facts, pressure),
        "cache_growth": max(cache_bytes(facts, pressure), default=0) // 2,  # keys and values
        "logits": _logits_rows(facts, pressure) * facts.vocab * width,
        "logits_float32": pressure.run.batch * facts.vocab * _FLOAT32_BYTES,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """What loading needs on the host beside the weights.

    Attributes:
        num_tensors: of the checkpoint; Python's part of each stays.
        staging_bytes: of the threads that read.
        largest_bytes: what the largest tensor takes beside its place while it is rearranged; 0 where none is.
    """

    num_tensors: int
    staging_bytes: int
    largest_bytes: int

    def workspace_bytes(self, used_bytes: int, heap_bytes: int) -> int:
        """What must be kept free beside weights and what a pass uses.

        Staging buffers and what is between two steps go before the first pass, so they share memory with the cache,
        the activations and what the allocator keeps of them.

        Args:
            used_bytes: cache, activations and logits of the host.
            heap_bytes: what the allocator keeps beside them.
        """
        between = max(0, self.staging_bytes + self.largest_bytes - used_bytes - heap_bytes)
        return TENSOR_BYTES * self.num_tensors + heap_bytes + between


def _attention(facts: Facts, pressure: Pressure) -> int:
    """Queries, keys, values and the output of one layer, with the temporaries of rotary positions."""
    tokens, width = pressure.tokens, pressure.width_bytes
    queries = facts.num_heads * facts.key_dim
    pairs = facts.num_kv_heads * (facts.key_dim + facts.value_dim)
    numel = tokens * (3 * queries + 2 * pairs + facts.num_heads * facts.value_dim)
    reached = pressure.run.batch * pressure.run.context
    if facts.latent_dim:
        # expand_kv: the product of kv_b_proj, and keys put together from it, over the whole context
        numel += 2 * reached * facts.num_heads * (facts.key_dim + facts.value_dim)
    elif has_mask(facts, pressure) and facts.num_kv_heads < facts.num_heads:
        # sdpa_attention_forward: with a mask, keys and values are repeated for every query head
        numel += reached * facts.num_heads * (facts.key_dim + facts.value_dim)
    return numel * width


def _feed_forward(facts: Facts, pressure: Pressure) -> int:
    """down_proj(act(gate_proj(x)) * up_proj(x)): gate, up, and either their product or the sums of one of them.

    Where the activation function is written out in steps, its blocks are more.
    """
    products = 2 * pressure.width_bytes + max(pressure.width_bytes, pressure.sum_bytes)
    return pressure.tokens * facts.inner * max(products, facts.inner_blocks * pressure.width_bytes)


def _experts(facts: Facts, pressure: Pressure) -> int:
    """grouped_mm_experts_forward, a row for each token and expert that it chose.

    The rows stay; beside them are gate and up, one of them activated, and the product, and later what comes down, the
    same weighted, and that in the tokens' order.
    """
    if not facts.num_chosen:
        return 0
    chosen = pressure.tokens * facts.num_chosen
    numel = max(facts.width + 4 * facts.expert_inner, 4 * facts.width)
    sums = max(facts.width, 2 * facts.expert_inner) * pressure.sum_bytes
    return chosen * (numel * pressure.width_bytes + sums)


def has_mask(facts: Facts, pressure: Pressure) -> bool:
    """Whether attention is given a mask: where sequences are padded, or windows are narrower than the context."""
    return pressure.run.batch > 1 or 0 < facts.window < pressure.run.context


def _mask(facts: Facts, pressure: Pressure) -> int:
    if not has_mask(facts, pressure):
        return 0
    kinds = 2 if facts.window else 1  # one for the full layers, one for the windowed
    return kinds * pressure.tokens * pressure.run.context


def _logits_rows(facts: Facts, pressure: Pressure) -> int:
    """Generation asks for the last position of each sequence; what only encodes scores every token."""
    if not facts.needs_head:
        return 0
    return pressure.run.batch if facts.caches else pressure.tokens
