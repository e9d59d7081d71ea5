"""Intervals and gains against scipy, and the rules for rows that do not count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from dancegrpo.errors import PromptError
from dancegrpo.statistics import compare, paired_bootstrap, pass_rate, summarize, wilson_interval


def evaluation(verdicts: list[Any], valid: list[bool] | None = None, **changes: Any) -> dict[str, Any]:
    n = len(verdicts)
    return {
        "iteration": 0,
        "prompt_ids": list(range(n)),
        "texts": [f"prompt {i}" for i in range(n)],
        "tasks": ["colours" if i % 2 else "counting" for i in range(n)],
        "columns": {"shapes/pass": verdicts, "shapes": [0.5 * (v or 0) + 0.25 for v in verdicts]},
        "valid": {"shapes": valid or [True] * n},
        **changes,
    }


@pytest.mark.parametrize(("passed", "total"), [(0, 7), (7, 7), (1, 3), (412, 1024), (1, 100_000)])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.999])
def test_wilson_interval_equals_scipy(passed: int, total: int, level: float) -> None:
    expected = stats.binomtest(passed, total).proportion_ci(confidence_level=level, method="wilson")
    assert wilson_interval(passed, total, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("passed", "total"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_interval_refuses_impossible_counts(passed: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"passed={passed} of total={total}"):
        wilson_interval(passed, total)


def test_paired_bootstrap_equals_scipys_within_resampling_error() -> None:
    generator = np.random.default_rng(3)
    before = generator.normal(size=80)
    after = before + 0.3 + 0.5 * generator.normal(size=80)
    ours = paired_bootstrap(before, after, resamples=40_000)
    theirs = stats.bootstrap(
        (before, after),
        lambda x, y, axis: (y - x).mean(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=40_000,
        method="percentile",
        rng=np.random.default_rng(11),
        batch=2_000,
    ).confidence_interval
    # The quantile's own error at 40,000 resamples is about 2 % of a standard error of the gain (0.056 here).
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.003)
    assert ours.gain == pytest.approx(after.mean() - before.mean(), abs=1e-12)


def test_paired_bootstrap_covers_the_true_gain_as_often_as_it_says() -> None:
    generator = np.random.default_rng(5)
    covered = 0
    for seed in range(400):
        before = generator.normal(size=120)
        gain = paired_bootstrap(before, before + 0.2 + generator.normal(size=120), resamples=500, seed=seed)
        covered += gain.low <= 0.2 <= gain.high
    low, high = stats.binomtest(covered, 400).proportion_ci(confidence_level=0.999)
    assert low <= 0.95 <= high


def test_pairing_narrows_the_interval_of_correlated_rows() -> None:
    generator = np.random.default_rng(0)
    before = generator.normal(size=200)
    after = before + 0.1 + 0.05 * generator.normal(size=200)
    paired = paired_bootstrap(before, after, resamples=2_000)
    shuffled = paired_bootstrap(before, generator.permutation(after), resamples=2_000)
    assert (paired.high - paired.low) * 10 < shuffled.high - shuffled.low


def test_paired_bootstrap_is_a_function_of_its_seed() -> None:
    rows = np.arange(30) % 2, np.arange(30) % 3 > 0
    assert paired_bootstrap(*rows, resamples=100, seed=4) == paired_bootstrap(*rows, resamples=100, seed=4)
    assert paired_bootstrap(*rows, resamples=100, seed=4) != paired_bootstrap(*rows, resamples=100, seed=5)


def test_chunks_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.arange(50) % 2, np.arange(50) % 3 > 0
    whole = paired_bootstrap(*rows, resamples=300)
    monkeypatch.setattr("dancegrpo.statistics.CHUNK_ELEMENTS", 7 * 50)
    assert paired_bootstrap(*rows, resamples=300) == whole


def test_unpaired_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="same non-empty rows"):
        paired_bootstrap([1.0], [1.0, 2.0])


def test_summary_counts_passes_by_task() -> None:
    summary = summarize(evaluation([1, 0, 1, 1, 0, 1, 1]))
    assert summary.passes["shapes/pass"] == pass_rate(5, 7)
    assert summary.tasks["shapes/pass"] == {"colours": pass_rate(2, 3), "counting": pass_rate(3, 4)}
    assert summary.means["shapes"] == pytest.approx(0.25 + 0.5 * 5 / 7)
    assert summary.pass_column == "shapes/pass"


def test_the_task_mean_weighs_tasks_alike_however_many_rows_they_have() -> None:
    summary = summarize(evaluation([1, 0, 1, 1, 0, 1, 1]))
    assert summary.task_mean("shapes/pass") == pytest.approx((2 / 3 + 3 / 4) / 2)


def test_columns_without_verdicts_have_no_task_mean() -> None:
    assert summarize(evaluation([1, 0])).task_mean("shapes") is None


def test_invalid_rows_leave_the_summary_whatever_they_hold() -> None:
    summary = summarize(evaluation([1, 1, None, float("nan"), 0], [True, False, True, True, True]))
    assert summary.passes["shapes/pass"] == pass_rate(1, 2)
    assert summary.invalid["shapes/pass"] == 3


def test_a_judge_without_a_valid_row_has_no_mean() -> None:
    summary = summarize(evaluation([1, 0], [False, False]))
    assert summary.means["shapes/pass"] is None
    assert summary.pass_column is None


def test_comparison_leaves_out_rows_invalid_in_either_evaluation() -> None:
    before = evaluation([0, 0, 1, 1], [False, True, True, True])
    after = evaluation([1, 1, 1, 0], [True, True, True, False])
    result = compare(before, after, resamples=50)
    assert result.left_out == {"shapes/pass": 2, "shapes": 2}
    gain = result.overall["shapes/pass"]
    assert (gain.before, gain.after, gain.gain, gain.n) == (0.5, 1.0, 0.5, 2)
    assert {task: g.gain for task, g in result.tasks["shapes/pass"].items()} == {"colours": 1.0, "counting": 0.0}


def test_comparison_of_other_prompts_is_refused() -> None:
    other = evaluation([0, 1], texts=["prompt 0", "a red circle"])
    with pytest.raises(PromptError, match="row 1 asked 'prompt 1' before and 'a red circle' after"):
        compare(evaluation([0, 1]), other)


def test_comparison_of_fewer_prompts_is_refused() -> None:
    with pytest.raises(PromptError, match="asked 2 and 3 prompts"):
        compare(evaluation([0, 1]), evaluation([0, 1, 1]))
