"""The page of a plan in a real browser: headless Chromium, driven over WebDriver; nothing but the file is needed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import plan_examples as examples
import pytest

from loadstone.report.plan_html import to_html

webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium here")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with chromedriver here")

FLAGS = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "disable-dev-shm-usage",
    "window-size=1120,900",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


class Page:
    """An opened page, as a person and a screen reader meet it."""

    def __init__(self, browser: Any, file: Path) -> None:
        self.browser = browser
        browser.get(file.as_uri())

    def one(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.keys import Keys

        for key in keys:
            self.browser.switch_to.active_element.send_keys(getattr(Keys, key))

    def move_to(self, selector: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser).move_to_element(self.one(selector)).perform()

    @property
    def focused(self) -> str:
        return self.browser.switch_to.active_element.get_attribute("id")

    def wait_until(self, holds: Callable[[], bool]) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser, 10, poll_frequency=0.05).until(lambda _: holds())

    def wait_for(self, heading: str) -> None:
        """Until the panel shows what was asked for."""
        self.wait_until(lambda: self.one("#panel h3").text == heading)

    def rows(self) -> list[list[str]]:
        """Of the panel's table, as text."""
        rows = "return [...document.querySelectorAll('#panel tbody tr')]"
        return self.browser.execute_script(f"{rows}.map((row) => [...row.cells].map((cell) => cell.textContent))")

    def style(self, selector: str, name: str) -> str:
        return self.browser.execute_script(
            f"return getComputedStyle(document.querySelector('{selector}')).getPropertyValue('{name}')"
        )


@cache
def _html(name: str) -> str:
    plan = examples.EXAMPLES[name]()
    return to_html(plan, examples.tensors_of(plan))


@pytest.fixture
def page_of(browser: Any, tmp_path: Path) -> Any:
    def opened(name: str) -> Page:
        file = tmp_path / "plan.html"
        file.write_text(_html(name), encoding="utf-8")
        browser.get("about:blank")
        browser.get_log("browser")
        browser.get_log("performance")
        return Page(browser, file)

    return opened


@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_the_page_opens_without_a_fault_or_a_request(page_of: Any, name: str) -> None:
    page = page_of(name)
    page.one("#cell-1").click()
    assert page.one("#panel").is_displayed()
    assert page.browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}


def test_arrow_keys_walk_over_the_strip_and_the_panel_follows(page_of: Any) -> None:
    page = page_of("laptop_gpu")
    assert not page.one("#panel").is_displayed()
    page.press("TAB")
    assert page.focused == "cell-0"
    page.wait_for("model.embed_tokens")
    page.press("ARROW_RIGHT", "ARROW_RIGHT", "ARROW_RIGHT")
    assert page.focused == "cell-3"
    page.wait_for("model.layers.2")
    assert page.one("#panel p").text == "streamed from RAM 466 MB; computed on cuda:0 in bfloat16"
    rows = page.rows()
    assert rows[0] == ["model.layers.2 466 MB of bfloat16 on cpu, 466 MB moved in each pass"]
    assert [
        "model.layers.2.mlp.gate_proj.weight",
        "bfloat16",
        "18,944 × 3,584",
        "136 MB",
        "model-00001-of-00004.safetensors",
    ] in rows
    assert len(rows) == 13
    page.press("END", "ARROW_RIGHT")
    assert page.focused == "cell-30"
    page.press("HOME", "ARROW_LEFT")
    assert page.focused == "cell-0"


def test_the_strip_is_one_stop_of_the_tab_key(page_of: Any) -> None:
    page = page_of("laptop_gpu")
    page.press("TAB", "ARROW_RIGHT", "TAB")
    assert page.browser.switch_to.active_element.get_attribute("class") == "scroller"
    page.press("TAB")
    assert page.browser.switch_to.active_element.tag_name == "summary"


