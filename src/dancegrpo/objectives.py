"""Policy-gradient objectives: pure functions of log-probabilities and advantages, one value per (sample, step) row.

Means over rows, weights and steps belong to the update, which alone knows the whole rollout. The KL to a reference
policy is `sde.Gaussian.kl`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """How much likelier the action is under the policy than when it was taken: (B,), exactly 1 for equal log-probs."""
    return (log_prob - old_log_prob).exp()


def clipped_surrogate(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """The clipped loss max(-A ratio, -A clip(ratio, 1 - c, 1 + c)) (arXiv:1707.06347, eq. 7; arXiv:2505.07818).

    log_prob (with gradient), old_log_prob, advantage: (B,). clip_range: c > 0; 1e-4 for log-probs averaged over the
    latent's elements. Returns (B,). The gradient is -A ratio dlog_prob, and 0 once the ratio has left the clip range
    in the direction that the advantage asks for.
    """
    change = ratio(log_prob, old_log_prob)
    return torch.maximum(-advantage * change, -advantage * change.clamp(1 - clip_range, 1 + clip_range))


def is_clipped(log_prob: Tensor, old_log_prob: Tensor, clip_range: float) -> Tensor:
    """Whether the ratio lies outside [1 - clip_range, 1 + clip_range]: (B,) bool."""
    return (ratio(log_prob, old_log_prob) - 1).abs() > clip_range


def approx_kl(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """Estimate of KL(old || new) from the actions alone: ratio - 1 - log ratio >= 0, (B,). Low variance, unbiased."""
    log_ratio = log_prob - old_log_prob
    # expm1: at the 1e-4 scale of these ratios, exp() - 1 would be mostly rounding.
    return log_ratio.expm1() - log_ratio
