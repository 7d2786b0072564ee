"""Checkpoint and config -> the units that a plan places: embeddings, blocks, experts, heads, tied groups once.

Names are those of the module as far as they can be known without building it: GGUF names are translated and wrapper
prefixes dropped; others stand as in the files, which is what nearly all of transformers' classes call them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from loadstone.architecture.blocks import Block, group_blocks, tied_groups
from loadstone.architecture.keymap import WRAPPER_PREFIXES
from loadstone.checkpoint.values import Checkpoint, Format, TensorInfo
from loadstone.dtypes import DTYPES, nbytes_of
from loadstone.plan.facts import Facts
from loadstone.plan.values import Seen, Unit, UnitKind

_Form = tuple[str, str | None, tuple[int, ...]]
_EXPERTS = ".experts."
# Formats in which every name has bytes of its own.
_NO_TIES = (".safetensors", ".gguf")
# Tables that are looked up by row: by token, by position, by segment.
_TABLES = re.compile(
    r"(^|\.)(embed_tokens\w*|wte|wpe|word_embeddings|tok_embeddings|embed_in|embed_positions|position_embeddings"
    r"|token_type_embeddings|embeddings|shared)$"
)
_TOKEN_TABLES = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|embeddings|shared)$")
_HEADS = re.compile(r"(^|\.)(lm_head|output|embed_out|score|classifier|pooler|cls\..+|predictions\..+|proj_out)$")
# The two stacks of an encoder-decoder.
_SIDES = re.compile(r"(model\.)?(?P<side>encoder|decoder)\.")
# The heads that a token table can be tied to; the others have rows of their own.
_TOKEN_HEADS = re.compile(r"(^|\.)(lm_head|output|embed_out|decoder|proj_out)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """What a checkpoint holds, as units.

    Attributes:
        units: in execution order; every tensor that the model takes is in one of them.
        tensors: the checkpoint's, by name.
        module_names: what each is called in the module.
        dtype: the model's main dtype.
        num_experts: that the routers choose from; 0 where there are none.
        expert_share: the part of them that one token touches.
        rearranged: tensors whose elements stand in another order in the module, by name in the checkpoint, each with
            what an accelerator needs beside it to put it in order.
        forms: what is known of tensors by dtype, encoding and shape.
    """

    units: tuple[Unit, ...]
    tensors: Mapping[str, TensorInfo]
    module_names: Mapping[str, str]
    dtype: str
    num_experts: int = 0
    expert_share: float = 1.0
    rearranged: Mapping[str, int] = field(default_factory=dict)
    forms: dict[_Form, tuple[str, int, int]] = field(default_factory=dict, compare=False, repr=False)

    def parts(self, unit: Unit) -> tuple[Unit, ...]:
        """The unit, module by module: `model.layers.3.mlp.up_proj`. One that is a single module is its own part."""
        if unit.kind is not UnitKind.BLOCK or unit.expert_tensors:
            return (unit,)
        grouped: dict[str, list[str]] = {}
        for name in unit.tensors:
            grouped.setdefault(_parent(self.module_names[name]), []).append(name)
        if len(grouped) < 2:
            return (unit,)
        parts = (self.unit(part, unit.kind, unit.order, names, unit.use_share) for part, names in grouped.items())
        return tuple(replace(part, seen=unit.seen) for part in parts)

    def whole_layers(self, units: Sequence[Unit]) -> list[Unit]:
        """The units with each block and its experts as one: so they go to accelerators, which compute with all of them.

        Args:
            units: in execution order; experts whose block is not among them, or is divided, stay by themselves.
        """
        experts: dict[int, list[Unit]] = {}
        for unit in units:
            if unit.kind is UnitKind.EXPERT:
                experts.setdefault(unit.order, []).append(unit)
        blocks = Counter(unit.order for unit in units if unit.kind is UnitKind.BLOCK)
        whole: list[Unit] = []
        for unit in units:
            if unit.order not in experts or blocks[unit.order] != 1:
                whole.append(unit)
            elif unit.kind is UnitKind.BLOCK:
                whole.append(self._whole_layer(unit, experts[unit.order]))
        return whole

    def _whole_layer(self, block: Unit, experts: Sequence[Unit]) -> Unit:
        tensors = [name for unit in (block, *experts) for name in unit.tensors]
        num_parameters = sum(unit.num_parameters for unit in experts)
        made = self.unit(block.name, block.kind, block.order, tensors)
        share = sum(unit.use_share * unit.num_parameters for unit in experts) / max(1, num_parameters)
        return replace(
            made,
            seen=block.seen,
            mappable_bytes=sum(unit.mappable_bytes for unit in (block, *experts)),
            expert_parameters=num_parameters,
            expert_share=share,
            expert_tensors=len(tensors) - len(block.tensors),
        )

    def placed(self, names: Collection[str]) -> dict[str, Unit]:
        """The units that placements name: whole ones, their modules, and layers together with their experts.

        Args:
            names: of all placements of a plan.
        """
        known = {part.name: part for unit in self.units for part in (*self.parts(unit), unit)}
        wanted = frozenset(names)
        orders = {unit.order for unit in self.units if unit.kind is UnitKind.EXPERT and unit.name not in wanted}
        if orders:  # they are placed with their blocks
            whole = self.whole_layers([unit for unit in self.units if unit.order in orders])
            known |= {unit.name: unit for unit in whole if unit.kind is UnitKind.BLOCK}
        return {name: known[name] for name in names}

    def storage(self, unit: Unit) -> str:
        """What the largest of its tensors is stored as: a dtype, or a block encoding."""
        largest = max((self.tensors[name] for name in unit.tensors), key=lambda info: info.nbytes)
        return largest.encoding or largest.dtype

    def memory_dtype(self, info: TensorInfo) -> str:
        """What a tensor is kept in once it is loaded: integers stay, floating-point numbers follow the model."""
        return self.dtype if info.encoding is not None or DTYPES[info.dtype].floating else info.dtype

    def unit(self, name: str, kind: UnitKind, order: int, tensors: Iterable[str], use_share: float = 1.0) -> Unit:
        """Add up tensors."""
        stored = memory = mappable = largest = numel = rearranged = experts = encoded = 0
        names = tuple(tensors)
        # An expert's own tensor becomes a slice of the fused one that the class computes with: it cannot be mapped.
        is_slice = kind is UnitKind.EXPERT and name[-1].isdecimal()
        for tensor in names:
            info = self.tensors[tensor]
            dtype, count, nbytes = self._loaded(info)
            numel += count
            if kind is UnitKind.BLOCK and self._holds_experts(info):
                experts += count
            stored += info.nbytes
            memory += nbytes
            encoded += count if info.encoding is not None else 0
            largest = max(largest, nbytes)
            if tensor in self.rearranged or info.strides is not None:
                rearranged += 4 * count  # decoded to float32 at most, and then moved
            if not is_slice and info.dtype == dtype and self._lies_ready(info):
                mappable += info.nbytes
        return Unit(
            name=name,
            kind=kind,
            order=order,
            tensors=names,
            num_parameters=numel,
            stored_bytes=stored,
            memory_bytes=memory,
            mappable_bytes=mappable,
            largest_bytes=largest,
            use_share=use_share,
            rearranged_bytes=rearranged,
            expert_parameters=experts,
            expert_share=self.expert_share if experts else 1.0,
            encoded_parameters=encoded,
        )

    def _holds_experts(self, info: TensorInfo) -> bool:
        """Whether one tensor holds all experts of its layer: GraniteMoE's `block_sparse_moe.input_linear`."""
        return self.num_experts > 1 and len(info.shape) == 3 and info.shape[0] == self.num_experts

    def _loaded(self, info: TensorInfo) -> tuple[str, int, int]:
        """What it is kept in, its elements, and their bytes: worked out once for tensors of one form."""
        form = (info.dtype, info.encoding, info.shape)
        found = self.forms.get(form)
        if found is None:
            dtype, count = self.memory_dtype(info), info.numel
            found = self.forms[form] = (dtype, count, nbytes_of(DTYPES[dtype], count))
        return found

    def _lies_ready(self, info: TensorInfo) -> bool:
        plain = info.encoding is None and info.strides is None and info.is_aligned
        return plain and info.name not in self.rearranged


