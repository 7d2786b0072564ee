import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from itertools import product

import plan_examples as examples
import pytest

from loadstone.checkpoint.values import TensorInfo
from loadstone.plan.values import Plan, UnitKind
from loadstone.report.markup import Markup, element
from loadstone.report.plan_html import to_html

HOSTILE = """</script><script>alert("1")</script><!--' onload='x' & ${title}"""
_VOID = {"meta", "link", "rect", "line"}


class _Page(HTMLParser):
    """What a page holds; an element that is closed wrongly is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in _VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def values(self, attribute: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == attribute]

    def data(self) -> dict[str, list]:
        return json.loads(self.texts["script"][0])


def _tensors_in(page: _Page) -> list[tuple[str, str, str, str, str]]:
    """Every tensor of a page, as its script will show it."""
    data, found = page.data(), []
    for cell in data["cells"]:
        for unit, _, numbers in cell["units"]:
            for leaf, form, file in zip(*[iter(numbers)] * 3, strict=True):
                name = data["leaves"][leaf]
                name = unit + name if name.startswith(".") else name[1:]
                found.append((name, *data["forms"][form], data["files"][file]))
    return found


@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_the_page_is_well_formed_and_asks_for_nothing(name: str) -> None:
    text = to_html(examples.EXAMPLES[name](), alternatives=[examples.resident()])
    page = _Page(text)
    assert "://" not in text
    assert "@import" not in text
    assert page.values("src") == []
    assert set(page.values("href")) == {"data:,"}
    assert set(re.findall(r"url\(([^)]*)\)", text)) == {"#hatch", "#dots"}
    ids = page.values("id")
    assert len(set(ids)) == len(ids)


def test_every_drawing_has_a_role_a_label_and_a_title() -> None:
    plan = examples.laptop_gpu()
    text = to_html(plan)
    images = re.findall(r'<svg class="(?:bar|timeline)" role="img" aria-label="([^"]+)"><title>([^<]+)</title>', text)
    assert len(images) == len(plan.devices) + 2
    assert all(label == title for label, title in images)
    assert images[0][0].startswith("cuda:0: peak 7.40 GB of 7.60 GB: weights 5.59 GB, KV cache 470 MB")
    assert images[3][0] == "Each further token: 655 ms, bound by the link; compute 78 ms, transfer 655 ms"


def test_one_cell_of_the_strip_is_in_the_order_of_tabs() -> None:
    page = _Page(to_html(examples.mixture()))
    options = page.values("role").count("option")
    assert options == 98
    assert page.values("tabindex").count("0") == 2  # the first cell, and the panel that can be scrolled
    assert page.values("tabindex").count("-1") == options - 1


def test_the_tables_say_what_the_drawings_show() -> None:
    cells = _Page(to_html(examples.laptop_gpu())).texts
    assert "model.layers.8" in cells["th"]
    assert "streamed from disk 466 MB" in cells["td"]
    assert "peak 7.40 GB of 7.60 GB" in cells["span"]
    assert cells["summary"] == ["Show the tables"]


def test_a_head_in_slices_says_so() -> None:
    plan = examples.in_slices()
    head = plan.placements[-1]
    page = to_html(plan)
    assert "in slices of 16.8 MB, two of them at a time" in page
    assert f"{head.unit}" in page
    assert "slices of the head" in page


def test_every_tensor_is_in_the_page_once() -> None:
    plan = examples.mixture()
    found = _tensors_in(_Page(to_html(plan, examples.tensors_of(plan))))
    names = [info.name for infos in examples.tensors_of(plan).values() for info in infos]
    assert sorted(tensor[0] for tensor in found) == sorted(names)
    assert (
        "model.layers.0.mlp.experts.7.up_proj.weight",
        "bfloat16",
        "768 × 2,048",
        "3.15 MB",
        "model-00001-of-00004.safetensors",
    ) in found


def test_a_block_encoding_and_a_foreign_name_are_shown_as_they_are() -> None:
    info = examples.tensor("blk.0.attn_q.weight", (64, 64), "model.gguf", encoding="Q4_1")
    scalar = examples.tensor("rope_freqs", (), "model.gguf")
    page = _Page(to_html(examples.resident(), {"model.layers.0": [info, scalar]}))
    assert _tensors_in(page) == [
        ("blk.0.attn_q.weight", "Q4_1", "64 × 64", "8.19 kB", "model.gguf"),
        ("rope_freqs", "bfloat16", "scalar", "2 B", "model.gguf"),
    ]


def _hostile() -> tuple[Plan, dict[str, list[TensorInfo]]]:
    plan = examples.encoder()
    unit = replace(plan.placements[0], unit=HOSTILE, storage_dtype=HOSTILE, compute_dtype=HOSTILE)
    odd = replace(
        plan,
        identity=replace(plan.identity, source=HOSTILE, architecture=HOSTILE),
        dtype=HOSTILE,
        label=HOSTILE,
        placements=(unit, replace(unit, kind=UnitKind.EXPERT, compute=HOSTILE)),
        devices=(replace(plan.devices[0], device=HOSTILE, name=HOSTILE),),
        reasons=(HOSTILE,),
    )
    return odd, {HOSTILE: [examples.tensor(f"{HOSTILE}.weight", (2,), HOSTILE.replace("/", "|"), HOSTILE)]}


def test_hostile_names_stay_text() -> None:
    plan, tensors = _hostile()
    page = _Page(to_html(plan, tensors, [plan]))
    assert len(page.texts["script"]) == 2  # the data and the script: each of one piece
    assert _tensors_in(page)[0][0] == f"{HOSTILE}.weight"
    assert page.texts["h1"] == [HOSTILE]
    assert page.texts["li"] == [HOSTILE]
    assert page.values("onload") == []


def test_markup_escapes_what_is_none() -> None:
    drawn = element("p", {"title": '"<', "class": None}, "<b>", Markup("<i></i>"))
    assert drawn == '<p title="&quot;&lt;">&lt;b&gt;<i></i></p>'
    assert element("rect", {"x": 1}) == '<rect x="1"/>'


def test_a_device_above_its_budget_is_marked() -> None:
    plan = examples.encoder()
    device = replace(plan.devices[0], budget_bytes=500_000_000)
    text = to_html(replace(plan, devices=(device,)))
    assert 'class="budget"' in text
    assert "97.9 MB too much" in text


def test_an_estimate_is_called_one() -> None:
    assert "Estimated: the rates are typical ones" in to_html(examples.laptop_disk())
    assert "Predicted from rates measured on this machine." in to_html(examples.laptop_gpu())


def test_a_plan_without_units_is_a_page() -> None:
    _Page(to_html(replace(examples.encoder(), placements=())))


def _palettes() -> dict[str, dict[str, str]]:
    sheet = resources.files("loadstone.report").joinpath("plan_page.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", sheet, re.DOTALL)
    return {
        scheme: dict(re.findall(r"--(\w+): (#\w{6});", block))
        for scheme, block in zip(("light", "dark"), blocks, strict=True)
    }


def _luminance(colour: str) -> float:
    """Relative luminance. Source: https://www.w3.org/TR/WCAG22/#dfn-relative-luminance ."""
    channels = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_fills_stand_out_from_what_is_behind_them(scheme: str) -> None:
    palette = _palettes()[scheme]
    quiet = {"ground", "surface", "line", "track"}
    assert quiet < set(palette)
    pairs = [
        *product(set(palette) - quiet, ("surface", "ground")),  # text and fills on cards, text on fills in their colour
        ("text", "track"),
        ("muted", "track"),
    ]
    contrasts = {}
    for front, back in pairs:
        light, dark = sorted((_luminance(palette[front]), _luminance(palette[back])), reverse=True)
        contrasts[front, back] = (light + 0.05) / (dark + 0.05)
    assert {pair: ratio for pair, ratio in contrasts.items() if ratio < 4.5} == {}
