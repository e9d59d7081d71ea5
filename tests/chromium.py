"""A headless Chromium for the tests of pages, and what they ask of every page."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install dancegrpo[dev])")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
NEEDED = [
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)"),
    pytest.mark.skipif(DRIVER is None, reason="chromedriver is not installed (apt-get install chromium-driver)"),
]


def start_chromium(**logs: str) -> Any:
    """A driver to `quit`. logs: what to record, `browser="ALL"`."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--disable-background-networking")
    options.set_capability("goog:loggingPrefs", logs)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


def faint_texts(browser: Any, selectors: Sequence[str]) -> dict[str, float]:
    """The elements whose text has less than 4.5 times the contrast with its ground that WCAG AA asks for."""
    ratios = browser.execute_script(
        """
        const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
        const channels = (color) => {
          canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
          return [...canvas.getImageData(0, 0, 1, 1).data];
        };
        const light = (c) => { const v = c.slice(0, 3).map(x => x / 255).map(
          x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
          return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
        const ground = (e) => { while (e && channels(getComputedStyle(e).backgroundColor)[3] < 250) e = e.parentElement;
          return channels(getComputedStyle(e).backgroundColor); };
        return arguments[0].map(s => {
            const e = document.querySelector(s), a = light(channels(getComputedStyle(e).color)), b = light(ground(e));
            return [s, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]; });
        """,
        list(selectors),
    )
    return {selector: ratio for selector, ratio in ratios if ratio < 4.5}
