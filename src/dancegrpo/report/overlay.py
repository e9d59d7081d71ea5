"""The curves of several runs on top of each other, by iteration and by samples scored."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from dancegrpo.report.curves import Chart, Curves, Series, Values, has_values
from dancegrpo.report.folder import Record, RunFolder
from dancegrpo.report.standings import repeated
from dancegrpo.statistics import is_pass_column, summarize

Axis = Literal["iterations", "samples"]
TOOLTIP = {"iterations": "iteration", "samples": "samples scored:"}

Metrics = tuple[tuple[str, str, str, dict[str, Any]], ...]
"""Title, words, metric and options of each chart."""

HEALTH: Metrics = (
    (
        "Ratio, largest deviation",
        "The farthest any trained step's ratio went from 1. 0 by design with one update per rollout.",
        "train/ratio_max_deviation",
        {"from_zero": True},
    ),
    (
        "Clip fraction",
        "Share of trained steps whose ratio was clipped.",
        "train/clip_fraction",
        {"unit": "percent", "from_zero": True},
    ),
    ("Gradient norm", "Before clipping.", "train/grad_norm", {"from_zero": True}),
    (
        "Weight change",
        "Distance of the trained weights from where they started, relative to their size (L2).",
        "train/weight_change",
        {"unit": "percent", "smoothed": False, "from_zero": True},
    ),
    ("KL to the starting policy", "Nats per latent element.", "train/kl", {"from_zero": True}),
)
COST: Metrics = (
    (
        "Seconds per iteration",
        "Evaluations and checkpoints aside.",
        "seconds/total",
        {"unit": "seconds", "from_zero": True},
    ),
    (
        "Peak memory",
        "Of the process, or of the accelerator.",
        "memory/peak_mb",
        {"unit": "megabytes", "smoothed": False, "from_zero": True},
    ),
)


@dataclass(frozen=True)
class Track:
    """A run as it is drawn: its label, its color of the palette, and the evaluations that can be compared."""

    run: RunFolder
    label: str
    color: int
    evaluations: Sequence[Record] = ()

    @cached_property
    def curves(self) -> Curves:
        """Its metrics, thinned."""
        return Curves(self.run)

    @cached_property
    def scored(self) -> list[int]:
        """Samples scored up to and including each record of `run.metrics`; [] where the run counted none."""
        totals = list(itertools.accumulate(int(record.get("samples/total") or 0) for record in self.run.metrics))
        return totals if totals and totals[-1] else []

    def places(self, axis: Axis) -> list[int]:
        """Where its drawn iterations lie; [] where it counted no samples.

        An iteration's rewards lie at the samples scored once it was done.
        """
        if axis == "iterations":
            return self.curves.x
        if not self.scored:
            return []
        total = dict(zip((record["iteration"] for record in self.run.metrics), self.scored, strict=True))
        return [total[iteration] for iteration in self.curves.x]

    def after(self, iterations: int, axis: Axis) -> int | None:
        """Where an evaluation after so many iterations lies; None where the run counted no samples."""
        if axis == "iterations":
            return iterations
        if not self.scored:
            return None
        done = bisect_left(self.run.metrics, iterations, key=lambda record: record["iteration"])
        return self.scored[done - 1] if done else 0


def overlay(title: str, about: str, series: Sequence[Series], **options: Any) -> list[Chart]:
    """One chart of those series, each with places of its own, that have values; none where none has."""
    drawn = [line for line in series if line.x and has_values(line.values)]
    places = sorted({place for line in drawn for place in line.x or []})
    return [Chart(title, about, places, drawn, **options)] if drawn else []


def metric_chart(tracks: Sequence[Track], title: str, about: str, key: str, axis: Axis, **options: Any) -> list[Chart]:
    """One metric of every run that has it."""
    lines = [_series(track, track.curves.values(key), track.places(axis)) for track in tracks]
    return overlay(title, about, lines, axis=TOOLTIP[axis], **options)


def _series(track: Track, values: Values, places: list[int]) -> Series:
    return Series(track.label, values, x=places, color=track.color) if places else Series(track.label, [], x=[])


def reward_charts(tracks: Sequence[Track], axis: Axis) -> list[Chart]:
    """Mean raw reward of each judge by its name, and the share of samples that pass where it says so."""
    charts = []
    for judge in dict.fromkeys(judge for track in tracks for judge in track.run.judges()):
        roles = {"trained on" if track.run.weight(judge) else "only measured" for track in tracks if _has(track, judge)}
        about = f"Mean raw score of each rollout's samples ({' or '.join(sorted(roles, reverse=True))})."
        charts += metric_chart(tracks, f"Reward: {judge}", about, f"reward/{judge}/mean", axis)
        charts += metric_chart(
            tracks,
            f"Pass rate in training: {judge}",
            "Share of the rollout's samples that pass.",
            f"reward/{judge}/pass",
            axis,
            unit="percent",
            from_zero=True,
        )
    return charts


def _has(track: Track, judge: str) -> bool:
    return has_values(track.curves.values(f"reward/{judge}/mean"))


def held_out_charts(tracks: Sequence[Track], axis: Axis) -> list[Chart]:
    """Each held-out column over the runs' evaluations; none where no run has a second one."""
    if max((len(track.evaluations) for track in tracks), default=0) < 2:
        return []
    summaries = [[summarize(evaluation) for evaluation in track.evaluations] for track in tracks]
    charts, twice = [], repeated([evaluation for track in tracks for evaluation in track.evaluations])
    names = dict.fromkeys(name for run in summaries for summary in run for name in summary.means if name not in twice)
    for column in names:
        lines = []
        for track, run in zip(tracks, summaries, strict=True):
            placed = [(x, s) for s in run if (x := track.after(s.iteration, axis)) is not None]
            rates = [summary.passes.get(column) for _, summary in placed]
            line = _series(track, [summary.means.get(column) for _, summary in placed], [x for x, _ in placed])
            if any(rates):
                low, high = ([getattr(rate, end) if rate else None for rate in rates] for end in ("low", "high"))
                line = Series(line.name, line.values, low, high, line.x, line.color)
            lines.append(line)
        passes = is_pass_column(column)
        about = "Mean over the held-out prompts that the runs share."
        if passes:
            about = "Share of the shared held-out prompts that pass; the band is a 95% interval."
        name = "after iteration" if axis == "iterations" else TOOLTIP[axis]
        unit = "percent" if passes else "number"
        charts += overlay(f"Held out: {column}", about, lines, axis=name, unit=unit, smoothed=False)
    return charts
