"""What a person sees: the report in a real browser, at desktop and phone widths."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chromium import NEEDED, faint_texts, start_chromium, webdriver
from dancegrpo.media import read_media
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


def visit(browser: Any, report: Path, width: int, scheme: str = "light", motion: str = "no-preference") -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    wishes = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
    features = [{"name": name, "value": value} for name, value in wishes.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
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


CLIPS = FakeRun(
    iterations=3, held_out=12, evaluations=(0, 3), pictures=(0, 40, 80), frames=9, picture_size=32, prompts_drawn=3
)
SHOWN = "[...document.querySelectorAll('canvas.strip')].filter(c => c.offsetWidth)"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(CLIPS.write(tmp_path_factory.mktemp("clips")))


def see_motion(browser: Any, report: Path, motion: str) -> None:
    """Open a report of clips and wait until they are there. motion: `reduce` or `no-preference`."""
    visit(browser, report, 1280, motion=motion)
    wait_for(browser, f"{SHOWN}.length === 6 && {SHOWN}.every(c => c.dataset.at)")


def wait_for(browser: Any, condition: str) -> None:
    end = time.monotonic() + 20
    while not browser.execute_script(f"return {condition}"):
        time.sleep(0.02)
        assert time.monotonic() < end, condition


def pixels(browser: Any) -> list[list[int]]:
    return browser.execute_script(
        f"return {SHOWN}.map(c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data])"
    )


def test_clips_play_in_step(browser: Any, clips: Path) -> None:
    see_motion(browser, clips, "no-preference")
    positions = set()
    for _ in range(20):
        at = browser.execute_script(f"return {SHOWN}.map(c => c.dataset.at)")
        assert len(set(at)) == 1
        positions.add(at[0])
    wait_for(browser, f"{SHOWN}[0].dataset.at !== '{at[0]}'")
    wait_for(browser, f"{SHOWN}[0].dataset.at === '8'")
    wait_for(browser, f"{SHOWN}[0].dataset.at === '0'")  # and round again
    assert positions <= {str(n) for n in range(9)}


def test_a_clip_shows_the_pixels_of_its_file(browser: Any, clips: Path) -> None:
    see_motion(browser, clips, "no-preference")
    wait_for(browser, f"{SHOWN}[0].dataset.at === '5'")
    browser.execute_script("document.getElementById('play').click()")
    at = int(browser.execute_script(f"return {SHOWN}[0].dataset.at"))
    expected = [
        read_media(clips.parent / "samples" / f"{i:06}" / f"{k}.webp")[at].permute(1, 2, 0).numpy()
        for k in range(3)
        for i in (0, 80)
    ]
    seen = [np.array(values, dtype=np.uint8).reshape(32, 32, 4)[..., :3] for values in pixels(browser)]
    assert all(np.array_equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_the_button_stops_and_starts_all_clips(browser: Any, clips: Path) -> None:
    see_motion(browser, clips, "no-preference")
    button = browser.find_element("id", "play")
    assert button.text == "Pause"
    button.click()
    assert button.text == "Play"
    held = pixels(browser)
    time.sleep(0.4)
    assert pixels(browser) == held
    button.send_keys(webdriver.Keys.ENTER)
    wait_for(browser, f"{SHOWN}[0].dataset.at !== '{browser.execute_script(f'return {SHOWN}[0].dataset.at')}'")


def test_who_wants_less_motion_sees_the_first_frame_and_may_play(browser: Any, clips: Path) -> None:
    see_motion(browser, clips, "reduce")
    time.sleep(0.4)
    assert set(browser.execute_script(f"return {SHOWN}.map(c => c.dataset.at)")) == {"0"}
    button = browser.find_element("id", "play")
    assert button.text == "Play"
    button.click()
    wait_for(browser, f"{SHOWN}[0].dataset.at === '4'")


def test_the_slider_shows_the_clips_between_though_they_pause(browser: Any, clips: Path) -> None:
    see_motion(browser, clips, "reduce")
    before = pixels(browser)
    browser.find_element("id", "frame").send_keys(webdriver.Keys.ARROW_LEFT)
    assert set(browser.execute_script(f"return {SHOWN}.map(c => c.dataset.frame + c.dataset.at)")) == {"00", "10"}
    after = pixels(browser)
    assert before[::2] == after[::2]
    assert all(a != b for a, b in zip(before[1::2], after[1::2], strict=True))


def test_clips_stand_side_by_side_with_hard_edges_and_a_name(browser: Any, clips: Path) -> None:
    see_motion(browser, clips, "reduce")
    boxes = browser.execute_script(
        f"return {SHOWN}.map(c => {{ const r = c.getBoundingClientRect();"
        " return [r.top, r.left, r.width, r.height, getComputedStyle(c).imageRendering, c.ariaLabel]; })"
    )
    for before, after in zip(boxes[::2], boxes[1::2], strict=True):
        assert before[0] == after[0]
        assert before[1] + before[2] <= after[1]
        assert before[2] == pytest.approx(before[3], abs=1)
        assert before[2] > 64
        assert before[4] == "pixelated"
        assert before[5].endswith(", before training")
        assert after[5].endswith(", after 80 iterations")


def test_a_page_of_clips_is_quiet_and_stays_offline(browser: Any, clips: Path) -> None:
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)
    see_motion(browser, clips, "no-preference")
    wait_for(browser, f"{SHOWN}[0].dataset.at === '3'")
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert requests
    assert {url.split(":")[0] for url in requests} <= {"file", "data"}


def test_without_a_script_each_frame_is_there_to_see(browser: Any, clips: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        visit(browser, clips, 1280)
        strips = [strip for strip in browser.find_elements("css selector", "img.strip") if strip.is_displayed()]
        assert len(strips) == 6
        assert all(strip.get_property("naturalWidth") == 100 for strip in strips)  # 3 x 3 frames of 32
        assert "in reading order" in browser.find_element("css selector", "noscript .about").text
        assert not browser.find_element("id", "play").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
