"""Group Relative Policy Optimization on a stochastic sampler (DanceGRPO, arXiv:2505.07818)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dancegrpo.advantages import batch_advantage, best_of_n, combine, group_advantage
from dancegrpo.algorithms.base import Advantage, Workload
from dancegrpo.algorithms.policy_gradient import Pairs, PolicyGradient, PolicyGradientLearning, transition
from dancegrpo.algorithms.work import deal
from dancegrpo.config import RunConfig
from dancegrpo.errors import ConfigError
from dancegrpo.objectives import approx_kl, clipped_surrogate, guarded_log_ratio, is_clipped, ratio
from dancegrpo.policies.base import Policy
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Scores
from dancegrpo.sde import FlowDynamics, Gaussian


class GRPO(PolicyGradient):
    """The paper's algorithm: group-relative advantages, the clipped surrogate, optionally a KL to the start."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.needs_reference = config.algorithm.kl_weight > 0
        self.keep = "means" if config.algorithm.guard else "transitions"

    def workload(self, policy: Policy) -> Workload:
        """See `Algorithm.workload`. Raises ConfigError for the guard on a diffusion model."""
        if self.config.algorithm.guard and not isinstance(policy.dynamics, FlowDynamics):
            raise ConfigError(
                f"algorithm.guard=true is for rectified flow, {self.config.model.path} is a diffusion model: set it to "
                "false"
            )
        return super().workload(policy)

    def advantage(self, scores: Mapping[str, Scores], group: Tensor, prompts: Sequence[Prompt] = ()) -> Advantage:
        """Normalises each judge within its group, sums by weight, clamps once, then picks best-of-N.

        With `advantage.combine=scores` the raw scores are summed by weight first, and the sum is normalised.

        A sample that any trained judge failed on has weight 0: part of its reward is unknown.
        """
        config, weights = self.config.advantage, {n: r.weight for n, r in self.config.rewards.items() if r.weight}
        valid = torch.stack([scores[name].valid for name in weights]).all(dim=0)
        columns = {name: scores[name].values for name in weights}
        if config.combine == "advantages":
            normalized = {
                name: self._normalize(name, values, valid, group, prompts) for name, values in columns.items()
            }
            per_judge = {name: advantage for name, (advantage, _) in normalized.items()}
            value = combine(per_judge, weights, config.clamp)
            weight = next(weight for _, weight in normalized.values())  # it depends on `valid` alone
        else:
            # A masked score is NaN, and so is any sum with it: `valid` keeps it out.
            total = torch.stack([weights[name] * values for name, values in columns.items()]).sum(dim=0)
            advantage, weight = self._normalize("sum", total, valid, group, prompts)
            per_judge, value = {}, combine({"sum": advantage}, {"sum": 1.0}, config.clamp)
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

    def objective(self, policy: Policy, pairs: Pairs, learning: PolicyGradientLearning) -> Tensor:
        """max(-A ratio, -A clip(ratio)) per pair, plus kl_weight * KL(policy || start)."""
        config = self.config.algorithm
        gaussian = transition(policy, pairs)
        log_prob = gaussian.log_prob(pairs.x_next, reduction=config.log_prob_reduction)
        # On-policy the old log-prob is this very number, so the ratio is exactly 1 whatever the batch size rounds to.
        old = log_prob.detach() if pairs.old_log_prob is None else pairs.old_log_prob
        learning.note(log_prob=log_prob)
        if config.guard:
            log_prob, old, scale = self._guarded(policy, pairs, gaussian, log_prob, old)
        else:
            scale = torch.ones_like(log_prob)
        loss = scale * clipped_surrogate(log_prob, old, pairs.advantage, config.clip_range)
        taken = log_prob.detach()
        learning.note(
            ratio=ratio(taken, old),
            approx_kl=approx_kl(taken, old),
            clipped=is_clipped(taken, old, config.clip_range).float(),
        )
        if config.kl_weight > 0:
            with torch.no_grad(), policy.reference():
                reference = transition(policy, pairs)
            kl = gaussian.kl(reference)
            loss = loss + config.kl_weight * kl
            learning.note(kl=kl)
        return loss

    def _guarded(
        self, policy: Policy, pairs: Pairs, gaussian: Gaussian, log_prob: Tensor, old: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """GRPO-Guard's (log ratio, 0) in place of the two log-probs, and the weight 1/|d sigma| of each pair's loss."""
        assert isinstance(policy.dynamics, FlowDynamics)  # `workload` refuses others
        mean = gaussian.mean.detach() if pairs.old_mean is None else pairs.old_mean
        std = gaussian.std.reshape(-1)
        shift = gaussian.kl(Gaussian(mean, gaussian.std), reduction=self.config.algorithm.log_prob_reduction)
        log_ratio = guarded_log_ratio(log_prob - old, shift, std)
        sigmas = policy.dynamics.sigmas
        return log_ratio, torch.zeros_like(old), 1 / (sigmas[pairs.step] - sigmas[pairs.step + 1])


def silent_groups(value: Tensor, weight: Tensor, group: Tensor) -> Tensor:
    """(P,) bool: groups with samples to train on whose advantages are all 0. value, weight, group: (B,)."""
    groups = int(group.max()) + 1
    selected = torch.zeros(groups).index_add_(0, group, (weight > 0).float())
    signal = torch.zeros(groups).index_add_(0, group, ((value != 0) & (weight > 0)).float())
    return (signal == 0) & (selected > 0)
