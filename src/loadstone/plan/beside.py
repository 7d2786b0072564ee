"""Config and run -> what each block does in a pass beside multiplying with its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from loadstone.plan.cost import Beside
from loadstone.plan.facts import Facts
from loadstone.plan.reserve import Pressure, cache_bytes, has_mask, terms
from loadstone.plan.values import Seen, Unit, UnitKind

# What `generate` does around each pass (inputs, scores, stopping criteria), in steps: 4 ms where a step took 65 us.
_GENERATION_STEPS = 60
# A decoding pass, then the pass over the prompt.
Passes = tuple[Beside, Beside]


def beside_by_order(facts: Facts, pressure: Pressure, units: Iterable[Unit]) -> Mapping[int, Passes]:
    """What happens beside the products, by place in execution.

    Args:
        facts: of the config.
        pressure: the largest pass.
        units: of the model.

    Returns:
        Of every block that has attention over the tokens. A scan over states (Mamba and the like) counts only for what
        it hands on.
    """
    units = tuple(units)
    found: dict[int, Passes] = {}
    whole = _whole_input(facts, pressure)
    for unit in units:
        if unit.kind is UnitKind.BLOCK and (unit.seen is Seen.PROMPT or not facts.layers):
            # What keeps no cache has one kind of pass only; an encoder runs once.
            found[unit.order] = (Beside(), whole) if unit.seen is Seen.PROMPT else (whole, whole)
    caches = cache_bytes(facts, pressure)
    for layer, order in enumerate(layer_orders(units, len(facts.layers))) if facts.layers else ():
        before = found.get(order, (Beside(), Beside()))
        own = _of_layer(facts, pressure, layer, caches[layer])
        if layer == 0:
            around = Beside(num_steps=_GENERATION_STEPS)
            before = (before[0] + around, before[1] + around)
        found[order] = (before[0] + own[0], before[1] + own[1])
    return found


def layer_orders(units: Iterable[Unit], num_layers: int) -> list[int]:
    """The place in execution of each layer of the language model.

    Args:
        units: of the model.
        num_layers: that keep something between passes.

    Returns:
        The places of the stack that has as many blocks as there are layers, else of the last one, whose last block
        then stands for all that are left. Where no stack is numbered, the last place stands for all.
    """
    stacks: dict[str, list[int]] = {}
    last = 0
    for unit in units:
        last = unit.order
        stack, _, number = unit.name.rpartition(".")
        if unit.kind is UnitKind.BLOCK and number.isdecimal():
            stacks.setdefault(stack, []).append(unit.order)
    orders = next((found for found in reversed(stacks.values()) if len(found) == num_layers), None)
    orders = orders or (list(stacks.values())[-1] if stacks else [last])
    return [orders[min(index, len(orders) - 1)] for index in range(num_layers)]


def cache_by_order(units: Iterable[Unit], by_layer: Sequence[int]) -> dict[int, int]:
    """Give each layer's cache to the block that fills it: bytes by place in execution."""
    found: dict[int, int] = {}
    for order, nbytes in zip(layer_orders(units, len(by_layer)), by_layer, strict=True):
        found[order] = found.get(order, 0) + nbytes
    return found


def _whole_input(facts: Facts, pressure: Pressure) -> Beside:
    """A layer that sees all of the input at once, back and forth."""
    tokens = pressure.run.prompt_tokens
    return Beside(
        attention_flops=_pair_flops(facts) * pressure.run.batch * tokens * tokens,
        activation_bytes=_handed_on(facts, pressure),
    )


def _of_layer(facts: Facts, pressure: Pressure, layer: int, kept_bytes: int) -> Passes:
    """A decoder's layer: the newest tokens against all that is kept, and the prompt against itself."""
    run, cache = pressure.run, facts.layers[layer]
    pair = _pair_flops(facts) * run.batch if cache.token_numel else 0.0
    reach = min(run.context, cache.window or run.context)
    one = Pressure(run=replace(run, prompt_tokens=1), dtype_bits=pressure.dtype_bits)
    newest = Beside(cache_bytes=kept_bytes, query_flops=pair * reach, activation_bytes=_handed_on(facts, one))
    if facts.cross_numel:  # the decoder begins anew, with one token, and looks at the encoder's
        crossed = replace(newest, query_flops=pair * run.prompt_tokens)
        return replace(newest, query_flops=pair * (reach + run.prompt_tokens)), crossed
    # A mask has every pair of tokens computed; without one, kernels leave out those that lie ahead.
    pairs = run.prompt_tokens**2 if has_mask(facts, pressure) else run.prompt_tokens**2 / 2
    return newest, Beside(attention_flops=pair * pairs, activation_bytes=_handed_on(facts, pressure))


def _pair_flops(facts: Facts) -> float:
    """A query with a key, and what comes of it with a value, over all heads."""
    return 2.0 * facts.num_heads * (facts.key_dim + facts.value_dim)


def _handed_on(facts: Facts, pressure: Pressure) -> int:
    """One layer's share of `terms`: two norms, attention and one kind of feed-forward."""
    found = terms(facts, pressure)
    return found["residual"] + 2 * found["norm"] + found["attention"] + max(found["feed_forward"], found["experts"])
