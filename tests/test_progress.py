"""The display says what happened, how it goes and how long it still takes."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dancegrpo.progress import Progress, arrow, duration, sparkline
from dancegrpo.statistics import Summary, pass_rate


class Clock:
    """A clock that only moves when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def metrics(iteration: int, seconds: float = 2.0) -> dict[str, float | None]:
    return {
        "reward/shapes/mean": 0.4 + 0.01 * iteration,
        "reward/hps/mean": None,
        "train/clip_fraction": 0.125,
        "train/grad_norm": 0.0321,
        "groups/zero_spread": 3,
        "groups/total": 8,
        "train/skipped_updates": 0,
        "seconds/total": seconds,
    }


def plain(total: int, clock: Clock) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(total, description="demo", console=Console(file=out, width=200), clock=clock), out


def test_plain_lines_come_at_most_every_five_seconds_and_at_both_ends() -> None:
    clock = Clock()
    progress, out = plain(10, clock)
    with progress:
        for iteration in range(10):
            clock.now += 2.0
            progress.iteration(metrics(iteration))
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "4/10", "7/10", "10/10"]
    assert "\x1b" not in out.getvalue()


def test_a_plain_line_carries_the_numbers_that_matter() -> None:
    clock = Clock()
    progress, out = plain(5, clock)
    with progress:
        progress.iteration(metrics(0))
    line = out.getvalue()
    for part in ("iteration 1/5", "reward shapes 0.4 ", "clip 12%", "grad norm 0.0321", "groups without signal 3/8"):
        assert part in line
    assert "hps" not in line
    assert line.rstrip().endswith("8 s left")


def test_time_left_is_the_median_so_one_slow_iteration_does_not_move_it() -> None:
    progress, _ = plain(10, Clock())
    for seconds in (2.0, 2.0, 60.0, 2.0):
        progress.iteration(metrics(0, seconds))
    assert progress.seconds_left == pytest.approx(12.0)


def test_time_left_falls_back_on_the_clock_and_leaves_out_evaluations() -> None:
    clock = Clock()
    progress, _ = plain(3, clock)
    clock.now = 3.0
    progress.iteration({})
    clock.now = 100.0
    progress.evaluation(Summary(1, {"shapes": 0.5}))
    clock.now = 103.0
    progress.iteration({})
    assert progress.seconds_left == pytest.approx(3.0)


def test_a_resumed_run_goes_on_counting() -> None:
    progress = Progress(10, start=8, console=Console(file=io.StringIO()), clock=Clock())
    progress.iteration(metrics(8))
    assert progress.done == 9
    assert progress.seconds_left == pytest.approx(2.0)


def test_evaluations_are_told_against_the_first() -> None:
    progress, out = plain(10, Clock())
    for iteration, passed in ((0, 41), (10, 58)):
        progress.evaluation(Summary(iteration, {"shapes": 0.5}, {"shapes/pass": pass_rate(passed, 100)}))
    assert out.getvalue().splitlines()[-1] == "evaluation after 10 iterations: pass rate 58.0% (from 41.0%)"


def test_a_terminal_gets_one_live_block() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, height=40)
    with Progress(40, description="demo", console=console, clock=Clock()) as progress:
        progress.evaluation(Summary(0, {}, {"shapes/pass": pass_rate(41, 100)}))
        for iteration in range(40):
            progress.iteration(metrics(iteration))
        progress.message("saved [checkpoints/000040]")
    shown = Console(file=io.StringIO(), width=120)
    shown.print(progress._block())
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "40/40" in text
    assert "0.79 ↑  ▁" in text
    assert "held-out pass rate 41.0%" in " ".join(text.split())
    assert "saved [checkpoints/000040]" in out.getvalue()


@pytest.mark.parametrize(
    ("values", "sign"),
    [([1.0], "→"), ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "↑"), ([3.0] * 10, "→"), ([6.0, 5.0, 4.0, 3.0, 2.0, 1.0], "↓")],
)
def test_the_arrow_follows_the_trend(values: list[float], sign: str) -> None:
    assert arrow(values) == sign


def test_the_sparkline_spans_lowest_to_highest() -> None:
    assert sparkline([0.0, 1.0, 2.0, 7.0], width=4) == "▁▂▃█"
    assert sparkline([5.0, 5.0]) == "▁▁"
    assert len(sparkline(list(range(1000)), width=24)) == 24
    assert sparkline([]) == ""


@pytest.mark.parametrize(("seconds", "text"), [(3.2, "3 s"), (725, "12:05"), (11220, "3:07:00")])
def test_durations_read_like_clocks(seconds: float, text: str) -> None:
    assert duration(seconds) == text
