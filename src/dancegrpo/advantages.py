"""From scores to advantages: normalisation within groups, combination of judges, best-of-N selection.

A group is the set of samples of one prompt; its own mean is the baseline. Groups are arbitrary int64 ids, in any
order. Everything is vectorised over samples and computed in float64, so that equal scores give exactly 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, assert_never

import torch
from torch import Tensor

Estimator = Literal["unbiased", "biased", "none"]


def _deviation(squares: Tensor, count: Tensor, estimator: Estimator, eps: float) -> Tensor | float:
    match estimator:
        case "unbiased":
            return (squares / (count - 1).clamp(min=1)).sqrt() + eps
        case "biased":
            return (squares / count.clamp(min=1)).sqrt() + eps
        case "none":
            return 1.0
        case _:
            assert_never(estimator)


def group_advantage(
    scores: Tensor,
    valid: Tensor,
    group_ids: Tensor,
    *,
    estimator: Estimator = "unbiased",
    eps: float = 1e-8,
    min_spread: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(r - mean) / (std + eps) within each group (arXiv:2505.07818).

    scores: (B,). valid: (B,) bool; masked samples leave the mean and the std and are not trained.
    group_ids: (B,) int64.
    estimator: of the std: "unbiased" (n - 1), "biased" (n), or "none" to centre only.
    min_spread: a group whose max - min is at most this carries no signal; its advantage is exactly 0.

    Returns advantage (B,) float32; weight (B,) float32, 0 for masked samples and for groups with fewer than 2 valid
    ones, otherwise 1 (groups without signal keep their place in the loss's denominator); spread (num_groups,) float32,
    max - min in ascending order of id, NaN where fewer than 2 are valid, so `(spread <= min_spread).sum()` counts the
    groups without signal. Raises ValueError for a valid score that is not finite.
    """
    if not bool((scores.isfinite() | ~valid).all()):
        raise ValueError(
            f"valid scores {scores[valid & ~scores.isfinite()].tolist()} are not finite: mask such samples."
        )
    ids, group = torch.unique(group_ids, return_inverse=True)
    # where, not a product: a masked score may be NaN.
    values = torch.where(valid, scores.double(), 0.0)
    zeros = values.new_zeros(len(ids))
    count = zeros.scatter_add(0, group, valid.double())
    mean = zeros.scatter_add(0, group, values) / count.clamp(min=1)
    centred = torch.where(valid, values - mean[group], 0.0)
    deviation = _deviation(zeros.scatter_add(0, group, centred.square()), count, estimator, eps)

    highest = zeros.scatter_reduce(0, group, torch.where(valid, values, -torch.inf), "amax", include_self=False)
    lowest = zeros.scatter_reduce(0, group, torch.where(valid, values, torch.inf), "amin", include_self=False)
    spread = torch.where(count >= 2, highest - lowest, torch.nan).float()

    scaled = centred / (deviation[group] if isinstance(deviation, Tensor) else deviation)
    advantage = torch.where(spread[group] > min_spread, scaled, 0.0)
    weight = valid & (count[group] >= 2)
    return advantage.float(), weight.float(), spread


def batch_advantage(
    scores: Tensor, valid: Tensor, *, estimator: Estimator = "unbiased", eps: float = 1e-8, min_spread: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`group_advantage` with the whole batch as one group: advantage (B,), weight (B,), spread (1,)."""
    one_group = torch.zeros_like(scores, dtype=torch.int64)
    return group_advantage(scores, valid, one_group, estimator=estimator, eps=eps, min_spread=min_spread)


def standardize(scores: Tensor, baseline: Tensor, *, estimator: Estimator = "unbiased", eps: float = 1e-8) -> Tensor:
    """(r - mean) / (std + eps) with mean and std of other scores, as of DDPO's running buffer (arXiv:2305.13301).

    scores: (B,). baseline: (N,), all finite, N >= 1. estimator, eps: as in `group_advantage`. Returns (B,) float32.
    """
    centred = baseline.double() - baseline.double().mean()
    count = torch.tensor(float(len(baseline)), dtype=torch.float64)
    deviation = _deviation(centred.square().sum(), count, estimator, eps)
    return ((scores.double() - baseline.double().mean()) / deviation).float()


def combine(advantages: Mapping[str, Tensor], weights: Mapping[str, float], clamp: float | None) -> Tensor:
    """Sum of the judges' advantages, each (B,), by their weights, then clamped once to [-clamp, clamp].

    Each judge is normalised on its own before, so that weights compare judges and not their units.
    Raises ValueError unless both name the same judges.
    """
    if not weights or advantages.keys() != weights.keys():
        raise ValueError(f"advantages of {sorted(advantages)} but weights of {sorted(weights)}: name the same judges.")
    total = torch.stack([weight * advantages[name] for name, weight in weights.items()]).sum(0)
    return total if clamp is None else total.clamp(-clamp, clamp)


def best_of_n(advantage: Tensor, weight: Tensor, group_ids: Tensor, keep: int) -> Tensor:
    """Keep each group's top keep/2 and bottom keep/2 by advantage; the others get weight 0. All (B,).

    Samples of weight 0 are out of the running; a group with at most `keep` in it keeps them all. Advantages are not
    renormalised. Among equals the lower index counts as the smaller. Raises ValueError unless keep is even and
    positive.
    """
    if keep < 2 or keep % 2:
        raise ValueError(f"keep={keep} must be even and at least 2: half the best, half the worst.")
    ids, group = torch.unique(group_ids, return_inverse=True)
    running = weight > 0
    # Ascending by advantage, then stably by group with those out of the running last: position = rank in the group.
    order = advantage.argsort(stable=True)
    order = order[(2 * group + (~running).long())[order].argsort(stable=True)]
    size = group.bincount(minlength=len(ids))
    start = size.cumsum(0) - size
    rank = torch.empty_like(group)
    rank[order] = torch.arange(len(group), device=group.device) - start[group[order]]
    count = group[running].bincount(minlength=len(ids))[group]
    chosen = running & ((rank < keep // 2) | (rank >= count - keep // 2))
    return torch.where(chosen, weight, torch.zeros_like(weight))
