"""Make the pictures of the README: pages that Loadstone draws, as headless Chromium shows them.

`plan.png` is the plan of Qwen2.5-7B on a laptop of the gallery. The planner sees headers of that model's shapes, in
sparse files that hold no weights. chromium and chromedriver are needed, and `pip install selenium`.

    python docs/make_pictures.py
"""

from __future__ import annotations

import argparse
import base64
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import loadstone
from loadstone.api.plan import tensors_by_unit
from loadstone.checkpoint.excerpt import Excerpt
from loadstone.checkpoint.hub_cache import HubAccess
from loadstone.hardware.machine_file import find_machine
from loadstone.report.plan_html import to_html

HERE = Path(__file__).parent
MODEL = "Qwen/Qwen2.5-7B-Instruct"
MACHINE = "laptop-rtx4060-8gb"
CONTEXT = 8192
FLAGS = ("headless", "no-sandbox", "disable-gpu", "hide-scrollbars", "disable-background-networking", "disable-sync")


def plan_page(folder: Path) -> str:
    """The page that `loadstone plan MODEL --machine MACHINE --context CONTEXT --html` writes."""
    sys.path.insert(0, str(HERE.parent / "benchmarks"))
    import sparse_checkpoint

    config = sparse_checkpoint.QWEN_7B
    source = sparse_checkpoint.write(folder, config, sparse_checkpoint.qwen_shapes(config), 4)
    plan = loadstone.plan(source, machine=find_machine(MACHINE), context=CONTEXT)
    tensors = tensors_by_unit(source, plan, HubAccess(), Excerpt())
    return to_html(replace(plan, identity=replace(plan.identity, source=MODEL)), tensors)


def photograph(page: Path, picture: Path, *, width: int, scale: float, scheme: str) -> None:
    """Write what a browser shows of a plan's page, from its top to the end of the reasons.

    Args:
        page: an HTML file.
        picture: the PNG file to write.
        width: of the window, in CSS pixels.
        scale: device pixels to a CSS pixel.
        scheme: "light" or "dark".
    """
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    browser: Any = webdriver.Chrome(options=options, service=service)
    try:
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        size = {"width": width, "height": 800, "deviceScaleFactor": scale, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(page.as_uri())
        end = "document.querySelector('[aria-labelledby=why]').getBoundingClientRect().bottom"
        height = round(browser.execute_script(f"return {end}")) + 24
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**size, "height": height})
        taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    finally:
        browser.quit()
    picture.write_bytes(base64.b64decode(taken["data"]))


def main() -> None:
    """Make every picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "plan.png", help="where the picture is written")
    parser.add_argument("--width", type=int, default=1000, help="of the window, in CSS pixels")
    parser.add_argument("--scale", type=float, default=1.5, help="device pixels to a CSS pixel")
    parser.add_argument("--scheme", choices=["light", "dark"], default="light")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        page = Path(name) / "plan.html"
        page.write_text(plan_page(Path(name) / "model"), encoding="utf-8")
        photograph(page, arguments.out, width=arguments.width, scale=arguments.scale, scheme=arguments.scheme)


if __name__ == "__main__":
    main()
