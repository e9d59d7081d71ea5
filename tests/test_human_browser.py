"""What a person who votes sees and does: the page in a real browser, at desktop and phone widths."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from chromium import NEEDED, faint_texts, start_chromium, webdriver
from dancegrpo.prompts import Prompt
from dancegrpo.rewards import Scores
from dancegrpo.rewards.human import HumanReward

pytestmark = NEEDED
HOSTILE = "</h1><img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"
PATIENCE = 30.0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = start_chromium(browser="ALL")
    yield driver
    driver.quit()


class Run:
    """A judge that asks about groups of flat colours, as a run would, in a thread."""

    def __init__(self, judge: HumanReward, groups: dict[str, int], frames: int = 1, side: int = 32) -> None:
        self.judge, self.scores = judge, []
        prompts = [Prompt(i, text) for i, (text, size) in enumerate(groups.items()) for _ in range(size)]
        colors = torch.rand(len(prompts), 1, 3, 1, 1, generator=torch.Generator().manual_seed(0))
        steps = torch.linspace(1.0, 0.3, frames)[None, :, None, None, None]
        slope = torch.linspace(0.5, 1.0, side)
        media = (colors * steps * slope).expand(-1, -1, 3, side, side)
        self.thread = threading.Thread(target=lambda: self.scores.append(judge(media, prompts)), daemon=True)
        self.thread.start()

    def result(self) -> Scores:
        self.thread.join(PATIENCE)
        return self.scores[0]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def build(groups: dict[str, int], frames: int = 1, side: int = 32, **options: Any) -> Run:
        runs.append(Run(HumanReward(votes=tmp_path / "votes.jsonl", wait=PATIENCE, **options), groups, frames, side))
        return runs[-1]

    yield build
    for run in runs:
        run.judge.close()


def visit(browser: Any, run: Run, width: int = 1280, scheme: str = "light") -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(run.judge.server.url)
    until(lambda: loaded(browser))


def loaded(browser: Any) -> bool:
    return browser.execute_script(
        "const found = [...document.querySelectorAll('#samples img')].filter(i => i.offsetWidth);"
        "return found.length > 0 && found.every(i => i.complete && i.naturalWidth > 0)"
    )


def until(true: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := true()):
        assert time.monotonic() < deadline, "the page never got there"
        time.sleep(0.02)
    return found


def press(browser: Any, *keys: str) -> None:
    webdriver.ActionChains(browser, duration=0).send_keys(*keys).perform()


def find(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def shown(browser: Any, selector: str) -> list[str]:
    return [e.text for e in browser.find_elements("css selector", selector) if e.is_displayed()]


def order(run: Run) -> list[int]:
    return run.judge.questions.state()["groups"][0]["order"]


def test_a_group_is_ranked_by_keyboard_alone(browser: Any, start: Any) -> None:
    run = start({"a red circle": 4})
    visit(browser, run)
    at = order(run)
    press(browser, "3", "1", "u", "4", "t", "1")
    assert shown(browser, ".place") == ["=2", "1", "=2"]
    press(browser, "2", webdriver.Keys.ENTER)  # the last place moves the focus to Done
    scores = run.result()
    by_place = {at[2]: 1.0, at[3]: 0.5, at[0]: 0.5, at[1]: 0.0}
    assert scores.values.tolist() == [by_place[i] for i in range(4)]
    until(lambda: find(browser, "#idle").is_displayed())


def test_a_group_is_ranked_by_clicks_and_a_second_click_takes_back(browser: Any, start: Any) -> None:
    run = start({"a red circle": 3})
    visit(browser, run)
    at, cards = order(run), browser.find_elements("css selector", ".choose")
    assert not find(browser, "#done").is_enabled()
    for i in (0, 1, 2, 0):
        cards[i].click()
    assert shown(browser, ".place") == ["1", "2"]
    find(browser, "#done").click()
    scores = run.result()
    assert {at[i]: float(scores.values[at[i]]) for i in (1, 2)} == {at[1]: 1.0, at[2]: 0.0}
    assert not scores.valid[at[0]]


@pytest.mark.parametrize("width", [1280, 390])
def test_thumbs_are_given_by_click(browser: Any, start: Any, width: int) -> None:
    run = start({"a red circle": 3}, mode="thumbs")
    visit(browser, run, width)
    at = order(run)
    browser.find_elements("css selector", ".good")[0].click()
    browser.find_elements("css selector", ".bad")[1].click()
    assert find(browser, ".good").get_attribute("aria-pressed") == "true"
    find(browser, "#done").click()
    scores = run.result()
    assert [scores.values[at[0]], scores.values[at[1]]] == [1.0, 0.0]
    assert not scores.valid[at[2]]


def test_thumbs_are_given_by_keyboard(browser: Any, start: Any) -> None:
    run = start({"a red circle": 3}, mode="thumbs")
    visit(browser, run)
    at, keys = order(run), webdriver.Keys
    press(browser, keys.ARROW_UP, keys.ARROW_DOWN, keys.ARROW_LEFT, "g", keys.ARROW_UP, keys.ENTER)
    assert [run.result().values[i] for i in at] == [1.0, 1.0, 1.0]


def test_skip_and_back_lead_through_the_groups_and_progress_is_told(browser: Any, start: Any) -> None:
    run = start({"first": 2, "second": 2})
    visit(browser, run)
    assert find(browser, "#count").text.lower() == "0 of 2 groups answered"
    press(browser, "s")
    until(lambda: find(browser, "#prompt").text == "second")
    assert find(browser, "#count").text.lower() == "1 of 2 groups answered"
    press(browser, "b")
    until(lambda: find(browser, "#prompt").text == "first")
    press(browser, "1", "2", "d")
    until(lambda: find(browser, "#prompt").text == "second")
    press(browser, "s")
    assert run.result().valid.tolist() == [True, True, False, False]


def test_a_large_group_comes_in_pages_that_share_one_ranking(browser: Any, start: Any) -> None:
    run = start({"many": 5}, per_page=3)
    visit(browser, run)
    at = order(run)
    assert shown(browser, ".key") == ["1", "2", "3"]
    press(browser, "2", webdriver.Keys.PAGE_DOWN)
    assert shown(browser, ".key") == ["1", "2"]
    assert find(browser, "#page").text == "2 of 2"
    press(browser, "1", "d")
    scores = run.result()
    assert [float(scores.values[at[1]]), float(scores.values[at[3]]), int(scores.valid.sum())] == [1.0, 0.0, 2]


@pytest.mark.parametrize("mode", ["rank", "thumbs"])
@pytest.mark.parametrize("width", [1280, 390, 320])
def test_nothing_reaches_beyond_the_window(browser: Any, start: Any, width: int, mode: str) -> None:
    run = start({"a very long prompt " * 20 + "x" * 200: 12}, mode=mode, side=64)
    visit(browser, run, width)
    # Against the given width: on a phone, window.innerWidth grows with whatever sticks out.
    reach = "return Math.max(document.documentElement.scrollWidth, window.innerWidth)"
    assert browser.execute_script(reach) <= width
    beyond = browser.execute_script(
        "return [...document.querySelectorAll('body *:not(svg *)')].filter(e => e.offsetWidth > 1 &&"
        " e.getBoundingClientRect().right > arguments[0] + 0.5).map(e => e.outerHTML.slice(0, 80))",
        width,
    )
    assert beyond == []
    small = browser.execute_script(
        "return [...document.querySelectorAll('#actions button, .thumbs button')].filter(b => b.offsetWidth &&"
        " (b.offsetHeight < 40 || b.offsetWidth < 40)).map(b => b.outerHTML.slice(0, 80))"
    )
    assert small == []
    broken = browser.execute_script(
        "return [...document.querySelectorAll('button')].filter(b => b.offsetWidth && b.offsetHeight > 50 &&"
        " !b.matches('.choose')).map(b => b.outerHTML.slice(0, 80))"
    )
    assert broken == []  # no word is broken into two lines
    if picture := os.environ.get("HUMAN_SCREENSHOTS"):
        browser.save_screenshot(f"{picture}/{mode}-{width}.png")


def test_twelve_pictures_are_seen_at_once_on_a_desktop(browser: Any, start: Any) -> None:
    run = start({"a red circle": 12}, side=64)
    visit(browser, run)
    lowest = (
        "return Math.max(...[...document.querySelectorAll('#samples li')].map(e => e.getBoundingClientRect().bottom))"
    )
    assert browser.execute_script(lowest) <= find(browser, "#actions").rect["y"]


def test_clips_move_and_enlarge(browser: Any, start: Any) -> None:
    run = start({"a sunset": 2}, frames=4)
    visit(browser, run)
    source = find(browser, "#samples img").get_attribute("src")
    kind = "const done = arguments[1]; fetch(arguments[0]).then(r => done(r.headers.get('content-type')))"
    assert browser.execute_async_script(kind, source) == "image/webp"
    press(browser, "z")
    assert find(browser, "dialog img").get_attribute("src") == source
    assert find(browser, "dialog img").size["width"] > 300
    press(browser, webdriver.Keys.ESCAPE)
    assert not find(browser, "dialog").is_displayed()


def test_a_hostile_prompt_is_shown_and_nothing_more(browser: Any, start: Any) -> None:
    run = start({HOSTILE: 2})
    browser.get("about:blank")
    browser.get_log("browser")
    visit(browser, run)
    assert find(browser, "#prompt").text == HOSTILE
    assert browser.title != "hacked"
    assert browser.find_elements("css selector", "h1 img, h1 script") == []
    assert browser.get_log("browser") == []


def test_every_control_has_a_name_and_the_focus_is_seen(browser: Any, start: Any) -> None:
    run = start({"a red circle": 2}, mode="thumbs")
    visit(browser, run)
    names = [e.accessible_name for e in browser.find_elements("css selector", "button") if e.is_displayed()]
    assert all(names)
    assert "Sample 1: good" in names
    press(browser, webdriver.Keys.TAB, webdriver.Keys.TAB)
    ring = "return getComputedStyle(document.activeElement).outlineStyle + document.activeElement.className"
    assert browser.execute_script(ring).startswith("solid")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser: Any, start: Any, scheme: str) -> None:
    run = start({"a red circle": 3})
    visit(browser, run, scheme=scheme)
    press(browser, "1", "2", "3")
    selectors = ["#count", "#prompt", "#task", "#undo", "#done", "#keys", ".place"]
    assert faint_texts(browser, selectors) == {}
    if picture := os.environ.get("HUMAN_SCREENSHOTS"):
        browser.save_screenshot(f"{picture}/{scheme}.png")


def test_a_run_that_ends_is_told(browser: Any, start: Any) -> None:
    run = start({"a red circle": 2})
    visit(browser, run)
    run.judge.close()
    press(browser, "1", "2", "d")
    assert "cannot be reached" in until(lambda: find(browser, "#trouble").text)
