"""The numbers of a study: means and standard deviations over seeds, verdicts on claims, curves with bands."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeGuard

import numpy as np

from dancegrpo.report.curves import MISSING, Chart, Series, Values, show
from dancegrpo.statistics import is_pass_column
from dancegrpo.studies.decisions import RESIDUE, Sign, as_good_sign, deviation, order_sign, t_interval
from dancegrpo.studies.plan import Plan
from dancegrpo.studies.results import Result, read_results
from dancegrpo.studies.study import Claim, Study

CURVE_POINTS = 40
"""Points of a drawn curve: each is the mean of its share of the iterations."""


@dataclass(frozen=True)
class Cell:
    """Mean and standard deviation (None with one seed) over n seeds.

    best: whether no other arm has a higher mean and some arm a lower one. error: the mean's standard error over the
    held-out prompts, None where it is not known.
    """

    mean: float
    std: float | None
    n: int
    best: bool = False
    error: float | None = None


@dataclass(frozen=True)
class Verdict:
    """A claim asked of one condition. differences: first arm minus second, one for each seed that has both."""

    claim: Claim
    condition: str | None
    sign: Sign
    differences: tuple[float, ...]
    detail: str


@dataclass(frozen=True)
class Ranked:
    """An arm by the main column. gain: its mean difference to the base, seed by seed; None for the base itself."""

    arm: str
    cell: Cell
    gain: float | None


@dataclass(frozen=True)
class Tried:
    """One candidate of tuning. edge: whether it was chosen and a value of it is the least or the largest tried."""

    arm: str
    candidate: str
    score: float | None
    chosen: bool
    error: str | None
    edge: bool = False


class Evidence:
    """A study with those of its results that were made with its present settings.

    stale: files of results that were made with others. errors: runs that failed. seeds: those any arm has.
    """

    def __init__(self, study: Study, results: Path) -> None:
        self.study, self.results = study, results
        self.plan = Plan(study)
        found = read_results(results, study)
        tuning = {file: result for file, result in found.items() if result.candidate is not None}
        self.tuning = self._tuning(tuning)
        chosen = {arm: dict(tried[1]) for arm in study.trained if (tried := self._choice(arm)) is not None}
        self.stale: list[str] = []
        self.errors: list[Result] = []
        self._runs: dict[tuple[str, str | None, int], Result] = {}
        for file, result in found.items():
            if result.candidate is not None:
                continue
            tuned = chosen.get(result.arm, {})
            if self.plan.job(result.arm, result.condition, result.seed, tuned).key != result.key:
                self.stale.append(file)
            elif result.error:
                self.errors.append(result)
            else:
                self._runs[result.arm, result.condition, result.seed] = result

    def _tuning(self, found: Mapping[str, Result]) -> dict[str, list[tuple[dict[str, object], Result]]]:
        """Each tuned arm's candidates with their results, as far as they are there."""
        table = {}
        for arm in self.study.trained:
            tried = [(job, found.get(job.file)) for job in self.plan.candidates(arm)]
            table[arm] = [
                (dict(job.candidate or {}), result) for job, result in tried if result and result.key == job.key
            ]
        return table

    def _choice(self, arm: str) -> tuple[float, dict[str, object]] | None:
        scores = [(result.column(self.study.main), candidate) for candidate, result in self.tuning[arm]]
        known = [(score, candidate) for score, candidate in scores if score is not None and math.isfinite(score)]
        return max(known, key=lambda pair: pair[0]) if known else None

    @property
    def seeds(self) -> list[int]:
        """The seeds that any arm has."""
        return sorted({seed for _, _, seed in self._runs})

    @property
    def runs(self) -> list[Result]:
        """All runs that count, tuning left out."""
        return list(self._runs.values())

    def of(self, arm: str, condition: str | None) -> dict[int, Result]:
        """An arm's runs in a condition, by seed; a base arm's are those it is the start of."""
        name = self.study.trained[0] if self.study.arms[arm].base else arm
        seeds = sorted(seed for run, place, seed in self._runs if (run, place) == (name, condition))
        return {seed: self._runs[name, condition, seed] for seed in seeds}

    def values(self, arm: str, condition: str | None, column: str) -> dict[int, float]:
        """A held-out column by seed: of the last evaluation, of the first for a base arm."""
        start = self.study.arms[arm].base
        pairs = {seed: run.column(column, start=start) for seed, run in self.of(arm, condition).items()}
        return {seed: value for seed, value in pairs.items() if value is not None}

    def table(self, condition: str | None) -> dict[str, dict[str, Cell | None]]:
        """Arm -> column -> cell; None where no seed has it."""
        rows: dict[str, dict[str, Cell | None]] = {arm: {} for arm in self.study.arms}
        for column in self.study.columns:
            cells = {arm: cell_of(list(self.values(arm, condition, column).values())) for arm in rows}
            means = [cell.mean for cell in cells.values() if cell]
            low, best = min(means, default=0.0), max(means, default=0.0)
            ranks = column not in self.study.neutral and best - low > RESIDUE * abs(best)
            for arm, cell in cells.items():
                error = self._prompt_error(arm, condition, column)
                first = ranks and cell is not None and cell.mean == best
                rows[arm][column] = replace(cell, best=first, error=error) if cell else None
        return rows

    def _prompt_error(self, arm: str, condition: str | None, column: str) -> float | None:
        """The standard error over prompts of one seed's mean, averaged over the seeds."""
        start = self.study.arms[arm].base
        told = [run.estimate(column, start=start) for run in self.of(arm, condition).values()]
        return _mean([one.error if one else None for one in told])

    def ranking(self, condition: str | None) -> list[Ranked]:
        """The arms by the mean of the main column, highest first; those without a value are left out."""
        main, base = self.study.main, self.study.base
        start = self.values(base, condition, main) if base else {}
        rows = []
        for arm in self.study.arms:
            values = self.values(arm, condition, main)
            gains = [values[seed] - start[seed] for seed in values if seed in start and arm != base]
            if (cell := cell_of(list(values.values()))) is not None:
                rows.append(Ranked(arm, cell, _mean(gains)))
        return sorted(rows, key=lambda row: -row.cell.mean)

    @property
    def unmeasured(self) -> list[Result]:
        """Runs without a held-out score in the main column at their end: they are missing from every mean."""
        return [run for run in self.runs if run.column(self.study.main) is None]

    @property
    def commits(self) -> list[str]:
        """Of the code that the runs were made with, tuning included; `no commit known` where one has none."""
        tried = [result for candidates in self.tuning.values() for _, result in candidates]
        told = [(run.commit or "no commit known").split(", ") for run in (*self.runs, *tried)]
        return sorted({commit for commits in told for commit in commits})

    def tried(self) -> list[Tried]:
        """The table of tuning."""
        rows = []
        for arm, candidates in self.tuning.items():
            choice = self._choice(arm)
            for candidate, result in candidates:
                text = ", ".join(f"{key} = {value}" for key, value in candidate.items())
                score = result.column(self.study.main)
                chosen = choice is not None and candidate == choice[1]
                rows.append(Tried(arm, text, score, chosen, result.error, chosen and self._on_edge(arm, candidate)))
        return rows

    def _on_edge(self, arm: str, candidate: Mapping[str, object]) -> bool:
        """Whether a value of the candidate is the least or largest of those in its grid: better ones may lie beyond."""
        tune = self.study.arms[arm].tune
        grids = {key: [float(v) for v in tried if _is_number(v)] for key, tried in tune.items()}
        return any(len(grid) > 1 and candidate[key] in (min(grid), max(grid)) for key, grid in grids.items() if grid)

    def verdicts(self) -> list[Verdict]:
        """Every claim, in each condition it is asked of."""
        asked = [
            (claim, place)
            for claim in self.study.claims
            for place in self.study.places
            if claim.condition in (None, place)
        ]
        return [self._verdict(claim, place) for claim, place in asked]

    def _verdict(self, claim: Claim, condition: str | None) -> Verdict:
        first, second = (self.values(arm, condition, claim.column) for arm in claim.arms)
        differences = tuple(first[seed] - second[seed] for seed in sorted(first.keys() & second.keys()))
        sign = as_good_sign(differences, claim.within) if claim.within else order_sign(differences)
        return Verdict(claim, condition, sign, differences, self._detail(claim, differences))

    def _detail(self, claim: Claim, differences: Sequence[float]) -> str:
        if not differences:
            return "no seed has both arms yet"
        label, n = self.study.columns[claim.column], len(differences)
        first, second = (self.study.arms[arm].label for arm in claim.arms)
        amount = change_text(claim.column, float(np.mean(differences)), deviation(differences))
        told = f"{label}: “{first}” minus “{second}” is {amount} "
        told += f"over {n} seeds" if n > 1 else "in one seed"
        interval = t_interval(differences)
        if interval is None:
            told += f", and {'one seed' if n == 1 else f'{n} seeds'} cannot tell"
        else:
            told += f" (95% interval {interval_text(claim.column, *interval)})"
        if claim.within is not None:
            return f"{told}; at most {change_text(claim.column, claim.within, None).removeprefix('+')} short is as good"
        return f"{told}; above 0 in {sum(value > 0 for value in differences)} of {n}"

    def charts(self) -> list[Chart]:
        """Against the samples scored, for each condition that has runs: the main held-out column, where it was measured
        on the way, and the training metric."""
        charts = []
        for place in self.study.places:
            charts += self._held_out_chart(place)
            curves = {
                self.study.arms[arm].label: [run for run in self.of(arm, place).values() if run.curves]
                for arm in self.study.trained
            }
            metric = self.metric()
            lines = {label: points(runs, metric) for label, runs in curves.items()}
            if metric is None or not any(xs for xs, _ in lines.values()):
                continue
            label = self.study.conditions[place].label if place else metric
            charts.append(
                _chart(label, f"{metric} in training", {name: line for name, line in lines.items() if line[0]})
            )
        return charts

    def _held_out_chart(self, place: str | None) -> list[Chart]:
        main, lines = self.study.main, {}
        for arm in self.study.trained:
            runs = list(self.of(arm, place).values())
            scored = [_held_out_means(run, main) for run in runs]
            common = sorted(set.intersection(*map(set, scored))) if scored else []
            if len(common) > 2:
                xs = [_scored(runs[0], iteration) for iteration in common]
                lines[self.study.arms[arm].label] = (xs, [[means[at] for at in common] for means in scored])
        if not lines:
            return []
        label = self.study.columns[main]
        title = f"{self.study.conditions[place].label}: {label}" if place else label
        return [_chart(title, f"{main} on held-out prompts", lines)]

    def metric(self) -> str | None:
        """The training metric that is drawn."""
        if self.study.curve:
            return self.study.curve
        config = self.plan.job(self.study.trained[0], self.study.places[0], 0, {}).config
        trained = [name for name, reward in config.rewards.items() if reward.weight]
        return f"reward/{trained[0]}/mean" if trained else None


