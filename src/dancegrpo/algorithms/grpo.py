"""Group Relative Policy Optimization on a stochastic sampler (DanceGRPO, arXiv:2505.07818)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dancegrpo.advantages import batch_advantage, best_of_n, combine, group_advantage
from dancegrpo.algorithms.base import Advantage, Pairs
from dancegrpo.config import RunConfig
from dancegrpo.objectives import approx_kl, clipped_surrogate, is_clipped, ratio
from dancegrpo.policies.base import Condition, Policy
from dancegrpo.rewards.base import Scores
from dancegrpo.sampling import OnBatch, Trajectory, rollout
from dancegrpo.sde import Gaussian


class GRPO:
    """The paper's algorithm: group-relative advantages, the clipped surrogate, optionally a KL to the start."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.needs_reference = config.algorithm.kl_weight > 0

    def collect(
        self,
        policy: Policy,
        condition: Condition,
        iteration: int,
        on_batch: OnBatch | None = None,
    ) -> Trajectory:
        """Samples group_size outputs per prompt."""
        config, reduction = self.config, self.config.algorithm.log_prob_reduction
        key: Any = {"seed": config.seed, "iteration": iteration, "reduction": reduction}
        return rollout(policy, condition, config.rollout, **key, on_batch=on_batch)

    def advantage(self, scores: Mapping[str, Scores], group: Tensor) -> Advantage:
        """Normalises each judge within its group, sums by weight, clamps once, then picks best-of-N.

        With `advantage.combine=scores` the raw scores are summed by weight first, and the sum is normalised.

        A sample that any trained judge failed on has weight 0: part of its reward is unknown.
        """
        config, weights = self.config.advantage, {n: r.weight for n, r in self.config.rewards.items() if r.weight}
        valid = torch.stack([scores[name].valid for name in weights]).all(dim=0)
        normalize = self._normalizer(valid, group)
        columns = {name: scores[name].values for name in weights}
        if config.combine == "advantages":
            normalized = {name: normalize(values) for name, values in columns.items()}
            per_judge = {name: advantage for name, (advantage, _) in normalized.items()}
            value = combine(per_judge, weights, config.clamp)
            weight = next(weight for _, weight in normalized.values())  # it depends on `valid` alone
        else:
            # A masked score is NaN, and so is any sum with it: `valid` keeps it out.
            total = torch.stack([weights[name] * values for name, values in columns.items()]).sum(dim=0)
            advantage, weight = normalize(total)
            per_judge, value = {}, combine({"sum": advantage}, {"sum": 1.0}, config.clamp)
        if config.keep is not None:
            weight = best_of_n(value, weight, group, config.keep)
        groups = int(group.max()) + 1
        selected = torch.zeros(groups).index_add_(0, group, (weight > 0).float())
        signal = torch.zeros(groups).index_add_(0, group, ((value != 0) & (weight > 0)).float())
        return Advantage(value, weight, valid, per_judge, silent=(signal == 0) & (selected > 0))

    def _normalizer(self, valid: Tensor, group: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Scores (B,) -> their advantage (B,) and weight (B,), as the recipe normalises them."""
        config = self.config.advantage
        settings: Any = {"estimator": config.estimator, "eps": config.eps, "min_spread": config.min_spread}
        if config.normalization == "batch":
            return lambda values: batch_advantage(values, valid, **settings)[:2]
        return lambda values: group_advantage(values, valid, group, **settings)[:2]

    def log_prob(self, policy: Policy, pairs: Pairs) -> Tensor:
        """Log-probability of the transitions taken, under the current policy."""
        gaussian = _transition(policy, pairs)
        return gaussian.log_prob(pairs.x_next, reduction=self.config.algorithm.log_prob_reduction)

    def loss(self, policy: Policy, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        """max(-A ratio, -A clip(ratio)) per pair, plus kl_weight * KL(policy || start)."""
        config = self.config.algorithm
        gaussian = _transition(policy, pairs)
        log_prob = gaussian.log_prob(pairs.x_next, reduction=config.log_prob_reduction)
        # On-policy the old log-prob is this very number, so the ratio is exactly 1 whatever the batch size rounds to.
        old = log_prob.detach() if pairs.old_log_prob is None else pairs.old_log_prob
        loss = clipped_surrogate(log_prob, old, pairs.advantage, config.clip_range)
        taken = log_prob.detach()
        statistics = {
            "log_prob": taken,
            "ratio": ratio(taken, old),
            "approx_kl": approx_kl(taken, old),
            "clipped": is_clipped(taken, old, config.clip_range).float(),
        }
        if config.kl_weight > 0:
            with torch.no_grad(), policy.reference():
                reference = _transition(policy, pairs)
            kl = gaussian.kl(reference)
            loss = loss + config.kl_weight * kl
            statistics["kl"] = kl.detach()
        return loss, statistics

    def state_dict(self) -> dict[str, Any]:
        """GRPO keeps nothing between iterations."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def _transition(policy: Policy, pairs: Pairs) -> Gaussian:
    prediction = policy.predict(pairs.x_t, pairs.step, pairs.condition)
    return policy.dynamics.transition(pairs.x_t, prediction, pairs.step, pairs.noise_level)
