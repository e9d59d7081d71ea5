"""The stream of a run's metrics, as far back as its alarms look, and levels with the noise they are known to."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WINDOW = 6
"""Iterations that make a level: fewer are noise, more are late."""
START = 30
"""First iterations that are remembered for good."""
KEPT = 60
"""Last iterations that are remembered."""

Row = Mapping[str, float]


@dataclass(frozen=True)
class Level:
    """A mean over some iterations. error: its standard error, by the spread between samples taken as if a group's were
    all one. spread: standard deviation between samples."""

    mean: float
    error: float
    spread: float

    def above(self, other: Level) -> float:
        """The difference in standard errors; 0 where neither has any."""
        error = math.hypot(self.error, other.error)
        return (self.mean - other.mean) / error if error else 0.0


class History:
    """What alarms look at: settings, the first rows, the last rows, the best level of each trained judge.

    settings: a run's, as a mapping (`RunConfig.model_dump()`, or config.yaml read).
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        judges = settings.get("rewards") or {}
        weights = {name: float((judge or {}).get("weight", 1.0)) for name, judge in judges.items()}
        self.trained = {name: weight for name, weight in weights.items() if weight}
        self.held_out = [name for name, weight in weights.items() if not weight]
        self.clip_range = float((settings.get("algorithm") or {}).get("clip_range", 1e-4))
        self.spike = float((settings.get("health") or {}).get("spike", 8.0))
        self.start: list[Row] = []
        self.rows: deque[Row] = deque(maxlen=KEPT)
        self.seen = 0
        self.best: dict[str, Level] = {}
        self.most_diverse: float | None = None
        self.rollbacks = 0.0
        self.went_back = False
        """Whether the run went back just before the newest row."""

    def add(self, metrics: Mapping[str, Any]) -> None:
        """One more iteration; what is no finite number is left out of it."""
        row = {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        before = self.rollbacks
        self.rollbacks = row.get("health/rollbacks", before)
        self.went_back = self.rollbacks > before
        if self.went_back:
            self.rows.clear()  # the weights that these tell of are gone
        self.rows.append(row)
        self.seen += 1
        if len(self.start) < START:
            self.start.append(row)
        self._remember_best()

    def last(self, count: int) -> list[Row]:
        """The last rows; [] where there are not as many."""
        return list(self.rows)[-count:] if len(self.rows) >= count else []

    def column(self, key: str, count: int = WINDOW) -> list[float]:
        """A metric's values in the last rows that have it; [] where there are fewer rows."""
        return [row[key] for row in self.last(count) if key in row]

    def known(self, key: str) -> list[float]:
        """A metric's values in all of the rows kept, without the newest."""
        return [row[key] for row in list(self.rows)[:-1] if key in row]

    def reward(self, judge: str, rows: Sequence[Row]) -> Level | None:
        """A judge's level over rows, turned round where its weight is below 0."""
        found = level(f"reward/{judge}/mean", f"reward/{judge}/std", rows)
        if found is None or self.trained.get(judge, 1.0) > 0:
            return found
        return Level(-found.mean, found.error, found.spread)

    def _remember_best(self) -> None:
        # Of rows before the last window, so that a level is never compared with one that it has a part in.
        before = list(self.rows)[-2 * WINDOW : -WINDOW]
        for judge in self.trained if before else ():
            found, best = self.reward(judge, before), self.best.get(judge)
            # By what it surely was: a lucky first iteration would stay the best for ever.
            if found is not None and (best is None or found.mean - found.error > best.mean - best.error):
                self.best[judge] = found
        if values := [row["image/diversity"] for row in before if "image/diversity" in row]:
            self.most_diverse = max(self.most_diverse or 0.0, statistics.median(values))


def level(mean: str, std: str, rows: Sequence[Row]) -> Level | None:
    """The level of a metric that comes with its spread between samples; None without rows that have both."""
    found = [(row[mean], row[std], _groups(row)) for row in rows if mean in row and std in row]
    if not found:
        return None
    error = math.sqrt(sum(spread**2 / groups for _, spread, groups in found)) / len(found)
    return Level(
        statistics.fmean(m for m, _, _ in found), error, math.sqrt(statistics.fmean(s**2 for _, s, _ in found))
    )


def _groups(row: Row) -> float:
    return row.get("groups/total") or row.get("samples/total") or 1.0
