"""A machine as text: what can compute, what it may use, how fast it is."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING

from loadstone.hardware.spec import Disk, Limit, Machine, Rates
from loadstone.units import format_bytes, format_flops, format_rate, format_seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WIDE, _BAR_WIDTHS = 100, (8, 20)  # from how many columns on, and the bar's below and from there
_UNKNOWN = "–"


def render(machine: Machine, console: Console) -> None:
    """Draw a machine.

    Args:
        machine: what to draw.
        console: where; its width is respected.
    """
    facts = _grid()
    if machine.name:
        facts.add_row("machine", machine.name)
    cores = f"{machine.num_cores} core{'s' if machine.num_cores > 1 else ''}"
    features = ", ".join(machine.cpu.features) or "no features that matter to matrix products"
    facts.add_row("processor", f"{machine.cpu.name}, {cores}: {features}")
    for number, limit in enumerate(machine.host_limits):
        facts.add_row("limits" if number == 0 else "", _limit_line(limit))
    if not machine.host_limits:
        facts.add_row("limits", "none: all of the machine's memory may be used")
    for number, disk in enumerate(machine.disks):
        facts.add_row("disks" if number == 0 else "", _disk_line(disk))
    facts.add_row("rates", rates_line(machine.rates) or "not measured yet; --measure does it, in a few seconds")
    for number, source in enumerate(machine.sources):
        facts.add_row("sources" if number == 0 else "", source)
    console.print(_devices(machine, console.width))
    console.print()
    console.print(facts)
    if any(device.compute for device in machine.devices):
        console.print()
        console.print(_products(machine))


def render_gallery(machines: Iterable[Machine], console: Console) -> None:
    """Draw the machines of the gallery, one a line."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("name", no_wrap=True, style="bold")
    table.add_column("accelerators", overflow="fold")
    table.add_column("memory", justify="right", no_wrap=True)
    table.add_column("RAM", justify="right", no_wrap=True)
    table.add_column("cores", justify="right", no_wrap=True)
    for machine in machines:
        gpus = machine.devices[:-1]
        names = _UNKNOWN if not gpus else gpus[0].name if len(gpus) == 1 else f"{len(gpus)} × {gpus[0].name}"
        table.add_row(
            machine.name,
            names,
            format_bytes(sum(gpu.total_bytes for gpu in gpus)) if gpus else _UNKNOWN,
            format_bytes(machine.host.total_bytes),
            str(machine.num_cores),
        )
    console.print(table)


def _devices(machine: Machine, width: int) -> Table:
    """A line for each device; a column of which nothing is known is left out."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("device", no_wrap=True, style="bold")
    table.add_column("name")
    table.add_column("free of total memory", no_wrap=True)
    capabilities = [device.capability for device in machine.devices]
    links = [device.link_bytes_per_s for device in machine.devices]
    if any(capabilities):
        table.add_column("capability", no_wrap=True)
    if any(links):
        table.add_column("from host", justify="right", no_wrap=True)
    for device, capability, link in zip(machine.devices, capabilities, links, strict=True):
        bar = _bar(device.free_bytes / device.total_bytes, _BAR_WIDTHS[width >= _WIDE])
        memory = f"{bar} {format_bytes(device.free_bytes)} of {format_bytes(device.total_bytes)}"
        more = [capability or _UNKNOWN] * any(capabilities)
        more += [_UNKNOWN if link is None else format_rate(link)] * any(links)
        table.add_row(device.id, device.name, memory, *more)
    return table


def _products(machine: Machine) -> Table:
    """The rates of matrix products; devices that are alike stand together."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("products", style="bold")
    table.add_column("dtype", no_wrap=True)
    table.add_column("weights, one token", justify="right", no_wrap=True)
    table.add_column("many tokens", justify="right", no_wrap=True)
    table.add_column("steps a tensor", justify="right", no_wrap=True)
    for compute, alike in groupby(machine.devices, key=lambda device: device.compute):
        ids = [device.id for device in alike]
        label = ids[0] if len(ids) == 1 else f"{ids[0]} … {ids[-1].rpartition(':')[2]}"
        for number, (dtype, rate) in enumerate(compute.items()):
            table.add_row(
                label if number == 0 else "",
                dtype,
                format_rate(rate.weight_bytes_per_s),
                format_flops(rate.flops_per_s),
                "" if rate.step_s is None else format_seconds(rate.step_s),
            )
    return table


def _grid() -> Table:
    from rich.table import Table

    grid = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def _bar(free: float, width: int) -> str:
    """Used memory is full, free memory is empty."""
    used = round(width * (1 - free))
    return "█" * used + "░" * (width - used)


def _limit_line(limit: Limit) -> str:
    return (
        f"{limit.what} allows {format_bytes(limit.limit_bytes)}, of which {format_bytes(limit.used_bytes)} is used "
        f"and cannot be reclaimed: {format_bytes(limit.free_bytes)} may still be taken"
    )


def _disk_line(disk: Disk) -> str:
    kind = "over a network" if disk.network else {True: "turning", False: "solid state", None: ""}[disk.rotational]
    details = ", ".join(word for word in (disk.file_system, kind) if word)
    return (
        f"{disk.path}: {format_bytes(disk.free_bytes)} free of {format_bytes(disk.total_bytes)}"
        f"{f' ({details})' if details else ''}"
    )


def rates_line(rates: Rates) -> str:
    """What was measured of the disk and the memory, in words; empty if nothing was."""
    figures = {
        "disk": rates.disk_bytes_per_s,
        "cached files": rates.cached_bytes_per_s,
        "memory copy": rates.copy_bytes_per_s,
        "first touch of memory": rates.touch_bytes_per_s,
        "compressed weights": rates.expand_bytes_per_s,
    }
    return ", ".join(f"{name} {format_rate(rate)}" for name, rate in figures.items() if rate is not None)
