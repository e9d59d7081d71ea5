"""Group Relative Policy Optimization on a stochastic sampler (DanceGRPO, arXiv:2505.07818)."""

from __future__ import annotations

import torch
from torch import Tensor

from dancegrpo.algorithms.base import Workload
from dancegrpo.algorithms.baseline import GroupBaseline
from dancegrpo.algorithms.policy_gradient import Pairs, PolicyGradient, PolicyGradientLearning, transition
from dancegrpo.config import RunConfig
from dancegrpo.distributed import ALONE, World
from dancegrpo.errors import ConfigError
from dancegrpo.objectives import clipped_surrogate, guarded_log_ratio
from dancegrpo.policies.base import Policy
from dancegrpo.sde import FlowDynamics, Gaussian


class GRPO(GroupBaseline, PolicyGradient):
    """The paper's algorithm: group-relative advantages, the clipped surrogate, optionally a KL to the start."""

    def __init__(self, config: RunConfig, world: World = ALONE) -> None:
        super().__init__(config, world)
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
        learning.note_ratio(log_prob, old)
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