def inventory(checkpoint: Checkpoint, facts: Facts, dtype: str) -> Inventory:
    """Find the units of a checkpoint.

    Args:
        checkpoint: its headers and its config.
        facts: what the config says.
        dtype: the model's main dtype.

    Returns:
        The units with what is needed to divide them further.
    """
    module_names, rearranged = _module_names(checkpoint)
    bare = Inventory(
        units=(),
        tensors=checkpoint.tensors,
        module_names=module_names,
        dtype=dtype,
        num_experts=facts.num_experts,
        expert_share=facts.expert_share(None),
        rearranged=rearranged,
    )
    units: list[Unit] = []
    for block, names in _blocks(bare):
        units.extend(_units_of(block, names, bare, facts))
    return replace(bare, units=tuple(_seen(unit, facts) for unit in _tied(units, bare, facts)))


def _seen(unit: Unit, facts: Facts) -> Unit:
    """The unit with the tokens that it is given: generation asks a head for the newest only."""
    if unit.kind is UnitKind.HEAD:
        return replace(unit, seen=Seen.NEWEST)
    side = _SIDES.match(unit.name) if facts.num_encoder_layers else None
    if side is None:
        return unit
    return replace(unit, seen=Seen.PROMPT if side["side"] == "encoder" else Seen.NEWEST)


