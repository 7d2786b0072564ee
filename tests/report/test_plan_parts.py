from dataclasses import replace

import plan_examples as examples
import pytest

from loadstone.plan.values import HOST, UnitKind
from loadstone.report import plan_parts
from loadstone.report.plan_parts import Part, Residence


@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_the_parts_of_every_device_make_up_its_budget(name: str) -> None:
    for device in examples.EXAMPLES[name]().devices:
        assert sum(plan_parts.parts_of(device).values()) == device.budget_bytes


def test_logits_are_drawn_with_the_activations() -> None:
    host = examples.laptop_gpu().devices[-1]
    assert plan_parts.parts_of(host)[Part.ACTIVATIONS] == 333_000_000


def test_a_unit_is_resident_mapped_or_streamed_from_where_its_home_is() -> None:
    found = plan_parts.by_residence(examples.laptop_gpu().placements)
    assert {kind: number for kind, (number, _) in found.items()} == {
        Residence.RESIDENT: 12,
        Residence.MAPPED: 3,
        Residence.FROM_MEMORY: 14,
        Residence.FROM_DISK: 2,
    }


def test_what_is_resident_on_another_device_than_the_first_is_resident() -> None:
    placement = replace(examples.resident().placements[1], home=HOST, compute=HOST, mapped=False)
    assert plan_parts.residence(placement) is Residence.RESIDENT


def test_the_experts_of_a_layer_are_one_cell_in_its_column() -> None:
    cells = plan_parts.cells_of(examples.mixture())
    assert len(cells) == 2 + 2 * 48
    layer, experts = cells[1], cells[2]
    assert (layer.column, layer.label, layer.kind) == (1, "0", UnitKind.BLOCK)
    assert (experts.column, experts.label, experts.kind) == (1, "0", UnitKind.EXPERT)
    assert experts.name == "model.layers.0.mlp.experts"
    assert len(experts.placements) == 128
    assert list(experts.bytes_by_residence) == [Residence.RESIDENT, Residence.FROM_MEMORY]


def test_units_of_one_order_share_a_cell() -> None:
    plan = examples.encoder()
    placements = tuple(replace(placement, order=min(placement.order, 12)) for placement in plan.placements)
    last = plan_parts.cells_of(replace(plan, placements=placements))[-1]
    assert last.name == "bert.encoder.layer.11 and 1 more"


def test_what_is_no_block_has_letters_for_a_label() -> None:
    assert [cell.label for cell in plan_parts.cells_of(examples.encoder())][:2] == ["emb", "0"]
    assert [cell.label for cell in plan_parts.cells_of(examples.resident())][-2:] == ["norm", "head"]


def test_a_peak_above_the_budget_is_said() -> None:
    device = replace(examples.encoder().devices[0], budget_bytes=500_000_000)
    assert plan_parts.occupancy(device) == "peak 598 MB of 500 MB: 97.9 MB too much"
    assert Part.FREE not in plan_parts.parts_of(device)


def test_the_prediction_says_whether_its_rates_were_measured() -> None:
    assert plan_parts.prediction_line(examples.laptop_gpu()).endswith("1.53 tokens/s: from rates measured here")
    assert "estimated from typical rates, not measured here" in plan_parts.prediction_line(examples.laptop_disk())


@pytest.mark.parametrize(("tokens", "text"), [(8, "2,000"), (0.4, "100"), (0.04, "10"), (0.0015, "0.375")])
def test_a_rate_has_three_figures(tokens: float, text: str) -> None:
    plan = examples.resident()
    decode = replace(plan.prediction.decode, tokens=tokens, seconds=0.004)
    faster = replace(plan, prediction=replace(plan.prediction, decode=decode))
    assert plan_parts.format_speed(faster) == f"{text} tokens/s"


def test_what_is_moved_is_said_with_the_way_it_goes() -> None:
    assert plan_parts.moved_by(examples.laptop_disk()) == "through 3 slots"
    assert plan_parts.moved_by(replace(examples.laptop_disk(), num_slots=1)) == "through 1 slot"
    assert plan_parts.moved_by(replace(examples.laptop_disk(), num_slots=0)) == "rows that are looked up"
    assert plan_parts.moved_by(examples.resident()) == "everything is resident"
    assert plan_parts.moved_by(examples.in_slices()) == "slices of the head"


def test_what_generates_nothing_has_sequences_and_one_kind_of_pass() -> None:
    plan = examples.encoder()
    assert plan_parts.format_speed(plan) == "50 sequences/s"
    assert [name for name, _ in plan_parts.passes_of(plan)] == ["pass"]
    assert "160 ms a pass and 50 sequences/s" in plan_parts.prediction_line(plan)
    assert plan_parts.subject(plan).endswith("batch 8, 512 tokens each")
