"""How long a run will take, from those that ended: a part for its start and its evaluations, a part per iteration."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Pace:
    """ended: recipe -> (iterations, seconds) of each run that ended."""

    ended: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def add(self, recipe: str, iterations: int, seconds: float) -> None:
        """Takes note of a run."""
        self.ended.setdefault(recipe, []).append((iterations, seconds))

    def seconds(self, recipe: str, iterations: int) -> float:
        """What a run of so many iterations will take, by those of its recipe, else by all; 0 before any has ended.

        start + iterations * each by least squares, both at least 0; in proportion to the iterations where the runs had
        equally many, or where the fit has a part below 0.
        """
        known = self.ended.get(recipe) or [run for runs in self.ended.values() for run in runs]
        if not known:
            return 0.0
        counts, took = np.array(known, dtype=float).T
        if len(set(counts)) > 1:
            each, start = np.polyfit(counts, took, 1)
            if each >= 0 and start >= 0:
                return float(start + each * iterations)
        return float(iterations * took.sum() / max(1.0, counts.sum()))