def _blocks(bare: Inventory) -> Iterator[tuple[Block, Sequence[str]]]:
    """Blocks in the module's names, each with the names of its tensors in the checkpoint."""
    infos, module_names = bare.tensors, bare.module_names
    if all(name == module_name for name, module_name in module_names.items()):
        for block in group_blocks(infos):
            yield block, block.tensors
        return
    by_module: dict[str, list[str]] = {}
    for name, module_name in module_names.items():
        by_module.setdefault(module_name, []).append(name)
    renamed = {
        name: infos[name] if name == module_name else replace(infos[name], name=module_name)
        for name, module_name in module_names.items()
    }
    for block in group_blocks(renamed):
        yield block, [name for module_name in dict.fromkeys(block.tensors) for name in by_module[module_name]]


def _module_names(checkpoint: Checkpoint) -> tuple[dict[str, str], dict[str, int]]:
    """What each tensor is called in the module, and which are rearranged for it; see `Inventory`."""
    if checkpoint.format is Format.GGUF and checkpoint.config is not None:
        # And with them numpy, a tenth of a second.
        from loadstone.architecture.gguf import tensor_targets
        from loadstone.architecture.gguf_layouts import ordering_bytes

        targets = tensor_targets(checkpoint, checkpoint.config)
        moved = {}
        for name, target in targets.items():
            if target.layout is not None or target.part is not None:
                info, index = checkpoint.tensors[name], target.part.index if target.part is not None else None
                moved[name] = ordering_bytes(target.layout, index, info.nbytes, info.numel)
        return {name: target.name for name, target in targets.items()}, moved
    prefix = ""
    while checkpoint.tensors:
        wrappers = (wrapper for wrapper in WRAPPER_PREFIXES if wrapper != "model.")
        step = next((w for w in wrappers if all(name.startswith(prefix + w) for name in checkpoint.tensors)), None)
        if step is None:
            break
        prefix += step
    return {name: name.removeprefix(prefix) for name in checkpoint.tensors}, {}


def _units_of(block: Block, names: Sequence[str], bare: Inventory, facts: Facts) -> list[Unit]:
    """One block as a unit, and a unit for each of its experts (or one for all, where one tensor holds them)."""
    if block.stack is None:
        kind = _kind(block.fqn, bare.tensors[names[0]])
        rows = bare.tensors[names[0]].shape[:1]
        share = 1 / max(1, rows[0]) if kind is UnitKind.EMBEDDING and rows else 1.0
        return [bare.unit(block.fqn, kind, block.order, names, share)]
    rest: list[str] = []
    experts: dict[str, list[str]] = {}
    for name in names:
        expert = _expert(bare.module_names[name])
        if expert is None:
            rest.append(name)
        else:
            experts.setdefault(expert, []).append(name)
    units = [bare.unit(block.fqn, UnitKind.BLOCK, block.order, rest)] if rest else []
    share = facts.expert_share(len(experts) if len(experts) > 1 else None)
    units.extend(bare.unit(expert, UnitKind.EXPERT, block.order, tensors, share) for expert, tensors in experts.items())
    return units


def _expert(name: str) -> str | None:
    """The expert that a tensor belongs to.

    `model.layers.3.mlp.experts.7` of `model.layers.3.mlp.experts.7.up_proj.weight`; `...mlp.experts`, which are all of
    the layer, of `...mlp.experts.gate_up_proj`.
    """
    start = name.find(_EXPERTS)
    if start < 0:
        return None
    begin = start + len(_EXPERTS)
    end = name.find(".", begin)
    number = name[begin:end] if end > 0 else ""
    return name[:end] if number.isdecimal() else name[: begin - 1]


