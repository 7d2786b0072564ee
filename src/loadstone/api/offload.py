"""`offload`: a module that is already built and loaded, made to run where it does not fit."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loadstone.api.offload_choice import Asked, Chosen, chosen
from loadstone.api.registry import Loaded, find, remember
from loadstone.errors import StreamedModel
from loadstone.events import Recorder
from loadstone.execute.values import States
from loadstone.hardware.memory import PeakWatch, ResidentBytes, resident
from loadstone.plan.choose import Choice
from loadstone.plan.load_peak import LoadPeak
from loadstone.report.load_report import LoadReport
from loadstone.units import format_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

    from loadstone.execute.offload import Offloaded
    from loadstone.execute.residency import Residency


def offload(
    model: nn.Module,
    *,
    device: str | torch.device | None = None,
    max_memory: str | int | None = None,
    home: str = "cpu",
    dtype: str | torch.dtype | None = None,
    states: States | None = None,
) -> nn.Module:
    """Have a module compute on a device that does not hold it: what fits stays there, the rest comes as it is needed.

    Any `nn.Module` will do, whoever built and loaded it. Blocks are what its lists and sequences of modules hold. Those
    that stay are spread evenly between the others, which travel ahead of use through a ring of slots. Parameters are
    read, never written. Autograd needs the whole model at once and is refused.

    Args:
        model: the module, in memory.
        device: where it computes, as torch writes it; by default the first accelerator, or the CPU.
        max_memory: the most that weights and slots may take of that device, in bytes or as `"6GB"`; caches and
            activations come on top. By default four fifths of what is free.
        home: where the parameters are that do not stay: `"cpu"`, where they remain the master copy (in page-locked
            memory, if the device fetches from it), or `"disk"`. There it is the files that `loadstone.load` read them
            from, if they are still the same, otherwise a file without a name in Loadstone's cache folder, which is gone
            when the process is.
        dtype: a narrower dtype in which the matrices of blocks are kept at home and travel, such as
            `"float8_e4m3fn"`. They are rounded to it, which changes the numbers, wherever they are.
        states: says all of that by the states of a block, and more; see `loadstone.States`.

    Returns:
        The same module. `loadstone.of(model)` tells what it does, and its `restore()` undoes it.

    Raises:
        DoesNotFit: not even one block at a time fits.
        DeviceUnavailable: the device is not there.
        StreamedModel: parts of the model are streamed already.
        ValueError: an argument means nothing, or contradicts another.
    """
    known = find(model)
    if known is not None and known.residency is not None and not known.residency.is_whole:
        raise StreamedModel(
            f"{type(model).__name__}: expected a model that is wholly in memory, found one that is streamed already; "
            "call loadstone.of(model).restore() first, or load it again."
        )
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if known is not None and len(known.computing) > 1 and len(devices) > 1:
        raise ValueError(
            f"{type(model).__name__}: expected a module whose parameters are on one device, found them on "
            f"{', '.join(devices)}; move it to one of them, or load it with device=."
        )
    asked = Asked(
        device=None if device is None else str(device),
        max_memory=max_memory,
        home=home,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        states=states,
    )
    return _offloaded(model, asked, known, fresh=False)


def arranged_as_loaded(model: nn.Module, states: States) -> nn.Module:
    """The same for a model that was loaded this moment: nobody can have changed what its files hold."""
    return _offloaded(model, Asked(states=states), find(model), fresh=True)


def _offloaded(model: nn.Module, asked: Asked, known: Loaded | None, *, fresh: bool) -> nn.Module:
    recorder = Recorder()
    before, start = resident(), time.perf_counter()
    with PeakWatch() as watch:
        with recorder.stage("placement") as told:
            choice = chosen(model, asked, known.origin if known is not None else None)
            told.text = choice.text
        with recorder.stage("offload") as told:
            done = _arranged(model, choice, known, fresh=fresh)
            told.text = _line(done)
    report = _report(model, choice, recorder, known)
    report = replace(report, seconds=time.perf_counter() - start, before=before, peak=watch.peak)
    made = _Record(done, known, choice.parking)
    remember(model, Loaded(model, report=report, residency=done.residency if choice.away else None, arranged=made))
    return model


@dataclass(frozen=True, slots=True)
class _Record:
    """What `Loaded` knows of a module that was arranged here.

    Attributes:
        parking: the places where it can be parked, the usual one first.
    """

    done: Offloaded
    known: Loaded | None
    parking: tuple[str, ...]

    def residency(self) -> Residency | None:
        """What can have the module leave, even where all of it stays."""
        return self.done.residency

    def restore(self) -> Loaded | None:
        """Make the module what it was, and what is known of it too."""
        self.done.restore()
        return self.known


def _arranged(model: nn.Module, choice: Chosen, known: Loaded | None, *, fresh: bool) -> Offloaded:
    from loadstone.api.supply import DiskSupply, MemorySupply
    from loadstone.execute.offload import Arrangement, arranged
    from loadstone.stream.destination import Destination
    from loadstone.stream.transfer import torch_device
    from loadstone.stream.way import Way

    device = torch_device(choice.device)
    arrangement = Arrangement(
        device=device,
        dtype=choice.computing_dtype,
        away=choice.away,
        num_slots=choice.num_slots,
        gives_up=choice.on_disk,
    )
    way = Way(destination=Destination(device), keep=choice.keep, rounding=choice.rounding)
    if not choice.on_disk:
        return arranged(model, arrangement, MemorySupply(way))
    supply = DiskSupply(way, known.origin if known is not None else None, is_fresh=fresh)
    weakref.finalize(model, supply.close)
    return arranged(model, arrangement, supply)


def _line(done: Offloaded) -> str:
    if done.residency is None or done.residency.is_whole:
        return "all of it stays"
    stats = done.residency.stats()
    return (
        f"{stats.num_units} units, {format_bytes(stats.pass_bytes)} in each pass, through {stats.num_slots} slots of "
        f"{format_bytes(stats.slot_bytes)} together"
    )


def _report(model: nn.Module, choice: Chosen, recorder: Recorder, known: Loaded | None) -> LoadReport:
    device = Choice(value=choice.device, reason=choice.reason)
    if known is not None:
        phases = (*known.report.phases, *recorder.finished)
        return replace(known.report, device=device, phases=phases, plan=None)
    parameters = list(model.parameters())
    tensors = {id(tensor): tensor for tensor in [*parameters, *model.buffers()]}
    main = next((one.dtype for one in parameters if one.is_floating_point()), "none")
    nothing = ResidentBytes(anonymous_bytes=0, file_bytes=0)
    return LoadReport(
        source="memory",
        model_class=type(model).__name__,
        chosen_by="it was built already",
        files=(),
        num_parameters=sum(one.numel() for one in parameters),
        weight_bytes=sum(one.numel() * one.element_size() for one in tensors.values()),
        dtype=Choice(value=str(main).removeprefix("torch."), reason="as it was built"),
        device=device,
        attention=Choice(value="its own", reason="it was built already"),
        phases=tuple(recorder.finished),
        seconds=0.0,
        mapped_bytes=0,
        paged_bytes=0,
        paged_s=0.0,
        read_bytes=0,
        read_s=0.0,
        before=nothing,
        peak=nothing,
        foretold=LoadPeak(weight_bytes=0, mapped_bytes=0, workspace_bytes=0),
    )
