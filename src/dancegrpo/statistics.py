"""What held-out scores say: pass rates with Wilson intervals, and gains with paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dancegrpo.errors import PromptError

CHUNK_ELEMENTS = 2_000_000
"""Resampled rows held in memory at once (16 MB of indices)."""


@dataclass(frozen=True)
class Rate:
    """A pass rate in [0, 1] and its interval."""

    passed: int
    total: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedGain:
    """Means of n paired rows, their difference `gain = after - before`, and the interval of that difference."""

    before: float
    after: float
    gain: float
    low: float
    high: float
    n: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Summary:
    """One evaluation, counted over the valid rows of each column.

    means: mean by column, None where no row is valid. passes: by "<judge>/pass" column. tasks: the same by task.
    invalid: rows left out, by column.
    """

    iteration: int
    means: dict[str, float | None]
    passes: dict[str, Rate] = field(default_factory=dict)
    tasks: dict[str, dict[str, Rate]] = field(default_factory=dict)
    invalid: dict[str, int] = field(default_factory=dict)

    @property
    def pass_column(self) -> str | None:
        """The column that stands for the run: the first one that holds pass verdicts."""
        return next(iter(self.passes), None)

    def task_mean(self, column: str) -> float | None:
        """Mean of the tasks' pass rates, each task alike however many rows it has; None without tasks.

        column: one with verdicts, "<judge>/pass". GenEval's score (arXiv:2310.11513) is that of its six tasks.
        """
        rates = [rate.rate for rate in self.tasks.get(column, {}).values()]
        return sum(rates) / len(rates) if rates else None


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of the same prompts, row by row.

    overall: gain by column. tasks: gain by column and task. left_out: rows invalid in either, by column.
    """

    overall: dict[str, PairedGain]
    tasks: dict[str, dict[str, PairedGain]]
    left_out: dict[str, int]