def _kind(fqn: str, info: TensorInfo) -> UnitKind:
    if _TABLES.search(fqn) and len(info.shape) == 2:
        return UnitKind.EMBEDDING
    return UnitKind.HEAD if _HEADS.search(fqn) else UnitKind.OTHER


def _tied(units: list[Unit], bare: Inventory, facts: Facts) -> list[Unit]:
    """Put tied units together: a table that is also the head is needed whole by the head, so it counts as one."""
    tables = [unit for unit in units if unit.kind is UnitKind.EMBEDDING and _TOKEN_TABLES.search(unit.name)]
    tables = [unit for unit in tables if _shape(unit, bare)[0] == facts.vocab] or tables
    heads = [
        unit
        for unit in units
        if unit.kind is UnitKind.HEAD
        and _TOKEN_HEADS.search(unit.name)
        and any(_shape(unit, bare) == _shape(table, bare) for table in tables)
    ]
    groups = [list(group) for group in _same_bytes(units, bare)]
    shared = [unit for unit in tables if unit.name.rpartition(".")[2] == "shared"]
    if shared:  # T5 and BART: encoder.embed_tokens and decoder.embed_tokens are the same table
        groups.append([unit for unit in tables if _shape(unit, bare) == _shape(shared[0], bare)])
    is_tied = facts.ties_head if heads else facts.needs_head
    if is_tied and tables:
        groups.append([*(shared or tables[:1]), *heads])
    return _merged(units, groups, {tables[0].name} if is_tied and tables else set())


def _merged(units: list[Unit], groups: list[list[Unit]], head_tables: set[str]) -> list[Unit]:
    """Replace the units of each group by one, in the place of the last; groups that meet are one group."""
    leader = {unit.name: unit.name for group in groups for unit in group}

    def root(name: str) -> str:
        while leader.get(name, name) != name:
            name = leader[name]
        return name

    for group in groups:
        for unit in group[1:]:
            leader[root(unit.name)] = root(group[0].name)
    together: dict[str, list[Unit]] = {}
    for unit in units:
        together.setdefault(root(unit.name), []).append(unit)
    last = max((unit.order for unit in units), default=0) + 1
    merged = []
    for name, members in together.items():
        if name not in leader and name not in head_tables and members[0].kind is not UnitKind.HEAD:
            merged += members  # tied to nothing, as nearly all are
            continue
        is_head = any(member.name in head_tables for member in members)
        one = _one(members, is_head)
        # The walk ends with the head, also where its table is what is stored and the class names the head elsewhere.
        no_head_stored = is_head and all(member.kind is not UnitKind.HEAD for member in members)
        merged.append(replace(one, order=last) if no_head_stored else one)
    return sorted(merged, key=lambda unit: unit.order)


def _one(members: list[Unit], is_head: bool) -> Unit:
    """One unit of tied ones: the bytes of the largest, the names of all."""
    is_head = is_head or any(member.kind is UnitKind.HEAD for member in members)
    if len(members) == 1 and not is_head:
        return members[0]
    largest = max(members, key=lambda unit: unit.memory_bytes)
    first = members[0]
    return replace(
        first if len(members) == 1 else largest,
        name=first.name,
        kind=UnitKind.HEAD if is_head else first.kind,
        order=max(member.order for member in members),
        tensors=tuple(name for member in members for name in member.tensors),
        use_share=1.0 if is_head else first.use_share,
        table_rows=max((round(1 / one.use_share) for one in members if one.kind is UnitKind.EMBEDDING), default=0),
    )


def _same_bytes(units: list[Unit], bare: Inventory) -> list[list[Unit]]:
    """Units whose tensors are the very same bytes; only torch's pickles keep that."""
    if not any(info.file.suffix not in _NO_TIES for info in list(bare.tensors.values())[:1]):
        return []
    owner = {name: unit for unit in units for name in unit.tensors}
    groups = []
    for names in tied_groups(bare.tensors):
        found = {owner[name].name: owner[name] for name in names if name in owner}
        if len(found) > 1 and all(len(unit.tensors) == 1 for unit in found.values()):
            groups.append(list(found.values()))
    return groups


def _shape(unit: Unit, bare: Inventory) -> tuple[int, ...]:
    return bare.tensors[unit.tensors[0]].shape


def _parent(name: str) -> str:
    return name.rpartition(".")[0] or name
