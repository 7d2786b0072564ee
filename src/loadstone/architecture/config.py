"""config.json as facts: every field explained, and what follows from it for this very model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loadstone.architecture.blocks import Block, bytes_by_dtype, group_blocks
from loadstone.architecture.config_fields import MEANINGS, OTHER, TOPIC_OF, UNKNOWN
from loadstone.architecture.config_rules_attention import (
    ATTENTION_INTEGERS,
    ATTENTION_NULLS,
    ATTENTION_OTHERS,
    ATTENTION_REALS,
    Rule,
)
from loadstone.architecture.config_rules_contents import (
    CONTENTS_INTEGERS,
    CONTENTS_NULLS,
    CONTENTS_OTHERS,
    CONTENTS_REALS,
)
from loadstone.architecture.config_sizes import (
    Held,
    Sizes,
    kv_cache_bytes,
    kv_cache_bytes_per_token,
    language_config,
    num_blocks,
)
from loadstone.checkpoint.values import Checkpoint

__all__ = [
    "ConfigFact",
    "explain",
    "kv_cache_bytes",
    "kv_cache_bytes_per_token",
    "language_config",
    "num_blocks",
]

# By the type of the value: a rule that multiplies is never handed a string.
_REALS: dict[str, Rule] = {**ATTENTION_REALS, **CONTENTS_REALS}
_INTEGERS: dict[str, Rule] = {**_REALS, **ATTENTION_INTEGERS, **CONTENTS_INTEGERS}
_OTHERS: dict[str, Rule] = {**ATTENTION_OTHERS, **CONTENTS_OTHERS}
_NULLS: dict[str, Rule] = {**ATTENTION_NULLS, **CONTENTS_NULLS}
_LONGEST = 300
_MAX_DEPTH = 8
# Mappings that are one fact, although their names end as nested configs' do.
_WHOLE = ("quantization_config", "compression_config")
# A field whose type or size the family does not have: its value is shown, nothing is concluded.
_WRONG_VALUE = (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, IndexError)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFact:
    """One field of config.json.

    Attributes:
        field: its name; fields of nested configs have a dot.
        value: as it stands in the file; "{...}" for a nested config, whose fields follow.
        meaning: what the field means.
        consequence: what follows from it for this model, or None.
        topic: what it is about, a key of `config_fields.TOPICS`, or "other".
    """

    field: str
    value: Any
    meaning: str
    consequence: str | None = None
    topic: str = OTHER


def explain(
    config: Mapping[str, Any], checkpoint: Checkpoint | None = None, *, blocks: tuple[Block, ...] | None = None
) -> tuple[ConfigFact, ...]:
    """Explain every field of a config.

    Args:
        config: the parsed config.json.
        checkpoint: its checkpoint, which says what the files really hold; None where there is none.
        blocks: the tensors of that checkpoint as grouped already; None to group them here.

    Returns:
        A fact for each field, in the order of the file; nested configs are gone into.
    """
    held = None
    if checkpoint is not None:
        held = Held(
            tensors=checkpoint.tensors,
            blocks=group_blocks(checkpoint.tensors) if blocks is None else blocks,
            nbytes_by_dtype=bytes_by_dtype(checkpoint.tensors),
            generation_config=checkpoint.generation_config,
        )
    return tuple(_facts(Sizes(config=config, held=held), "", 0))


def _facts(sizes: Sizes, prefix: str, depth: int) -> Iterator[ConfigFact]:
    for name, value in sizes.config.items():
        nested = isinstance(value, Mapping) and name.endswith("_config") and name not in _WHOLE and depth < _MAX_DEPTH
        yield ConfigFact(
            field=prefix + name,
            value="{...}" if nested else value,
            meaning=MEANINGS.get(name, UNKNOWN),
            consequence=_consequence(name, value, sizes),
            topic=TOPIC_OF.get(name, OTHER),
        )
        if nested:
            inner = Sizes(config=value, parent=sizes.config, name=name, held=sizes.held)
            yield from _facts(inner, f"{prefix}{name}.", depth + 1)


def _rules_for(value: Any) -> dict[str, Rule]:
    if value is None:
        return _NULLS
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _OTHERS
    if value <= 0:
        return {}
    return _INTEGERS if isinstance(value, int) else _REALS


def _consequence(name: str, value: Any, sizes: Sizes) -> str | None:
    rule = _rules_for(value).get(name)
    if rule is None:
        return None
    try:
        text = rule(value, sizes)
    except _WRONG_VALUE:
        return None
    return text if text is None or len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
