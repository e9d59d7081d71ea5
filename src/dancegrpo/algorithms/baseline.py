"""The baseline that a group is to itself: judges normalised, summed by weight, clamped once; best-of-N."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dancegrpo.advantages import batch_advantage, best_of_n, combine, group_advantage
from dancegrpo.algorithms.base import Advantage, Stateless
from dancegrpo.algorithms.work import deal
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Scores


class GroupBaseline(Stateless):
    """An algorithm that compares the samples of a group with each other."""

    @property
    def clamp(self) -> float | None:
        """Bound of the summed advantage."""
        return self.config.advantage.clamp

    def advantage(self, scores: Mapping[str, Scores], group: Tensor, prompts: Sequence[Prompt] = ()) -> Advantage:
        """Normalises each judge within its group, sums by weight, clamps once, then picks best-of-N.

        With `advantage.combine=scores` the raw scores are summed by weight first, and the sum is normalised.

        A sample that any trained judge failed on has weight 0: part of its reward is unknown.
        """
        config, weights = self.config.advantage, self.config.weights
        valid = torch.stack([scores[name].valid for name in weights]).all(dim=0)
        columns = {name: scores[name].values for name in weights}
        if config.combine == "advantages":
            normalized = {
                name: self._normalize(name, values, valid, group, prompts) for name, values in columns.items()
            }
            per_judge = {name: advantage for name, (advantage, _) in normalized.items()}
            value = combine(per_judge, weights, self.clamp)
            weight = next(weight for _, weight in normalized.values())  # it depends on `valid` alone
        else:
            total, _ = weighted_sum(scores, weights)
            advantage, weight = self._normalize("sum", total, valid, group, prompts)
            per_judge, value = {}, combine({"sum": advantage}, {"sum": 1.0}, self.clamp)
        if config.keep is not None:
            weight = best_of_n(value, weight, group, config.keep)
        return Advantage(value, weight, valid, per_judge, silent_groups(value, weight, group))

    def _normalize(
        self, judge: str, values: Tensor, valid: Tensor, group: Tensor, prompts: Sequence[Prompt]
    ) -> tuple[Tensor, Tensor]:
        """One judge's scores (B,) -> their advantage (B,) and weight (B,)."""
        config = self.config.advantage
        settings: Any = {"estimator": config.estimator, "eps": config.eps, "min_spread": config.min_spread}
        if config.normalization == "batch":
            return batch_advantage(values, valid, **settings)[:2]
        return group_advantage(values, valid, group, **settings)[:2]

    def deal(self, advantage: Advantage, group: Tensor) -> Tensor:
        """Each group's samples round-robin: every update sees every group."""
        return deal(group, advantage.weight, self.config.update.updates_per_rollout)


def weighted_sum(scores: Mapping[str, Scores], weights: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """Raw scores summed by weight (B,), NaN where a judge failed, and where none did (B,) bool."""
    valid = torch.stack([scores[name].valid for name in weights]).all(dim=0)
    return torch.stack([weight * scores[name].values for name, weight in weights.items()]).sum(dim=0), valid


def silent_groups(value: Tensor, weight: Tensor, group: Tensor) -> Tensor:
    """(P,) bool: groups with samples to train on whose advantages are all 0. value, weight, group: (B,)."""
    groups = int(group.max()) + 1
    selected = torch.zeros(groups).index_add_(0, group, (weight > 0).float())
    signal = torch.zeros(groups).index_add_(0, group, ((value != 0) & (weight > 0)).float())
    return (signal == 0) & (selected > 0)