def test_up_and_down_go_between_layers_experts_and_lines(page_of: Any) -> None:
    page = page_of("mixture")
    page.press("TAB", "ARROW_RIGHT")
    page.wait_for("model.layers.0")
    for key, heading in (
        ("ARROW_DOWN", "128 experts of model.layers.0.mlp.experts"),
        ("ARROW_RIGHT", "128 experts of model.layers.1.mlp.experts"),
        ("ARROW_DOWN", "model.layers.26"),
        ("ARROW_UP", "128 experts of model.layers.1.mlp.experts"),
        ("ARROW_UP", "model.layers.1"),
    ):
        page.press(key)
        page.wait_for(heading)


def test_the_focus_can_be_seen(page_of: Any) -> None:
    page = page_of("laptop_gpu")
    page.press("TAB", "ARROW_RIGHT")
    text = page.style("body", "color")
    assert page.style("#cell-1 .ring", "stroke") == text
    assert page.style("#cell-2 .ring", "stroke") == "none"


def test_pointing_shows_the_tensors_and_a_click_keeps_them(page_of: Any) -> None:
    page = page_of("laptop_gpu")
    page.move_to("#cell-5")
    page.wait_for("model.layers.4")
    page.move_to("#cell-9")
    page.wait_for("model.layers.8")
    page.one("#cell-9").click()
    page.move_to("#cell-12")
    page.move_to("#panel")
    assert page.one("#panel h3").text == "model.layers.8"
    page.press("ESCAPE")
    page.move_to("#cell-12")
    page.wait_for("model.layers.11")


def test_a_long_list_of_tensors_is_drawn_as_it_is_scrolled(page_of: Any) -> None:
    page = page_of("mixture")
    page.one("#cell-2").click()
    page.wait_for("128 experts of model.layers.0.mlp.experts")
    assert len(page.rows()) == 120

    def all_drawn() -> bool:
        page.browser.execute_script("const s = document.querySelector('.scroller'); s.scrollTop = s.scrollHeight")
        return len(page.rows()) == 128 * 4

    page.wait_until(all_drawn)
    assert page.rows()[-1][0] == "model.layers.0.mlp.experts.127.down_proj.weight"


@pytest.mark.parametrize(("scheme", "ground"), [("light", "rgb(246, 245, 241)"), ("dark", "rgb(19, 22, 27)")])
def test_the_page_is_light_or_dark_as_the_person_prefers(page_of: Any, scheme: str, ground: str) -> None:
    page = page_of("laptop_gpu")
    features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
    assert page.style("body", "background-color") == ground


def test_a_narrow_screen_needs_no_sideways_scrolling(page_of: Any) -> None:
    page = page_of("mixture")
    size = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.one("#cell-2").click()
    fits = "const page = document.documentElement; return page.scrollWidth === page.clientWidth"
    assert page.browser.execute_script(fits)
    page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_screen_reader_finds_names_and_roles(page_of: Any) -> None:
    page = page_of("laptop_gpu")
    nodes = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named: dict[str, list[str]] = {}
    for node in nodes:
        named.setdefault(node.get("role", {}).get("value", ""), []).append(node.get("name", {}).get("value", ""))
    assert [name.partition(":")[0] for name in named["image"]] == [
        "cuda",
        "cpu",
        "The prompt, up to the first token",
        "Each further token",
    ]
    assert named["listbox"] == ["Layers in execution order; arrow keys move, Enter keeps the details open"]
    assert len(named["option"]) == 31
    assert named["option"][9] == "model.layers.8: streamed from disk 466 MB; computed on cuda:0 in bfloat16"
    assert {"Memory", "Layers, in execution order", "One pass", "Why"} <= set(named["heading"])


def test_without_scripts_everything_but_the_panel_is_there(page_of: Any, browser: Any) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page = page_of("laptop_gpu")
        assert not page.one("#hint").is_displayed()
        assert page.one("#strip").is_displayed()
        page.one("summary").click()
        assert "streamed from disk 466 MB" in page.one("details").text
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
