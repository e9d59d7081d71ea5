"""What a person sees: the report in a real browser, at desktop and phone widths."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chromium import NEEDED, faint_texts, start_chromium, webdriver
from dancegrpo.report import write_report
from fake_run import FakeRun

pytestmark = NEEDED

RUN = FakeRun(iterations=60, held_out=120, evaluations=(0, 30, 60), pictures=(0, 30, 60), masked=True)
HOSTILE = "</script><img src=//example.invalid/x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = start_chromium(browser="ALL", performance="ALL")
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(RUN.write(tmp_path_factory.mktemp("run")))


def visit(browser: Any, report: Path, width: int, scheme: str = "light") -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(report.as_uri())


@pytest.fixture(params=[1280, 390], ids=["desktop", "phone"])
def page(browser: Any, report: Path, request: pytest.FixtureRequest) -> Any:
    visit(browser, report, request.param)
    return browser


def metric(report: Path, key: str) -> list[float | None]:
    return [json.loads(line)[key] for line in (report.parent / "metrics.jsonl").read_text().splitlines()]


def plot(page: Any, title: str) -> Any:
    return page.find_element("xpath", f"//h3[text()='{title}']/ancestor::figure//div[contains(@class, 'plot')]")


def point_at(page: Any, element: Any, share: float) -> None:
    """Put the pointer over a plot, at a share of its width."""
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    offset = int((share - 0.5) * element.size["width"])
    webdriver.ActionChains(page, duration=0).move_to_element_with_offset(element, offset, 0).perform()


def test_the_verdict_is_seen_without_scrolling(page: Any) -> None:
    verdict = page.find_element("css selector", "#verdict h2")
    assert verdict.is_displayed()
    assert verdict.text.startswith("Held-out pass rate rose from ")
    assert verdict.rect["y"] + verdict.rect["height"] < 800


def test_nothing_reaches_beyond_the_window(page: Any) -> None:
    assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    beyond = page.execute_script(
        "return [...document.querySelectorAll('body *')].filter(e => !e.closest('pre, .tooltip') &&"
        " e.getBoundingClientRect().right > window.innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"
    )
    assert beyond == []


def test_all_pictures_load_side_by_side(page: Any) -> None:
    pairs = page.execute_script(
        "return [...document.querySelectorAll('.pair')].map(p => [...p.querySelectorAll('img')]"
        ".filter(i => i.offsetWidth).map(i => { const r = i.getBoundingClientRect();"
        " return [i.naturalWidth, r.top, r.left, r.width, getComputedStyle(i).imageRendering]; }))"
    )
    assert len(pairs) == 12
    for before, after in pairs:
        assert before[0] == after[0] == 64
        assert before[1] == after[1]
        assert before[2] + before[3] <= after[2]
        assert before[3] > 64
        assert after[4] == "pixelated"


def test_pointing_at_a_curve_shows_its_value(page: Any, report: Path) -> None:
    norms = metric(report, "train/grad_norm")
    box = plot(page, "Gradient norm")
    point_at(page, box, 0.6)
    lines = box.find_element("class name", "tooltip").text.splitlines()
    iteration = int(lines[0].removeprefix("iteration "))
    assert 25 <= iteration <= 45
    assert f"{norms[iteration]:.4g}" in lines[1].split()


def test_the_tooltip_stays_inside_the_window(page: Any) -> None:
    box = plot(page, "Seconds per iteration")
    for share in (0.02, 0.98):
        point_at(page, box, share)
        tooltip = box.find_element("class name", "tooltip")
        assert tooltip.is_displayed()
        assert tooltip.rect["x"] >= 0
        assert tooltip.rect["x"] + tooltip.rect["width"] <= page.execute_script("return window.innerWidth")


def test_curves_can_be_read_with_the_keyboard(page: Any, report: Path) -> None:
    box = plot(page, "Loss")
    box.send_keys(webdriver.Keys.HOME)
    box.send_keys(webdriver.Keys.ARROW_RIGHT)
    head, row = box.find_element("class name", "tooltip").text.splitlines()[:2]
    assert head == "iteration 1"
    assert float(row.split()[1]) == pytest.approx(metric(report, "train/loss")[1], rel=5e-3)


def test_missing_values_are_gaps_in_the_curve(page: Any) -> None:
    # Iterations 4, 14, ... of the second judge are missing: six gaps make seven strokes.
    path = plot(page, "Reward: hps").find_element("css selector", "path.strong").get_attribute("d")
    assert path.count("M") == 7


def test_every_curve_is_drawn_in_legible_letters(page: Any) -> None:
    plots = page.find_elements("class name", "plot")
    assert len(plots) > 15
    drawn = page.execute_script(
        "return [...document.querySelectorAll('.plot')].map(p => [p.querySelectorAll('path').length,"
        " Math.min(...[...p.querySelectorAll('text')].map(t => t.getBoundingClientRect().height))])"
    )
    assert all(paths >= 1 and height >= 11 for paths, height in drawn)


def test_the_slider_shows_the_pictures_between(page: Any) -> None:
    frames = "return [...document.querySelectorAll('.pair')].map(p => [...p.querySelectorAll('img')]"
    shown = frames + ".filter(i => i.offsetWidth).map(i => i.dataset.frame).join())"
    assert set(page.execute_script(shown)) == {"0,2"}
    page.find_element("id", "frame").send_keys(webdriver.Keys.ARROW_LEFT)
    assert set(page.execute_script(shown)) == {"0,1"}
    assert page.find_element("id", "frame-label").text == "after 30 iterations"


def test_the_configuration_opens_on_a_click(page: Any) -> None:
    text = page.find_element("css selector", "details pre")
    assert not text.is_displayed()
    page.find_element("css selector", "summary").click()
    assert text.is_displayed()
    assert "group_size: 12" in text.text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser: Any, report: Path, scheme: str) -> None:
    visit(browser, report, 1280, scheme)
    named = "h1; #verdict h2; #verdict p; .about; .kicker; .legend li; .tiles dt; "
    named += "td small; b.up; .chart figcaption p; .facts dt; footer p; .findings li"
    assert faint_texts(browser, named.split("; ")) == {}


def test_the_page_is_quiet_and_stays_offline(browser: Any, tmp_path: Path) -> None:
    hostile = FakeRun(iterations=3, held_out=12, evaluations=(0, 3), pictures=(0, 3), prompt=HOSTILE, name="<b>")
    report = write_report(hostile.write(tmp_path))
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)
    visit(browser, report, 1280)
    point_at(browser, plot(browser, "Gradient norm"), 0.5)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert requests
    assert {url.split(":")[0] for url in requests} <= {"file", "data"}
    assert HOSTILE in browser.find_element("css selector", ".pair figcaption").text


def test_a_run_of_one_iteration_is_drawn(browser: Any, tmp_path: Path) -> None:
    report = write_report(FakeRun(iterations=1, evaluations=(), pictures=()).write(tmp_path))
    visit(browser, report, 390)
    shapes = plot(browser, "Reward: shapes").find_elements("css selector", "circle")
    assert [shape.is_displayed() for shape in shapes] == [True]
    assert browser.find_element("css selector", "#verdict h2").text.startswith("One iteration")
