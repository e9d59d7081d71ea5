"""Whether a claim holds, from the seeds' differences between two arms: by their two-sided 95% t interval alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Sign = Literal["holds", "does not hold", "undecided"]

FEWEST_SEEDS = 3
"""Below these nothing is decided: with two, the interval is 12.7 standard errors wide to either side."""
RESIDUE = 1e-9
"""Equal values that were averaged in another order differ by less than this share of them."""


def t_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """mean ± t(0.975, n - 1) s / sqrt(n), the 95% interval of the seeds' mean difference (Student, 1908).

    differences: one per seed. None with fewer than `FEWEST_SEEDS`.
    """
    n = len(differences)
    if n < FEWEST_SEEDS:
        return None
    from scipy.stats import t

    mean, error = float(np.mean(differences)), float(np.std(differences, ddof=1)) / n**0.5
    half = float(t.ppf(0.975, n - 1)) * error
    return mean - half, mean + half


def order_sign(differences: Sequence[float]) -> Sign:
    """Whether the first arm is above the second: where the interval lies above 0; not, where it lies below."""
    return _sign(differences, 0.0)


def as_good_sign(differences: Sequence[float], within: float) -> Sign:
    """Whether the first arm falls at most `within` short of the second (one-sided non-inferiority).

    It does where the interval lies above -within, and does not where it lies below.
    """
    return _sign(differences, -within)


def _sign(differences: Sequence[float], bound: float) -> Sign:
    interval = t_interval(differences)
    if interval is None:
        return "undecided"
    low, high = interval
    return "holds" if low > bound else "does not hold" if high < bound else "undecided"


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation (n - 1); None with one value, exactly 0 where only rounding tells the values apart."""
    if len(values) < 2:
        return None
    std = float(np.std(values, ddof=1))
    return 0.0 if std < RESIDUE * abs(float(np.mean(values))) else std
