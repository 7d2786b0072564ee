import io
from dataclasses import replace
from pathlib import Path

import plan_examples as examples
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from loadstone.plan.values import Plan, Reservation
from loadstone.report import plan_picture

SNAPSHOTS = Path(__file__).parent
WIDTHS = (60, 61, 80, 99, 120, 200)


def _drawn(*plans: Plan, width: int, colour: bool = False) -> str:
    """The picture of a plan, or the table of several."""
    drawn = io.StringIO()
    console = Console(
        file=drawn, width=width, force_terminal=colour, color_system="truecolor" if colour else None, no_color=False
    )
    if len(plans) == 1:
        plan_picture.render(plans[0], console)
    else:
        plan_picture.render_alternatives(plans, console)
    return "".join(f"{line.rstrip()}\n" for line in drawn.getvalue().splitlines())


@pytest.mark.parametrize(
    ("name", "width"),
    [("laptop_gpu", 60), ("laptop_disk", 80), ("resident", 80), ("encoder", 80), ("mixture", 100), ("eight_gpus", 200)],
)
def test_the_picture_is_the_one_on_file(name: str, width: int) -> None:
    snapshot = SNAPSHOTS / f"plan_{name}_at_{width}_columns.txt"
    assert _drawn(examples.EXAMPLES[name](), width=width) == snapshot.read_text(encoding="utf-8")


def test_the_alternatives_are_those_on_file() -> None:
    plans = [examples.laptop_gpu("int8 weights, decoded on the GPU"), examples.laptop_disk()]
    snapshot = SNAPSHOTS / "plan_alternatives_at_80_columns.txt"
    assert _drawn(*plans, width=80) == snapshot.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_no_line_is_longer_than_the_terminal(name: str, width: int) -> None:
    lines = _drawn(examples.EXAMPLES[name](), width=width).splitlines()
    assert max(map(len, lines)) <= width


def test_colour_adds_nothing_but_colour() -> None:
    from rich.text import Text

    plan = examples.laptop_gpu()
    coloured = _drawn(plan, width=80, colour=True)
    assert "\x1b[" in coloured
    plain = [line.rstrip() for line in Text.from_ansi(coloured).plain.splitlines()]
    assert plain == _drawn(plan, width=80).splitlines()


def test_every_symbol_of_a_drawing_means_one_thing() -> None:
    for table in (plan_picture._PARTS, plan_picture._RESIDENCES):
        symbols = [symbol for symbol, _ in table.values()]
        assert len(set(symbols)) == len(symbols)


@given(st.lists(st.floats(1, 1e12), min_size=1, max_size=8), st.integers(8, 200))
def test_shares_fill_the_bar_and_none_is_empty(amounts: list[float], width: int) -> None:
    cells = plan_picture._shares(amounts, width)
    assert sum(cells) == width
    assert min(cells) >= 1


def test_a_strip_of_83_layers_at_60_columns_takes_two_lines() -> None:
    lines = _drawn(examples.eight_gpus(), width=60).splitlines()
    assert [len(line) - 9 for line in lines if line.startswith("layers   ")] == [51, 32]
    assert [line[9:] for line in lines if line.startswith("on  ")][1] == "5" * 10 + "6" * 10 + "7" * 12


def test_devices_are_told_by_their_number_or_letter() -> None:
    assert plan_picture._device_symbols(["cpu", "cuda:0", "cuda:1", "xpu:1", "mps", "cpu"]) == {
        "cpu": "c",
        "cuda:0": "0",
        "cuda:1": "1",
        "xpu:1": "x",
        "mps": "m",
    }


def test_a_budget_that_is_passed_is_marked() -> None:
    plan = examples.encoder()
    device = replace(plan.devices[0], budget_bytes=500_000_000)
    assert "peak 598 MB of 500 MB: 97.9 MB too much" in _drawn(replace(plan, devices=(device,)), width=80)


def test_names_are_no_markup() -> None:
    plan = examples.encoder()
    identity = replace(plan.identity, source="[bold]x[/bold]")
    assert "from [bold]x[/bold]" in _drawn(replace(plan, identity=identity, reasons=("[red]r",)), width=80)


def test_a_plan_of_nothing_is_drawn() -> None:
    plan = examples.encoder()
    device = replace(plan.devices[0], weight_bytes=0, reservation=Reservation(), budget_bytes=0)
    assert "peak 0 B of 0 B" in _drawn(replace(plan, placements=(), devices=(device,)), width=60)
