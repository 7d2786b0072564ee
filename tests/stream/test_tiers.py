"""Units on their way to a device that works late: every wait that keeps their numbers right is needed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from loadstone.architecture.keymap import Assignment, Part, Target
from loadstone.checkpoint.open import open_checkpoint
from loadstone.errors import FileChanged
from loadstone.execute.attach import Attachment, attach_to
from loadstone.execute.streamed import Streamed
from loadstone.hardware.fake import FakeLink, FakeMoved
from loadstone.stream import onward
from loadstone.stream.destination import Destination
from loadstone.stream.memory_source import MemorySource
from loadstone.stream.refill import Wanted
from loadstone.stream.sources import FileSource, Source
from loadstone.stream.transfer import NoLink
from loadstone.stream.way import Keep, Way
from loadstone.stream.workers import Job, Workers

SIZE, COUNT = 64, 6
HOST = torch.device("cpu")


def few_whole_numbers(*shape: int) -> torch.Tensor:
    """Numbers whose sums are exact, in whatever order a processor takes them: for some that depends on the address."""
    return torch.randint(-1, 2, shape).float()


class Late(nn.Module):
    """A layer whose product is computed by the fake device, when it comes to it."""

    def __init__(self, link: FakeLink) -> None:
        super().__init__()
        self.weight = nn.Parameter(few_whole_numbers(SIZE, SIZE))
        self.link = link

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, out = self.weight.detach(), torch.empty(SIZE)
        self.link.compute(lambda: torch.mv(weight, x, out=out))
        return out


class Stack(nn.Sequential):
    def __init__(self, link: FakeLink) -> None:
        super().__init__(*(Late(link) for _ in range(COUNT)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x)
        return x


def late_link() -> FakeLink:
    """Copies and products take turns in being the slower, so that whoever does not wait is found out."""
    chance = random.Random(0)
    return FakeLink(delay_s=lambda: chance.choice((0.0, 0.004)), compute_delay_s=lambda: chance.choice((0.0, 0.006)))


def source_of(kind: str, stack: Stack, folder: Path, destination: Destination) -> Source:
    targets = {fqn: Target(shape=(SIZE, SIZE), dtype="float32") for fqn, _ in stack.named_parameters()}
    state = {fqn: parameter.detach().clone() for fqn, parameter in stack.named_parameters()}
    if kind == "memory":
        return MemorySource(tensors=state, targets=targets, way=Way(destination=destination), moved=lambda *_: None)
    save_file(state, folder / "stack.safetensors")
    checkpoint = open_checkpoint(folder / "stack.safetensors")
    wanted = {
        fqn: Wanted(assignment=Assignment(target=fqn, parts=(Part(source=fqn),)), target=target)
        for fqn, target in targets.items()
    }
    keep = Keep.HOST if kind == "files kept in memory" else Keep.DISK
    return FileSource(wanted, checkpoint, Way(destination=destination, keep=lambda _: keep))


def wrong_passes(kind: str, folder: Path, num_slots: int, passes: int = 12) -> int:
    """How many passes on the fake device differ from those of the host."""
    torch.manual_seed(0)
    link = late_link()
    stack = Stack(link)
    inputs = [few_whole_numbers(SIZE) for _ in range(passes)]
    weights = [parameter.detach().clone() for parameter in stack.parameters()]
    streamed = Streamed()
    source = source_of(kind, stack, folder, Destination(HOST, link))
    for fqn, parameter in list(stack.named_parameters()):
        unit = fqn.partition(".")[0]
        stand_in = streamed.stand_in(unit, fqn, Target(shape=tuple(parameter.shape), dtype="float32"))
        stack.get_submodule(unit)._parameters["weight"] = nn.Parameter(stand_in)
    residency = attach_to(stack, streamed, source, Attachment(num_slots))
    residency.start()
    with torch.no_grad():
        found = [stack(x) for x in inputs]
    link.synchronize()
    residency.close()
    expected = []
    for x in inputs:
        expected.append(x)
        for weight in weights:
            expected[-1] = torch.mv(weight, expected[-1])
    return sum(not torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


KINDS = ("memory", "files", "files kept in memory")


@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_device_that_works_late_computes_with_the_right_weights(tmp_path: Path, kind: str, num_slots: int) -> None:
    assert wrong_passes(kind, tmp_path, num_slots) == 0


def nothing(*_: Any) -> None:
    """What is left when a wait is left out."""


def never(*_: Any) -> Callable[[], None]:
    return nothing


@pytest.mark.parametrize(
    ("kind", "owner", "name", "instead"),
    [
        ("memory", FakeLink, "computed", never),
        ("memory", FakeMoved, "join", nothing),
        ("files", FakeLink, "computed", never),
        ("files", FakeMoved, "join", nothing),
        ("files", FakeMoved, "wait", nothing),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_wait_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, owner: type, name: str, instead: Any
) -> None:
    monkeypatch.setattr(owner, name, instead)
    assert wrong_passes(kind, tmp_path, num_slots=2) > 0


def test_a_fill_that_is_given_up_leaves_nothing_under_way(tmp_path: Path) -> None:
    link = FakeLink(delay_s=0.01)
    stack = Stack(link)
    source = source_of("files", stack, tmp_path, Destination(HOST, link))
    filler = source.filler({str(index): [f"{index}.weight"] for index in range(COUNT)})
    slot = filler.slot(filler.layout("0").nbytes)
    for index in range(COUNT):
        filler.fill(str(index), slot).cancel()
    last = filler.fill("0", slot)
    last.wait()
    filler.attend(slot)
    (view,) = filler.layout("0").views(slot)
    assert torch.equal(view, stack[0].weight)  # type: ignore[arg-type]
    filler.close()
    assert link.num_locked_bytes == 0


def test_locked_memory_is_of_exact_size(tmp_path: Path) -> None:
    link = FakeLink()
    stack = Stack(link)
    nbytes = SIZE * SIZE * 4
    memory = source_of("memory", stack, tmp_path, Destination(HOST, link))
    filler = memory.filler({str(index): [f"{index}.weight"] for index in range(COUNT)})
    assert link.num_locked_bytes == COUNT * nbytes
    filler.close()
    link = FakeLink(delay_s=0.01)
    files = source_of("files", stack, tmp_path, Destination(HOST, link))
    filler = files.filler({str(index): [f"{index}.weight"] for index in range(COUNT)})
    slots = [filler.slot(nbytes) for _ in range(COUNT)]
    for fill in [filler.fill(str(index), slot) for index, slot in enumerate(slots)]:
        fill.wait()
    in_file = filler.layout("0").nbytes
    assert nbytes <= in_file < nbytes + 4096
    assert link.num_locked_bytes == onward.NUM_BUFFERS * max(
        files._refill.recipes[str(index)].nbytes  # type: ignore[attr-defined]
        for index in range(COUNT)
    )
    filler.close()


def test_an_error_on_the_device_reaches_the_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory, over there")

    monkeypatch.setattr("loadstone.stream.from_memory.move", fail)
    with pytest.raises(RuntimeError, match="over there"):
        wrong_passes("memory", tmp_path, num_slots=2)


def test_a_file_that_is_replaced_is_named(tmp_path: Path) -> None:
    stack = Stack(FakeLink())
    link = FakeLink()
    source = source_of("files", stack, tmp_path, Destination(HOST, link))
    filler = source.filler({"0": ["0.weight"]})
    filler.check("0")
    save_file({"0.weight": torch.zeros(1)}, tmp_path / "stack.safetensors")
    for check in (lambda: filler.check("0"), filler.check_all):
        with pytest.raises(FileChanged, match=r"stack\.safetensors: expected the file of"):
            check()
    filler.close()


@pytest.mark.parametrize("kind", ["files", "memory"])
@pytest.mark.parametrize("late", [True, False])
def test_what_fills_a_slot_is_known_and_its_reads_are_counted(tmp_path: Path, kind: str, late: bool) -> None:
    link = FakeLink()
    destination = Destination(HOST, link) if late else Destination(HOST, NoLink())
    filler = source_of(kind, Stack(link), tmp_path, destination).filler({"0": ["0.weight"]})
    slot, known = filler.slot(filler.layout("0").nbytes), []
    filling = filler.fill("0", slot, known=known.append)
    assert known == [filling]
    filling.wait()
    filler.check_all()
    assert sum(reader.done_bytes for reader in filler.readers()) == (filler.moved_bytes("0") if kind == "files" else 0)
    filler.close()


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers(1, "test")
    yield made
    made.close()


def test_jobs_run_by_priority_and_carry_their_errors(workers: Workers) -> None:
    import threading

    gate, order = threading.Event(), []

    def note(number: int) -> Callable[[Job], None]:
        return lambda _: order.append(number)

    first = workers.begin(Job(0, lambda _: gate.wait() and None))
    jobs = [workers.begin(Job(0, note(number)), priority=priority) for number, priority in enumerate((1, 0, -1))]
    given_up = workers.begin(Job(0, note(9)), priority=-2)
    given_up.cancel()
    gate.set()

    def fail(_: Job) -> None:
        raise ValueError("this job")

    for job in (first, *jobs):
        job.wait()
    assert order == [2, 1, 0]
    assert given_up.is_over
    with pytest.raises(ValueError, match="this job"):
        workers.begin(Job(0, fail)).wait()


def test_waits_follow_a_slot_that_nothing_was_sent_into_between_two_uses() -> None:
    link = FakeLink(compute_delay_s=0.002)
    place = Destination(HOST, link)
    slot = place.slot(8)
    seen: list[int] = []
    for _ in range(3):
        link.compute(lambda: seen.append(int(slot[0])))
        place.release(slot)
    place.send(slot, lambda: slot.fill_(7)).wait()
    assert seen == [0, 0, 0]
    place.close()
