"""The words in which a family of GGUF files is described: facts of the file, rules for names, a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loadstone.architecture.gguf_layouts import Layout
from loadstone.checkpoint.values import Checkpoint
from loadstone.errors import InvalidConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a GGUF file says about its architecture.

    Attributes:
        checkpoint: the file's header.
        architecture: `general.architecture`, which prefixes the keys.
    """

    checkpoint: Checkpoint
    architecture: str

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `<architecture>.<key>`; numbers stored as float32 in their shortest decimal form (1e-05)."""
        value = self.checkpoint.metadata.get(f"{self.architecture}.{key}", default)
        return shortest(value) if isinstance(value, float) else value

    def need(self, key: str) -> Any:
        """The value of a key that must be there."""
        value = self.get(key)
        if value is None:
            raise InvalidConfig(
                f"{self.where}: the metadata lacks {self.architecture}.{key}, without which the model cannot be built; "
                "convert the model again with a current llama.cpp."
            )
        return value

    def has(self, tensor: str) -> bool:
        """Whether there is a tensor of this name (`*` stands for any block number)."""
        if "*" not in tensor:
            return tensor in self.checkpoint.tensors
        head, tail = tensor.split("*")
        return any(name.startswith(head) and name.endswith(tail) for name in self.checkpoint.tensors)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The shape of a tensor that must be there; `*` in its name stands for the first block that has it."""
        head, _, tail = tensor.partition("*")
        for name, info in self.checkpoint.tensors.items():
            if name == tensor or (tail and name.startswith(head) and name.endswith(tail)):
                return info.shape
        raise InvalidConfig(
            f"{self.where}: there is no tensor {tensor.replace('*', 'N')}, without which the model cannot be built; "
            "the file is not a complete model."
        )

    @property
    def where(self) -> str:
        """The file, for messages."""
        return str(self.checkpoint.files[0].path)

    @property
    def head_dim(self) -> int:
        """The width of an attention head."""
        return int(self.get("attention.key_length") or self.need("embedding_length") // self.num_heads)

    @property
    def num_heads(self) -> int:
        """The number of attention heads, of the widest layer where they differ."""
        heads = self.need("attention.head_count")
        return int(max(heads) if isinstance(heads, list) else heads)


def shortest(value: float) -> float:
    """A number that was rounded to float32, in its shortest decimal form: 9.999999747378752e-06 -> 1e-05."""
    single = np.float32(value)
    return float(str(single)) if float(single) == value else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """The tensor is one of two that transformers keeps in one parameter.

    Attributes:
        dim: the dimension of the parameter along which they are joined.
        index: 0 for the first, 1 for the second.
        interleaved: whether their entries alternate instead of following each other.
    """

    dim: int
    index: int
    interleaved: bool = False


LayoutOf = Callable[[Mapping[str, Any]], Layout]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Where a tensor goes.

    Attributes:
        name: of the parameter, without the model's prefix.
        exact: whether `.weight` or `.bias` is not carried over from the GGUF name.
        layout: how it differs, or what says so from the config; or None.
        fused: which part of the parameter it is; or None.
        beside: (leaf, name): where the block has a tensor `leaf` too, the parameter is called `name`; or None.
    """

    name: str
    exact: bool = False
    layout: Layout | LayoutOf | None = None
    fused: Fused | None = None
    beside: tuple[str, str] | None = None


Names = Mapping[str, str | Rule]
Finish = Callable[[Facts, dict[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """All files of one `general.architecture`.

    Attributes:
        model_type: of transformers.
        model_class: of transformers.
        keys: metadata key (without the architecture) -> config key, for those that are copied as they are.
        top: tensors outside the blocks, GGUF stem (`output_norm`) or full name -> where they go.
        blocks: for each prefix of GGUF blocks (`blk`), the prefix of the module's (`model.layers`) and its names.
        finish: what cannot be said by copying keys.
    """

    model_type: str
    model_class: str
    keys: Mapping[str, str]
    top: Names
    blocks: Mapping[str, tuple[str, Names]]
    finish: tuple[Finish, ...] = field(default=())
