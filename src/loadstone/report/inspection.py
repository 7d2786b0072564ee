"""What a checkpoint holds, for people and for programs: files, blocks, tensors, ties, and the config explained."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from loadstone.architecture.blocks import Block, group_blocks, tied_groups
from loadstone.architecture.config import ConfigFact, explain
from loadstone.checkpoint.layout import TOKENIZER_FILES
from loadstone.checkpoint.pipeline import Pipeline
from loadstone.checkpoint.values import Checkpoint, Format, TensorInfo
from loadstone.units import format_bytes, format_count

if TYPE_CHECKING:
    from rich.console import Console

_DIGITS = re.compile(r"\d+")
_SHOWN_FILES = 8
_SHOWN_TENSORS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What the headers of a checkpoint say.

    Attributes:
        checkpoint: the checkpoint itself.
        blocks: its tensors grouped, in execution order.
        facts: every field of the config, explained.
        remarks: what is tied, missing or worth knowing.
        pipeline: what is inspected, if it is a diffusers pipeline.
    """

    checkpoint: Checkpoint
    blocks: tuple[Block, ...]
    facts: tuple[ConfigFact, ...]
    remarks: tuple[str, ...]
    pipeline: Pipeline | None = None

    @property
    def bytes_by_dtype(self) -> dict[str, int]:
        """Stored bytes by dtype or block encoding, the most first."""
        stored: dict[str, int] = {}
        for info in self.checkpoint.tensors.values():
            kind = info.encoding or info.dtype
            stored[kind] = stored.get(kind, 0) + info.nbytes
        return dict(sorted(stored.items(), key=lambda item: -item[1]))


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Group and explain a checkpoint.

    Args:
        checkpoint: as opened.

    Returns:
        Everything the report shows.
    """
    return Inspection(
        checkpoint=checkpoint,
        blocks=group_blocks(checkpoint.tensors),
        facts=explain(checkpoint.config, checkpoint) if checkpoint.config is not None else (),
        remarks=tuple(_remarks(checkpoint)),
    )


def inspect_pipeline(pipeline: Pipeline) -> Inspection:
    """Show a diffusers pipeline: its components, and the tensors of all of them."""
    checkpoint = pipeline.checkpoint
    held = [component.name for component in pipeline.components if component.num_tensors]
    return Inspection(
        checkpoint=checkpoint,
        blocks=group_blocks(checkpoint.tensors),
        facts=(),
        remarks=(
            f'A pipeline is loaded component by component: load(..., subfolder="{held[0]}"); {", ".join(held)} hold '
            "weights.",
            *checkpoint.notes,
        ),
        pipeline=pipeline,
    )


def _remarks(checkpoint: Checkpoint) -> Iterator[str]:
    config = checkpoint.config
    names = checkpoint.tensors
    head = next((name for name in names if name in {"lm_head.weight", "output.weight"}), None)
    embedding = next(
        (name for name in names if name.endswith(("embed_tokens.weight", "wte.weight", "token_embd.weight"))), None
    )
    for group in tied_groups(names):
        yield f"tied: {' = '.join(group)} share the same bytes"
    if config is not None and embedding is not None:
        # transformers' default is tied; families that are not say so.
        tied = config.get("tie_word_embeddings")
        if head is None and tied:
            yield f"tied: there is no output head in the files; it is {embedding} (tie_word_embeddings)"
        elif head is None and tied is False and "CausalLM" in str(config.get("architectures")):
            yield "missing: there is no output head in the files, although tie_word_embeddings is false"
    if config is None:
        yield "missing: no config.json beside the weights, so no class can be chosen"
    if checkpoint.format is not Format.GGUF:
        if not any((checkpoint.root / name).exists() for name in TOKENIZER_FILES):
            yield "missing: no tokenizer file beside the weights"
        if config is not None and checkpoint.generation_config is None:
            yield "missing: no generation_config.json; generation uses the defaults of the config"
    yield from checkpoint.notes


def to_json(inspection: Inspection) -> dict[str, Any]:
    """The inspection as plain data, sizes in bytes."""
    checkpoint = inspection.checkpoint
    return {
        "format": checkpoint.format.value,
        "root": str(checkpoint.root),
        "files": [{"path": str(file.path), "nbytes": file.nbytes} for file in checkpoint.files],
        "totals": {
            "tensors": len(checkpoint.tensors),
            "parameters": checkpoint.num_parameters,
            "nbytes": checkpoint.nbytes,
            "nbytes_by_dtype": inspection.bytes_by_dtype,
        },
        "components": [asdict(component) for component in inspection.pipeline.components]
        if inspection.pipeline
        else [],
        "blocks": [asdict(block) for block in inspection.blocks],
        "tensors": [_tensor_json(info) for info in checkpoint.tensors.values()],
        "config": [asdict(fact) for fact in inspection.facts],
        "remarks": list(inspection.remarks),
        # A GGUF vocabulary is no news to anybody; lists are told by their length.
        "metadata": {
            key: f"[{len(value)} entries]" if isinstance(value, list | tuple) and len(value) > 64 else value
            for key, value in checkpoint.metadata.items()
        },
    }


def _tensor_json(info: TensorInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "dtype": info.dtype,
        "encoding": info.encoding,
        "shape": list(info.shape),
        "file": info.file.name,
        "offset": info.offset,
        "nbytes": info.nbytes,
    }


def render(inspection: Inspection, console: Console) -> None:
    """Draw the inspection.

    Args:
        inspection: what to draw.
        console: where; its width is respected.
    """
    from rich.rule import Rule
    from rich.text import Text

    checkpoint = inspection.checkpoint
    console.print(Text(_title(inspection), style="bold"))
    console.print(Text(_totals(inspection)))
    console.print()
    if inspection.pipeline is not None:
        console.print(_components_table(inspection.pipeline))
        console.print()
    console.print(_files_table(checkpoint))
    console.print(Rule("blocks, in execution order", align="left", style="dim"))
    console.print(_blocks_table(inspection.blocks, checkpoint.tensors))
    typical = _typical(inspection.blocks)
    if typical is not None:
        console.print(Rule(f"inside {typical.fqn}", align="left", style="dim"))
        console.print(_tensors_table(typical, checkpoint.tensors))
    for remark in inspection.remarks:
        kind, _, rest = remark.partition(": ")
        style = {"missing": "yellow", "tied": "cyan"}.get(kind, "")
        console.print(Text.assemble((f"{kind}  " if style else "", style), rest if style else remark))
    if inspection.facts:
        console.print(Rule("config, explained", align="left", style="dim"))
        _render_facts(inspection.facts, console)


def _title(inspection: Inspection) -> str:
    config = inspection.checkpoint.config or {}
    if inspection.pipeline is not None:
        return f"{inspection.pipeline.class_name} in {inspection.checkpoint.root}"
    classes = config.get("architectures") or [config.get("model_type") or "weights without a config"]
    return f"{classes[0]} in {inspection.checkpoint.root}"


def _totals(inspection: Inspection) -> str:
    checkpoint = inspection.checkpoint
    mix = ", ".join(f"{kind} {format_bytes(nbytes)}" for kind, nbytes in inspection.bytes_by_dtype.items())
    return (
        f"{format_count(checkpoint.num_parameters)} parameters in {len(checkpoint.tensors):,} tensors, "
        f"{format_bytes(checkpoint.nbytes)} as {checkpoint.format.value}: {mix or 'nothing'}"
    )


def _table(*columns: tuple[str, dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title, options in columns:
        table.add_column(title, **options)
    return table


_RIGHT: dict[str, Any] = {"justify": "right", "no_wrap": True}
_NAME: dict[str, Any] = {"overflow": "fold"}


def _components_table(pipeline: Pipeline) -> Any:
    table = _table(("component", _NAME), ("class", _NAME), ("from", _NAME), ("tensors", _RIGHT), ("size", _RIGHT))
    for component in pipeline.components:
        size = format_bytes(component.nbytes) if component.num_tensors else "no weights"
        count = f"{component.num_tensors:,}" if component.num_tensors else ""
        table.add_row(component.name, component.class_name, component.library, count, size)
    return table


def _files_table(checkpoint: Checkpoint) -> Any:
    table = _table(("file", _NAME), ("size", _RIGHT))
    for file in checkpoint.files[:_SHOWN_FILES]:
        table.add_row(file.path.name, format_bytes(file.nbytes))
    rest = checkpoint.files[_SHOWN_FILES:]
    if rest:
        table.add_row(f"and {len(rest)} more", format_bytes(sum(file.nbytes for file in rest)))
    return table


def _blocks_table(blocks: tuple[Block, ...], tensors: Mapping[str, TensorInfo]) -> Any:
    """Alike neighbours in one row."""
    table = _table(("block", _NAME), ("", _RIGHT), ("tensors", _RIGHT), ("size", _RIGHT), ("dtypes", _NAME))
    for run in _runs(blocks, tensors):
        first, last = run[0], run[-1]
        name = first.fqn if len(run) == 1 else f"{first.fqn} … {last.fqn.rpartition('.')[2]}"
        experts = f"{first.num_experts} experts, " if first.num_experts else ""
        kinds = dict.fromkeys(tensors[name].encoding or tensors[name].dtype for name in first.tensors)
        table.add_row(
            name,
            f"{len(run)} ×" if len(run) > 1 else "",
            f"{len(first.tensors):,}",
            format_bytes(first.nbytes) + (" each" if len(run) > 1 else ""),
            experts + ", ".join(kinds),
        )
    return table


def _runs(blocks: tuple[Block, ...], tensors: Mapping[str, TensorInfo]) -> list[list[Block]]:
    runs: list[list[Block]] = []
    previous = None
    for block in blocks:
        likeness = (block.stack, len(block.tensors), block.nbytes, block.num_experts)
        if previous is not None and block.stack is not None and likeness == previous:
            runs[-1].append(block)
        else:
            runs.append([block])
        previous = likeness
    return runs


def _typical(blocks: tuple[Block, ...]) -> Block | None:
    """The first block of the stack that holds most bytes."""
    sizes: dict[str, int] = {}
    for block in blocks:
        if block.stack is not None:
            sizes[block.stack] = sizes.get(block.stack, 0) + block.nbytes
    if not sizes:
        return None
    largest = max(sizes, key=lambda stack: sizes[stack])
    return next(block for block in blocks if block.stack == largest)


def _tensors_table(block: Block, tensors: Mapping[str, TensorInfo]) -> Any:
    """Tensors that differ in a number only (experts) share a row."""
    table = _table(("tensor", _NAME), ("", _RIGHT), ("dtype", _NAME), ("shape", _RIGHT), ("size", _RIGHT))
    alike: dict[tuple[str, str, tuple[int, ...]], list[TensorInfo]] = {}
    for name in block.tensors:
        info = tensors[name]
        leaf = name.removeprefix(f"{block.fqn}.")
        alike.setdefault((_DIGITS.sub("*", leaf), info.encoding or info.dtype, info.shape), []).append(info)
    for (pattern, kind, shape), infos in list(alike.items())[:_SHOWN_TENSORS]:
        name = pattern if len(infos) > 1 else infos[0].name.removeprefix(f"{block.fqn}.")
        table.add_row(
            name,
            f"{len(infos)} ×" if len(infos) > 1 else "",
            kind,
            " × ".join(f"{size:,}" for size in shape) or "scalar",
            format_bytes(infos[0].nbytes),
        )
    if len(alike) > _SHOWN_TENSORS:
        table.add_row(f"and {len(alike) - _SHOWN_TENSORS} more", "", "", "", "")
    return table


def _render_facts(facts: tuple[ConfigFact, ...], console: Console) -> None:
    """A definition list: long field names and narrow terminals leave no room for columns."""
    from rich.padding import Padding
    from rich.text import Text

    for fact in facts:
        console.print(Text.assemble((fact.field, "bold"), (" = ", "dim"), (_short(fact.value), "cyan")))
        meaning = Text(fact.meaning)
        if fact.consequence:
            meaning.append(f" → {fact.consequence}.", style="green")
        console.print(Padding(meaning, (0, 0, 0, 4)))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
