"""The monitor: each fault raises its own alarm, sound runs raise none, and the same stream always gives the same."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from dancegrpo.health import Alarm, Monitor, alarms_of

SETTINGS = {
    "rewards": {"hps": {"judge": "hps"}, "shapes": {"judge": "shapes", "weight": 0.0}},
    "algorithm": {"clip_range": 1e-4},
    "health": {"spike": 8.0},
}
Row = dict[str, Any]
Change = Callable[[int, Row], Row]


def sound(iterations: int, seed: int = 0, rise: float = 0.2) -> list[Row]:
    """A run as sound ones are: 8 groups of 16, a reward that rises, everything as noisy as it was measured."""
    draw = random.Random(seed)
    rows = []
    for i in range(iterations):
        learnt = 1 - math.exp(-i / 40)
        saturation = 0.11 + 0.06 * learnt + draw.gauss(0, 0.01)
        rows.append(
            {
                "iteration": i,
                "reward/hps/mean": 0.35 + rise * learnt + draw.gauss(0, 0.27 / 8**0.5),
                "reward/hps/std": 0.27,
                "reward/hps/group_std": 0.14,
                "reward/shapes/mean": 0.4 + draw.gauss(0, 0.45 / 8**0.5),
                "reward/shapes/std": 0.49,
                "image/saturation": saturation,
                "image/saturation/std": 0.035,
                "image/saturation/reward": draw.gauss(0.3, 0.1),
                "image/grid": 0.001,
                "image/grid/std": 0.003,
                "image/diversity": 0.2 * math.exp(draw.gauss(0, 0.3)),
                "image/blank": 0.0,
                "groups/total": 8,
                "groups/zero_spread": 0,
                "samples/total": 128,
                "train/grad_norm": 0.02 * math.exp(draw.gauss(0, 0.15)),
                "train/loss": draw.gauss(0, 1e-8),
                "train/ratio_max_deviation": 0.0,
                "train/replay_difference": 0.0,
                "train/log_prob_rounding": 2e-7,
                "train/skipped_updates": 0,
                "train/weight_change": 0.001 * (i + 1) ** 0.5,
                "seconds/total": draw.random(),
            }
        )
    return rows


def names(rows: Iterable[Row], settings: dict[str, Any] = SETTINGS) -> list[str]:
    return [alarm.name for alarm in alarms_of(settings, rows)]


def after(start: int, **values: Any) -> Change:
    """From iteration `start` on the metrics have these values; a function is given the row."""

    def change(i: int, row: Row) -> Row:
        told = {key.replace("__", "/"): v(row) if callable(v) else v for key, v in values.items()}
        return {**row, **told} if i >= start else row

    return change


def faulty(change: Change, iterations: int = 30, seed: int = 0) -> list[Row]:
    return [change(i, row) for i, row in enumerate(sound(iterations, seed))]


@pytest.mark.parametrize("seed", range(10))
def test_a_sound_run_raises_nothing(seed):
    assert names(sound(200, seed)) == []


FAULTS = {
    "reward gone": (after(15, reward__hps__mean=0.0), "collapse"),
    "samples alike": (after(1, image__diversity=1e-3), "collapse"),
    "black pictures": (after(5, image__blank=1.0), "collapse"),
    "constant judge": (after(0, reward__hps__group_std=0.0, groups__zero_spread=8), "no-signal"),
    "only rounding differs": (after(0, reward__hps__group_std=1e-8), "no-signal"),
    "no gradient": (after(3, train__grad_norm=0.0), "no-signal"),
    "replay": (after(4, train__replay_difference=3e-5), "clip-range"),
    "noise": (after(0, train__log_prob_rounding=2e-5), "clip-range"),
    "held-out judge falls": (
        after(8, reward__hps__mean=0.8, reward__shapes__mean=0.02, reward__shapes__std=0.14),
        "hacking",
    ),
    "passes fall": (after(8, reward__hps__mean=0.8, reward__hps__pass=0.05), "hacking"),
    "lattice": (after(8, reward__hps__mean=0.8, image__grid=0.6, image__grid__std=0.1), "hacking"),
    "garish": (after(8, reward__hps__mean=0.8, image__saturation=0.4), "hacking"),
    "paid for it": (
        after(0, image__saturation__reward=0.97, reward__hps__mean=lambda r: 0.3 + 0.02 * r["iteration"]),
        "hacking",
    ),
    "gradient": (lambda i, row: {**row, "train/grad_norm": 0.3} if i == 20 else row, "spike"),
    "loss": (lambda i, row: {**row, "train/loss": -40.0} if i == 20 else row, "spike"),
    "not finite": (
        lambda i, row: {**row, "train/grad_norm": None, "train/skipped_updates": 1} if i == 9 else row,
        "spike",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_fault_raises_its_own_alarm_once_within_thirty_iterations(fault, seed):
    change, expected = FAULTS[fault]
    rows = faulty(change, seed=seed)
    if fault == "passes fall":
        rows = [{"reward/hps/pass": 0.5, **row} for row in rows]
    assert names(rows) == [expected]


def test_a_ratio_far_above_its_usual_deviation_is_a_spike():
    def change(i: int, row: Row) -> Row:
        return {**row, "train/ratio_max_deviation": 0.01 if i == 20 else 2e-4}

    assert names(faulty(change)) == ["spike"]
    assert names(faulty(after(0, train__ratio_max_deviation=2e-4))) == []


def test_a_reward_that_never_moves_is_flat_but_not_before_it_was_watched_long():
    rows = sound(120, rise=0.0)
    assert names(rows) == ["flat"]
    assert alarms_of(SETTINGS, rows)[0].iteration >= 89
    assert names(rows[:80]) == []


def test_flat_is_not_said_of_weights_that_stand_still_or_too_few_samples():
    still = [{**row, "train/weight_change": 0.0} for row in sound(120, rise=0.0)]
    few = [{**row, "groups/total": 1} for row in sound(120, rise=0.0)]
    assert names(still) == []
    assert names(few) == []


def test_a_reward_that_rose_and_then_stays_is_not_flat():
    rows = sound(400, rise=0.25)
    assert names(rows) == []


def test_a_judge_of_negative_weight_collapses_upwards():
    settings = {**SETTINGS, "rewards": {"hps": {"judge": "hps", "weight": -1.0}}}
    down = [{**row, "reward/hps/mean": 0.7 - row["reward/hps/mean"]} for row in sound(30)]
    up = [{**row, "reward/hps/mean": 1.0} if row["iteration"] >= 15 else row for row in down]
    assert names(down, settings) == []
    assert names(up, settings) == ["collapse"]


def test_an_alarm_is_raised_again_only_after_it_was_over():
    def rows(pause: int) -> list[Row]:
        spikes = {20, 21 + pause}
        return faulty(lambda i, row: {**row, "train/grad_norm": 0.3} if i in spikes else row, 50)

    assert names(rows(pause=5)) == ["spike"]
    assert names(rows(pause=6)) == ["spike", "spike"]


def test_what_stands_is_told_until_it_is_over():
    monitor, standing = Monitor(SETTINGS), []
    for row in faulty(lambda i, row: {**row, "train/grad_norm": 0.3} if i == 20 else row, 40):
        monitor.see(row)
        standing.append(monitor.standing)
    assert [i for i, now in enumerate(standing) if now] == list(range(20, 26))


def test_a_collapse_that_comes_again_after_a_rollback_is_told_again():
    def change(i: int, row: Row) -> Row:
        gone = {"image/diversity": 1e-3} if 10 <= i < 17 or i >= 18 else {}
        return {**row, **gone, "health/rollbacks": int(i >= 17)}

    alarms = alarms_of(SETTINGS, faulty(change, 32))
    assert [alarm.name for alarm in alarms] == ["collapse", "collapse"]
    assert alarms[1].iteration >= 17


def test_a_run_that_goes_on_says_what_the_unbroken_one_says():
    change = FAULTS["reward gone"][0]
    rows = faulty(change, 40)
    whole, said = Monitor(SETTINGS), []
    for row in rows:
        said.append(whole.see(row))
    for cut in (1, 14, 18, 25):
        resumed = Monitor(SETTINGS)
        for row in rows[:cut]:
            resumed.see(row)
        assert [resumed.see(row) for row in rows[cut:]] == said[cut:]
        assert resumed.standing == whole.standing


def test_seconds_and_memory_play_no_part():
    rows = faulty(FAULTS["gradient"][0])
    slow = [{**row, "seconds/total": 1e6 - row["iteration"], "memory/peak_mb": 1e9} for row in rows]
    assert alarms_of(SETTINGS, rows) == alarms_of(SETTINGS, slow)


def test_numbers_that_are_not_finite_count_as_missing():
    rows = [{**row, "image/grid": math.nan, "reward/hps/group_std": math.inf} for row in sound(40)]
    assert names(rows) == []


@pytest.mark.parametrize("keep", ["iteration", "train/", "reward/", "image/"])
def test_metrics_that_an_algorithm_lacks_raise_nothing(keep):
    assert names([{k: v for k, v in row.items() if k.startswith((keep, "iteration"))} for row in sound(40)]) == []


def test_an_alarm_is_one_line_with_its_numbers_its_cause_and_what_to_do():
    (alarm,) = alarms_of(SETTINGS, faulty(FAULTS["gradient"][0]))
    assert isinstance(alarm, Alarm)
    assert alarm.sentence.startswith("spike at iteration 20: The gradient norm was 0.3, ")
    assert "Likely cause: " in alarm.sentence
    assert "optimizer.max_grad_norm" in alarm.sentence
    assert "\n" not in alarm.sentence
