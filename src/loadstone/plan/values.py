"""The plan of a run: what lies where, what it costs, what it needs at most, and why. Values only, made from headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from loadstone.compression import kept_bytes

DISK = "disk"
HOST = "cpu"
# How many slices of a head are in memory at a time: with the one is computed while the other is read.
NUM_WINDOWS = 2
# What disks are read by past the page cache.
_BLOCK_BYTES = 4096


class UnitKind(Enum):
    """What a unit is in the walk over the model."""

    EMBEDDING = "embedding"
    BLOCK = "block"
    EXPERT = "expert"
    HEAD = "head"
    OTHER = "other"

    # Members exist once, so that their identity serves; Enum's own hash is Python and asked for a million times.
    __hash__ = object.__hash__


class Seen(Enum):
    """Which tokens a unit is given."""

    ALL = "all"
    NEWEST = "newest"  # one of each sequence in either pass: heads, and the decoder of an encoder-decoder
    PROMPT = "prompt"  # none while decoding: the encoder

    __hash__ = object.__hash__


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Tensors that are placed together.

    Attributes:
        name: the common start of their names in the module, `model.layers.3`, or of an expert's, `...experts.7`.
        kind: what it is.
        order: its place in execution, from 0; experts have the order of their block.
        tensors: their names in the checkpoint; tied names are in one unit.
        num_parameters: their elements, tied ones counted once.
        stored_bytes: what they take in the files.
        memory_bytes: what they take in memory, in the dtype they are computed in.
        mappable_bytes: the part of `memory_bytes` that can be used where it lies in the files.
        largest_bytes: the largest of their tensors in memory.
        rearranged_bytes: what those take beside it whose elements stand in another order in the files.
        use_share: the part of the unit that one token touches: 1 for a block, a row's share for an embedding, the
            chosen share for experts.
        seen: the tokens that it is given.
        expert_parameters: of a block: those of its elements that are in tensors which hold all of its experts.
        expert_share: the part of those that one token touches.
        expert_tensors: of a block that is placed with its experts: how many of its tensors, the last, are theirs.
        front_bytes: what stays of it where it is streamed; see `loadstone.plan.fronts`.
        compressed_bytes: what stays of it compressed, behind that.
        slice_bytes: how much of it is read at a time where it is streamed; 0 where it comes whole.
        table_rows: of a head that is a table too: its rows, of which tokens look some up.
        encoded_parameters: those of its elements that are stored as blocks of an encoding.
    """

    name: str
    kind: UnitKind
    order: int
    tensors: tuple[str, ...]
    num_parameters: int
    stored_bytes: int
    memory_bytes: int
    mappable_bytes: int
    largest_bytes: int
    use_share: float = 1.0
    rearranged_bytes: int = 0
    seen: Seen = Seen.ALL
    expert_parameters: int = 0
    expert_share: float = 1.0
    expert_tensors: int = 0
    front_bytes: int = 0
    compressed_bytes: int = 0
    slice_bytes: int = 0
    table_rows: int = 0
    encoded_parameters: int = 0

    def num_tokens(self, tokens: tuple[int, int], index: int) -> int:
        """The tokens that it is given in one kind of pass.

        Args:
            tokens: of a decoding pass, and of the pass over the prompt.
            index: which of both.
        """
        if self.seen is Seen.NEWEST:
            return tokens[0]
        return tokens[index] if index or self.seen is Seen.ALL else 0

    @property
    def kept_bytes(self) -> int:
        """The memory of what stays of it where it is streamed."""
        return self.front_bytes + kept_bytes(self.compressed_bytes)

    @property
    def window_bytes(self) -> int:
        """What is in memory of a unit that is read in slices."""
        return NUM_WINDOWS * self.slice_bytes

    @property
    def is_slotted(self) -> bool:
        """Whether it goes through a slot where it is streamed, and is not looked up by rows or read in slices."""
        return self.kind is not UnitKind.EMBEDDING and not self.slice_bytes

    @property
    def slot_bytes(self) -> int:
        """What a slot of the host must have to read it into."""
        return self.memory_bytes + self.rearranged_bytes + self._gap_bytes - self.front_bytes

    @property
    def carried_bytes(self) -> int:
        """What it takes in host memory on its way to an accelerator: as stored, which is expanded over there."""
        if self.stored_bytes < self.memory_bytes:
            return self.stored_bytes
        return self.memory_bytes + self.rearranged_bytes

    @property
    def buffer_bytes(self) -> int:
        """What a buffer on that way must have."""
        return self.carried_bytes + self._gap_bytes

    def slot_bytes_on(self, device: str) -> int:
        """What a slot of a device must have for it; an accelerator puts it in order beside the slot."""
        return self.slot_bytes if device == HOST else self.memory_bytes + self._gap_bytes

    @property
    def _gap_bytes(self) -> int:
        """What may lie between its tensors: each begins as far into a block as it does in its file."""
        return 2 * _BLOCK_BYTES * len(self.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the model is to be used for.

    Attributes:
        context: the tokens of prompt and answer together, of one sequence.
        batch: sequences at a time.
        prompt_tokens: of one sequence, computed in one pass.
    """

    context: int = 4096
    batch: int = 1
    prompt_tokens: int = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Memory of one device that is not weights, in bytes; each is an upper bound.

    Attributes:
        kv_cache_bytes: keys and values of every layer that computes there, at full context and batch.
        activation_bytes: what lies between the operations of one pass, at the most.
        logits_bytes: scores over the vocabulary.
        slot_bytes: the ring that streamed units are read into.
        workspace_bytes: casts, staging buffers, and what loading itself needs beside the weights.
    """

    kv_cache_bytes: int = 0
    activation_bytes: int = 0
    logits_bytes: int = 0
    slot_bytes: int = 0
    workspace_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.kv_cache_bytes + self.activation_bytes + self.logits_bytes + self.slot_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where one unit lives and computes.

    Attributes:
        unit: its name.
        kind: what it is.
        order: its place in execution.
        home: the device id whose memory keeps it, or `disk`.
        compute: the device id that computes with it.
        storage_dtype: what is kept at home: a dtype, or a block encoding.
        compute_dtype: what it is computed in.
        home_bytes: what it takes at home.
        moved_bytes: what travels in each pass; 0 where it is resident.
        mapped: whether it is used where it lies in the files: file-backed memory, which the kernel can drop.
        front_bytes: what of it stays in the memory of the compute device though it is streamed.
        compressed_bytes: what of it, behind that, stays there compressed.
        slice_bytes: how much of it is there at a time, twice, while it is computed with; 0 where it comes whole.
        spare_bytes: of an expert that stays on an accelerator until others are chosen more often: what it takes of host
            memory, from where it comes again then.
    """

    unit: str
    kind: UnitKind
    order: int
    home: str
    compute: str
    storage_dtype: str
    compute_dtype: str
    home_bytes: int
    moved_bytes: int = 0
    mapped: bool = False
    front_bytes: int = 0
    compressed_bytes: int = 0
    slice_bytes: int = 0
    spare_bytes: int = 0

    @property
    def kept_bytes(self) -> int:
        """The memory of what stays of it where it is streamed."""
        return self.front_bytes + kept_bytes(self.compressed_bytes)

    @property
    def is_streamed(self) -> bool:
        """Whether it is brought to its compute device in every pass."""
        return self.home != self.compute


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """What one device holds.

    Attributes:
        device: its id.
        name: what its maker calls it.
        budget_bytes: what the plan may use of it.
        weight_bytes: of resident units in memory of their own, and of what stays of those that are streamed.
        mapped_bytes: of resident units used where they lie in the files (host only).
        reservation: everything else.
        level_bytes: what the process takes beside the model: imports and libraries (host only); within the budget.
    """

    device: str
    name: str
    budget_bytes: int
    weight_bytes: int
    mapped_bytes: int
    reservation: Reservation
    level_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """The most that is used of the device, the process's level after imports included."""
        return self.level_bytes + self.weight_bytes + self.mapped_bytes + self.reservation.total_bytes

    @property
    def anonymous_bytes(self) -> int:
        """The most that cannot be dropped, above the process's level after imports."""
        return self.weight_bytes + self.reservation.total_bytes

    @property
    def free_bytes(self) -> int:
        """What is left of the budget."""
        return self.budget_bytes - self.peak_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One pass through the model, predicted.

    Attributes:
        tokens: of all sequences, in this pass.
        compute_s: computing, if everything were resident.
        transfer_s: moving what is streamed, if nothing were computed.
        seconds: the pass.
        bound_by: what it waits for: "compute", "memory", "disk", "link".
    """

    tokens: int
    compute_s: float
    transfer_s: float
    seconds: float
    bound_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """How long things take.

    Attributes:
        load_s: from headers to the model, imports left out.
        load_bound_by: what the load waits for.
        prefill: the pass over the prompt, whose end is the first token.
        decode: the pass of each further token.
        measured: whether the rates behind it were measured on this machine, or are typical ones.
        generates: whether passes follow each other token by token; if not, both passes are over the whole input, the
            first one and a later one.
    """

    load_s: float
    load_bound_by: str
    prefill: Pass
    decode: Pass
    measured: bool
    generates: bool = True

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second over all sequences."""
        return self.decode.tokens / self.decode.seconds if self.decode.seconds else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a plan was made for, to tell later whether it still is.

    Attributes:
        source: as it was called.
        architecture: the class that config.json names, or "".
        num_tensors: of the checkpoint.
        stored_bytes: of the checkpoint.
        digest: of the names, dtypes, shapes and places of its tensors, in hex.
        machine: the devices with their total bytes, by id.
    """

    source: str
    architecture: str
    num_tensors: int
    stored_bytes: int
    digest: str
    machine: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The whole run, before a byte of a tensor is read.

    Attributes:
        identity: what it was made for.
        run: context, batch and prompt.
        dtype: the model's main dtype.
        placements: every unit once, in execution order.
        devices: those that hold something, the host last.
        prediction: how long things take.
        num_slots: of the ring of streamed units; 0 where nothing is streamed.
        slot_bytes: the most of a unit that goes through a slot: what it has before that stays. 0 where all of it does.
        read_bytes: the most that is read of it: what a slot has before that stays compressed. None where all is read.
        reasons: the choices in plain sentences.
        label: what an alternative does differently, "" for the plan that was asked for.
    """

    identity: Identity
    run: Run
    dtype: str
    placements: tuple[Placement, ...]
    devices: tuple[DevicePlan, ...]
    prediction: Prediction
    num_slots: int = 0
    slot_bytes: int = 0
    read_bytes: int | None = None
    reasons: tuple[str, ...] = ()
    label: str = ""

    @property
    def streams(self) -> bool:
        """Whether anything is brought in anew in each pass."""
        return any(placement.is_streamed for placement in self.placements)

    @property
    def computing(self) -> tuple[str, ...]:
        """The devices that compute, in the order of the walk."""
        return tuple(dict.fromkeys(placement.compute for placement in self.placements))

    @property
    def streamed_bytes(self) -> int:
        """What travels in one pass."""
        return sum(placement.moved_bytes for placement in self.placements)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a caller of the planner asked for.

    Attributes:
        run: context, batch and prompt.
        dtype: as for `loadstone.load`.
        max_memory: budgets in bytes by device id; devices left out are used up to what is free.
        device: the one device to use, or None.
        device_map: in transformers' sense: "auto", a device, or device ids (or "disk") by fqn prefix.
        offload: whether streaming is allowed.
    """

    run: Run = field(default_factory=Run)
    dtype: str | None = None
    max_memory: Mapping[str, int] = field(default_factory=dict)
    device: str | None = None
    device_map: str | Mapping[str, str] | None = None
    offload: bool = True
