"""Config and run -> what each block does in a pass beside multiplying with its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from loadstone.plan.cost import Beside
from loadstone.plan.facts import Facts
from loadstone.plan.layer_caches import LayerCache
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
    newest, prompt = (_handed_on(facts, one) for one in (_of_one_token(pressure), pressure))
    whole = replace(_whole_input(facts, pressure), activation_bytes=prompt)
    for unit in units:
        if unit.kind is UnitKind.BLOCK and (unit.seen is Seen.PROMPT or not facts.layers):
            # What keeps no cache has one kind of pass only; an encoder runs once.
            found[unit.order] = (Beside(), whole) if unit.seen is Seen.PROMPT else (whole, whole)
    if not facts.layers:
        return found
    orders = layer_orders(units, len(facts.layers))
    around = Beside(num_steps=_GENERATION_STEPS)
    found[orders[0]] = _together(found.get(orders[0]), (around, around))
    for order, layer, kept_bytes in zip(orders, facts.layers, cache_bytes(facts, pressure), strict=True):
        own = _of_layer(facts, pressure, layer, kept_bytes)
        # A decoder beside an encoder begins anew, with one token.
        handed_on = (newest, newest if facts.cross_numel else prompt)
        own = (replace(own[0], activation_bytes=handed_on[0]), replace(own[1], activation_bytes=handed_on[1]))
        found[order] = _together(found.get(order), own)
    return found


def _together(one: Passes | None, other: Passes) -> Passes:
    return other if one is None else (one[0] + other[0], one[1] + other[1])


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
    """The attention of a layer that sees all of the input at once, back and forth."""
    return Beside(attention_flops=_pair_flops(facts) * pressure.run.batch * pressure.run.prompt_tokens**2)


def _of_layer(facts: Facts, pressure: Pressure, layer: LayerCache, kept_bytes: int) -> Passes:
    """The attention of a decoder's layer: the newest tokens with all that is kept, and the prompt with itself."""
    run = pressure.run
    pair = _pair_flops(facts) * run.batch if layer.token_numel else 0.0
    reach = min(run.context, layer.window or run.context)
    if facts.cross_numel:  # and with all of the encoder's
        return (
            Beside(cache_bytes=kept_bytes, query_flops=pair * (reach + run.prompt_tokens)),
            Beside(cache_bytes=kept_bytes, query_flops=pair * run.prompt_tokens),
        )
    # A mask has every pair of tokens computed; without one, kernels leave out those that lie ahead.
    pairs = run.prompt_tokens**2 if has_mask(facts, pressure) else run.prompt_tokens**2 / 2
    return Beside(cache_bytes=kept_bytes, query_flops=pair * reach), Beside(attention_flops=pair * pairs)


def _of_one_token(pressure: Pressure) -> Pressure:
    return replace(pressure, run=replace(pressure.run, prompt_tokens=1))


def _pair_flops(facts: Facts) -> float:
    """A query with a key, and what comes of it with a value, over all heads."""
    return 2.0 * facts.num_heads * (facts.key_dim + facts.value_dim)


def _handed_on(facts: Facts, pressure: Pressure) -> int:
    """One layer's share of `terms`: two norms, attention and one kind of feed-forward."""
    found = terms(facts, pressure)
    return found["residual"] + 2 * found["norm"] + found["attention"] + max(found["feed_forward"], found["experts"])