def wilson_interval(passed: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a binomial rate (E. B. Wilson, JASA 22, 1927), without continuity correction.

    passed, total: counts with 0 <= passed <= total, total >= 1. Returns (low, high) in [0, 1]. ValueError otherwise.
    """
    if total < 1 or not 0 <= passed <= total:
        raise ValueError(f"passed={passed} of total={total} is no rate: need 0 <= passed <= total and total >= 1.")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    rate = passed / total
    center = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * np.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    # Rounding may leave the closed ends by an ulp.
    low = 0.0 if passed == 0 else max(0.0, center - half)
    high = 1.0 if passed == total else min(1.0, center + half)
    return float(low), float(high)


def pass_rate(passed: int, total: int, level: float = 0.95) -> Rate:
    """The rate of `passed` in `total` (at least 1) with its Wilson interval."""
    return Rate(passed, total, passed / total, *wilson_interval(passed, total, level))


def paired_bootstrap(
    before: Sequence[float] | NDArray[np.float64],
    after: Sequence[float] | NDArray[np.float64],
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedGain:
    """Percentile bootstrap of mean(after) - mean(before), rows resampled in pairs (Efron & Tibshirani, 1993, ch. 13).

    before, after: (n,) finite values of the same n >= 1 rows. The answer depends on the seed alone.
    ValueError on unequal lengths or no rows.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or first.size == 0:
        raise ValueError(f"before {first.shape} and after {second.shape} must be the same non-empty rows.")
    # The mean of resampled pairs' differences is the difference of the resampled means: one array is enough.
    difference, n = second - first, first.size
    generator, gains = np.random.default_rng(seed), np.empty(resamples)
    rows = max(1, CHUNK_ELEMENTS // n)
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        gains[start:stop] = difference[generator.integers(0, n, size=(stop - start, n))].mean(axis=1)
    low, high = np.quantile(gains, [(1 - level) / 2, (1 + level) / 2])
    return PairedGain(
        float(first.mean()), float(second.mean()), float(difference.mean()), float(low), float(high), int(n)
    )


def main_column(means: Mapping[str, float | None], trained: Collection[str]) -> str | None:
    """The column that stands for a run: a trained judge's pass verdict, else any verdict, else a trained score.

    means: by column, None where no row is valid. trained: names of the judges of weight above 0.
    """
    present = [name for name, mean in means.items() if mean is not None]
    passes = [name for name in present if is_pass_column(name)]
    preferred = [name for name in passes if name.removesuffix("/pass") in trained]
    scores = [name for name in present if name in trained]
    return next(iter(preferred + passes + scores + present), None)


def summarize(evaluation: Mapping[str, Any], level: float = 0.95) -> Summary:
    """Means of every column, and pass rates overall and by task, of one evaluation (a run's `evaluations/N.json`)."""
    means: dict[str, float | None] = {}
    passes: dict[str, Rate] = {}
    tasks: dict[str, dict[str, Rate]] = {}
    invalid: dict[str, int] = {}
    for column in evaluation["columns"]:
        values, valid = column_values(evaluation, column)
        means[column] = float(values[valid].mean()) if valid.any() else None
        invalid[column] = int((~valid).sum())
        if is_pass_column(column) and valid.any():
            passes[column] = _rate_of(values[valid], level)
            tasks[column] = {
                task: _rate_of(values[rows & valid], level)
                for task, rows in task_rows(evaluation).items()
                if (rows & valid).any()
            }
    return Summary(int(evaluation["iteration"]), means, passes, tasks, invalid)


def compare(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Comparison:
    """Gain of each column both evaluations have, overall and by task; rows invalid in either are left out.

    Raises PromptError where the two did not ask the same prompts in the same order.
    """
    _check_same_prompts(before, after)
    rows_by_task = task_rows(after)
    overall: dict[str, PairedGain] = {}
    tasks: dict[str, dict[str, PairedGain]] = {}
    left_out: dict[str, int] = {}
    for column in (name for name in after["columns"] if name in before["columns"]):
        old, old_valid = column_values(before, column)
        new, new_valid = column_values(after, column)
        both = old_valid & new_valid
        left_out[column] = int((~both).sum())
        if not both.any():
            continue

        def gain(rows: NDArray[np.bool_], old: NDArray[np.float64] = old, new: NDArray[np.float64] = new) -> PairedGain:
            return paired_bootstrap(old[rows], new[rows], resamples=resamples, seed=seed, level=level)

        overall[column] = gain(both)
        tasks[column] = {task: gain(rows & both) for task, rows in rows_by_task.items() if (rows & both).any()}
    return Comparison(overall, tasks, left_out)


def is_pass_column(column: str) -> bool:
    """Whether a column holds 0/1 verdicts."""
    return column.endswith("/pass")


def column_values(evaluation: Mapping[str, Any], column: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """A column's values (n,) and which of them count (n,): its judge called them valid, and they are finite."""
    values = np.array([np.nan if value is None else value for value in evaluation["columns"][column]], dtype=np.float64)
    valid = np.isfinite(values)
    judge = _judge_of(column, evaluation.get("valid", {}))
    if judge is not None:
        valid &= np.asarray(evaluation["valid"][judge], dtype=bool)
    return values, valid


def task_rows(evaluation: Mapping[str, Any]) -> dict[str, NDArray[np.bool_]]:
    """Which rows belong to each task, by name; prompts without a task belong to none."""
    named = [None if task is None else str(task) for task in evaluation.get("tasks") or []]
    return {task: np.array([t == task for t in named]) for task in sorted({t for t in named if t is not None})}


def _judge_of(column: str, judges: Mapping[str, Any]) -> str | None:
    owners = [judge for judge in judges if column == judge or column.startswith(judge + "/")]
    return max(owners, key=len, default=None)


def _rate_of(verdicts: NDArray[np.float64], level: float) -> Rate:
    return pass_rate(int((verdicts > 0.5).sum()), verdicts.size, level)


def _check_same_prompts(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    for field_name in ("prompt_ids", "texts"):
        old, new = list(before[field_name]), list(after[field_name])
        if len(old) != len(new):
            raise PromptError(
                f"the evaluations asked {len(old)} and {len(new)} prompts: "
                "compare evaluations of the same held-out prompts."
            )
        for row, (first, second) in enumerate(zip(old, new, strict=True)):
            if first != second:
                raise PromptError(
                    f"row {row} asked {first!r} before and {second!r} after: "
                    "compare evaluations of the same held-out prompts, in the same order."
                )
