"""Objectives: pure functions, one value per row of a batch.

Means over rows, weights and steps belong to the update, which alone knows the whole rollout. The KL to a reference
policy is `sde.Gaussian.kl`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


def guarded_log_ratio(log_ratio: Tensor, shift: Tensor, std: Tensor) -> Tensor:
    """GRPO-Guard's log ratio, (log_ratio + shift) * std: (B,) (arXiv:2510.22319).

    log_ratio: log-prob minus old log-prob. shift: mean((mean - mean_old)^2) / (2 std^2), what moving the mean costs on
    average: with it the log ratio is centred, times std its spread is the same at every step. std: of the transition.
    """
    return (log_ratio + shift) * std


def reward_weighted(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, weight: float, clip_range: float
) -> Tensor:
    """DPOK's loss -w A clip(ratio, 1 - c, 1 + c), with no pessimistic maximum: (B,) (arXiv:2305.16381, algorithm 1).

    advantage: reward minus value, (B,). The gradient is 0 wherever the ratio has left the clip range, on either side.
    """
    return -weight * advantage * ratio(log_prob, old_log_prob).clamp(1 - clip_range, 1 + clip_range)


def mean_square(difference: Tensor) -> Tensor:
    """(B, *S) -> (B,): mean of the squares over all non-batch axes."""
    return difference.square().flatten(1).mean(1)


def dpo_loss(winner: Tensor, loser: Tensor, winner_start: Tensor, loser_start: Tensor, beta: float) -> Tensor:
    """Diffusion-DPO: -log sigmoid(-beta/2 ((e_w - e_l) - (e_w_start - e_l_start))), (B,) (arXiv:2311.12908, eq. 14).

    e: mean squared error of the prediction of the same noise at the same step, of the preferred (winner) and the other
    (loser) sample, by the policy and by the starting policy.
    """
    margin = (winner - loser) - (winner_start - loser_start)
    return -F.logsigmoid(-beta / 2 * margin)


def refl_loss(reward: Tensor, margin: float, scale: float) -> Tensor:
    """ReFL's loss scale * relu(margin - reward), (B,) (arXiv:2304.05977, eq. 5). reward: with gradient."""
    return scale * (margin - reward).relu()


def optimality(advantage: Tensor, bound: float) -> Tensor:
    """DiffusionNFT's r = clip(A / bound, -1, 1) / 2 + 1/2 in [0, 1], (B,): how much a sample counts as positive."""
    return (advantage / bound).clamp(-1, 1) / 2 + 0.5


def nft_loss(positive: Tensor, negative: Tensor, x0: Tensor, optimality: Tensor, beta: float) -> Tensor:
    """DiffusionNFT: (r |x0+ - x0|^2 / w+ + (1 - r) |x0- - x0|^2 / w-) / beta, (B,) (arXiv:2509.16117).

    positive, negative: (B, *S), data predicted by the implicit policies v+ = v_old + beta (v - v_old) and
    v- = v_old - beta (v - v_old). x0: what was sampled. w: each one's own mean absolute error, without gradient.
    """

    def error(prediction: Tensor) -> Tensor:
        difference = prediction - x0
        scale = difference.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
        return mean_square(difference) / scale

    return (optimality * error(positive) + (1 - optimality) * error(negative)) / beta
