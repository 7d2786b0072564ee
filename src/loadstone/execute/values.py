"""What is asked of a model and what it answered, as values that know no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from loadstone.plan.values import DISK

# As many as a plan takes where it can: one unit is read while another computes.
NUM_SLOTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What is asked.

    Attributes:
        text: the prompt.
        system: a system message, where the tokenizer has a chat template.
        raw: give the text to the model as it is, without a chat template.
    """

    text: str
    system: str | None = None
    raw: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: the most that are generated.
        temperature: 0 takes the likeliest token; None leaves it to the generation config.
        seed: of the random numbers; the same seed gives the same text.
    """

    max_new_tokens: int = 256
    temperature: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Assisted:
    """How many tokens passes have yielded, where tokens were foretold.

    Attributes:
        num_tokens: that came out.
        num_passes: forwards of the model, the one over the prompt included.
        num_proposed: tokens that were foretold.
        num_accepted: those of them that came true.
        note: why nothing was foretold, or nothing any more; "" where it was.
    """

    num_tokens: int = 0
    num_passes: int = 0
    num_proposed: int = 0
    num_accepted: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What came out.

    Attributes:
        text: the answer.
        num_prompt_tokens: tokens that went in.
        num_new_tokens: tokens that came out.
        first_token_s: seconds from the call to the first token.
        tokens_per_s: over all tokens after the first; 0 where there was only one.
        assisted: what was foretold; None where nothing was to be.
    """

    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    first_token_s: float
    tokens_per_s: float
    assisted: Assisted | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """Which parts of a model are not kept in memory but read from their files in each pass.

    Attributes:
        units: common starts of their parameters' names, each that of one module: `model.layers.3`, `lm_head`.
        num_slots: how many units are in memory at a time; with two or more, one is read while another computes.
        tensors: the names of their tensors in the checkpoint, as far as they are known before the class is: these are
            not brought in ahead.
        expert_tensors: those of experts that share the room for experts, by their names in the checkpoint; where it is
            empty all fused experts of the units do.
        expert_bytes: the memory that fused experts of all layers together may take; 0 for experts that come whole,
            with their unit.
        unit_of: where tensors are chosen rather than modules: the unit of each, by its name in the checkpoint.
        device: where the model computes.
        in_memory: which of the tensors are read once, into host memory, and come from there.
        slot_bytes: the most of a unit that goes through a slot, where the host computes: what it has before that stays.
            0 for whole units.
        read_bytes: the most that is read of it: what a slot has before that stays compressed. None for all of it.
        slices: the units of one matrix that come in slices of its rows, where the host computes, with the bytes of a
            slice.
    """

    units: tuple[str, ...] = ()
    num_slots: int = NUM_SLOTS
    tensors: frozenset[str] = frozenset()
    expert_tensors: frozenset[str] = frozenset()
    expert_bytes: int = 0
    unit_of: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    in_memory: frozenset[str] = frozenset()
    slot_bytes: int = 0
    read_bytes: int | None = None
    slices: Mapping[str, int] = field(default_factory=dict)

    def renamed(self, names: Mapping[str, str]) -> Streaming:
        """The same for a checkpoint whose tensors have other names, by those they had."""
        return replace(
            self,
            tensors=frozenset(names.get(name, name) for name in self.tensors),
            expert_tensors=frozenset(names.get(name, name) for name in self.expert_tensors),
            unit_of={names.get(name, name): unit for name, unit in self.unit_of.items()},
            in_memory=frozenset(names.get(name, name) for name in self.in_memory),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Where the blocks of a model are in use, and in which dtype; each a device and a dtype, None as it is.

    A dtype that is narrower than a block's own rounds the block's matrices (what has two dimensions or more), and so
    changes the numbers. They do not depend on which of the blocks stay near. What is not in a block, such as embeddings
    and heads, is on the computing device.

    Attributes:
        parked: while the model is not in use: on the `disk`, or in the host's memory, `cpu`; None for where they are
            ready. On the disk that is the files that the model was loaded from, or a file of its own.
        ready: at home: on the `disk`, or in the host's memory, `cpu`.
        staged: what is kept near, while `staged_bytes` allow: in the host's memory, or on the computing device. The
            home itself, where nothing is to be kept.
        computing: while their forward runs.
        staged_bytes: the most that staged blocks take together, each whole; None for all of them.
    """

    parked: tuple[str, str | None] | None = None
    ready: tuple[str, str | None] = ("cpu", None)
    staged: tuple[str, str | None] = ("cpu", None)
    computing: tuple[str, str | None] = ("cpu", None)
    staged_bytes: int | None = None

    @property
    def resting(self) -> tuple[str, str | None]:
        """Where blocks are while the model is parked, said or not."""
        return self.parked or self.ready

    @property
    def on_disk(self) -> bool:
        """Whether blocks are on the disk in one of their states."""
        return DISK in (self.ready[0], self.resting[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamStats:
    """What streaming has done since the model was loaded.

    Attributes:
        passes: forwards of the whole model.
        uses: how often a unit was computed with.
        hits: uses whose unit was in memory already.
        unforeseen: uses whose unit was not even on its way.
        streamed_bytes: read from the files for units and looked-up rows.
        stall_s: how long forwards waited for the disk.
        num_units: units that come and go.
        num_slots: how many of them are in memory at a time.
        slot_bytes: the memory of all slots.
        front_bytes: what stays of units that come and go, as it is.
        compressed_bytes: the memory of what stays of them compressed.
        window_bytes: the memory of slices of heads that come in slices.
        pass_bytes: what one use of every unit reads.
        pass_s: how long all forwards took together.
        read_bytes: read from the files, with what was read ahead and is not used yet.
        read_s: how long at least one thread was reading.
        expert_uses: how often routers chose an expert's parameter.
        expert_hits: such choices of what was in memory already.
        expert_bytes: read from the files for experts; part of `streamed_bytes`.
        room_bytes: the memory that experts take at most.
        disk_bytes_per_s: what the disk was measured to do at best; None where that was not measured.
        given_back_bytes: of units that left memory because it was short, each time they did.
    """

    passes: int
    uses: int
    hits: int
    unforeseen: int
    streamed_bytes: int
    stall_s: float
    num_units: int
    num_slots: int
    slot_bytes: int
    pass_bytes: int
    pass_s: float
    read_bytes: int
    read_s: float
    expert_uses: int = 0
    expert_hits: int = 0
    expert_bytes: int = 0
    room_bytes: int = 0
    front_bytes: int = 0
    compressed_bytes: int = 0
    window_bytes: int = 0
    disk_bytes_per_s: float | None = None
    given_back_bytes: int = 0

    @property
    def memory_bytes(self) -> int:
        """What streaming takes, where the model computes: slots, slices, what stays of units, the room of experts."""
        return self.slot_bytes + self.window_bytes + self.front_bytes + self.compressed_bytes + self.room_bytes

    @property
    def compute_s(self) -> float:
        """What forwards did besides waiting."""
        return max(0.0, self.pass_s - self.stall_s)

    @property
    def waited_share(self) -> float:
        """The part of the time of all forwards that they waited for the disk, 0 to 1."""
        return min(1.0, self.stall_s / self.pass_s) if self.pass_s else 0.0

    @property
    def overlap(self) -> float:
        """The part of the time of reading in which nobody waited for it, 0 to 1."""
        return max(0.0, 1 - self.stall_s / self.read_s) if self.read_s else 0.0

    @property
    def read_bytes_per_s(self) -> float:
        """How fast the files were read while they were read."""
        return self.read_bytes / self.read_s if self.read_s else 0.0