def cell_of(values: Sequence[float]) -> Cell | None:
    """Mean and standard deviation (n - 1) over seeds; None without any."""
    if not values:
        return None
    return Cell(float(np.mean(values)), deviation(values), len(values))


def points(runs: Sequence[Result], metric: str | None) -> tuple[list[int], list[list[float]]]:
    """Samples scored (P,) and each run's metric there (runs, P): means over equal shares of the shortest run.

    Iterations without a value are left out of their share; a share without any ends the curve.
    """
    found = [run for run in runs if metric in run.curves and run.samples]
    if not found or metric is None:
        return [], []
    length = min(len(run.samples) for run in found)
    count = min(length, CURVE_POINTS)
    edges = [index * length // count for index in range(count + 1)]
    rows = [[_mean(run.curves[metric][a:b]) for a, b in pairwise(edges)] for run in found]
    whole = next((index for index in range(count) if any(row[index] is None for row in rows)), count)
    xs = [round(float(np.mean(found[0].samples[a:b]))) for a, b in pairwise(edges)]
    return xs[:whole], [[value for value in row[:whole] if value is not None] for row in rows]


def _held_out_means(run: Result, column: str) -> dict[int, float]:
    """Iterations done -> the mean of a held-out column, where it was measured."""
    told = {one.iteration: one.columns.get(column) for one in run.evaluations}
    return {at: found.mean for at, found in told.items() if found is not None and found.mean is not None}


def _scored(run: Result, iteration: int) -> int:
    """Samples scored before an evaluation after `iteration` iterations."""
    return run.samples[iteration - 1] if 0 < iteration <= len(run.samples) else 0


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _chart(title: str, metric: str, lines: Mapping[str, tuple[list[int], list[list[float]]]]) -> Chart:
    """Curves over different numbers of samples on one axis: read off by straight lines between their points."""
    x = sorted({at for xs, _ in lines.values() for at in xs})
    series = []
    for name, (xs, rows) in lines.items():
        inside = [xs[0] <= at <= xs[-1] for at in x]
        mean = np.interp(x, xs, np.mean(rows, axis=0))
        std = np.interp(x, xs, np.std(rows, axis=0, ddof=1)) if len(rows) > 1 else None
        low, high = (None, None) if std is None else (_cut(mean - std, inside), _cut(mean + std, inside))
        series.append(Series(name, _cut(mean, inside), low, high))
    about = (
        f"{metric} against reward queries (samples scored). Lines: mean over seeds; "
        f"bands: one standard deviation of the seeds."
    )
    return Chart(title, about, x, series, axis="reward queries", smoothed=False)


def _cut(values: np.ndarray, inside: Sequence[bool]) -> Values:
    return [float(value) if known else None for value, known in zip(values, inside, strict=True)]


def level(column: str, value: float) -> str:
    """A column's value for people: a percentage for pass rates."""
    return f"{value:.1%}" if is_pass_column(column) else show(value)


def change_text(column: str, mean: float, std: float | None) -> str:
    """`+0.012 ± 0.003`, in percentage points for pass rates."""
    scale, unit = (100, " points") if is_pass_column(column) else (1, "")
    if not std:
        return f"{scale * mean:+.3g}" + (" ± 0" if std == 0 else "") + unit
    places = _places(scale * std)
    return f"{scale * mean:+.{places}f} ± {scale * std:.{places}f}{unit}"


def cell_text(column: str, cell: Cell | None) -> str:
    """`0.412 ± 0.013`, without a deviation where there is none, or a dash."""
    if cell is None:
        return MISSING
    if not cell.std:
        return level(column, cell.mean)
    scale, sign = (100, "%") if is_pass_column(column) else (1, "")
    places = _places(scale * cell.std)
    return f"{scale * cell.mean:.{places}f}{sign} ± {scale * cell.std:.{places}f}"


def cell_note(column: str, cell: Cell | None) -> str:
    """`± 0.023 over prompts`, where the seeds give no deviation to show; else nothing."""
    if cell is None or cell.std or not cell.error:
        return ""
    scale = 100 if is_pass_column(column) else 1
    return f"± {scale * cell.error:.{_places(scale * cell.error)}f} over prompts"


def interval_text(column: str, low: float, high: float) -> str:
    """`+0.013 to +0.027`, in percentage points for pass rates, to two digits of its half width."""
    scale = 100 if is_pass_column(column) else 1
    half = scale * (high - low) / 2
    if half <= RESIDUE * scale * abs(high):
        return f"{scale * low:+.3g} to {scale * high:+.3g}"
    places = _places(half)
    return f"{scale * low:+.{places}f} to {scale * high:+.{places}f}"


def _is_number(value: object) -> TypeGuard[int | float]:
    """Whether a candidate's value has a place in an order."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _places(std: float) -> int:
    """Decimals that show a deviation to two digits (at most four), and the mean to the same place."""
    return min(4, max(0, 1 - math.floor(math.log10(std))))
