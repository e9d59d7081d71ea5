"""The algorithm's side of the contract: which batch to collect, which loss on it, what state it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from dancegrpo.policies.base import Condition, Policy
from dancegrpo.rewards.base import Scores
from dancegrpo.sampling import OnBatch, Trajectory


@dataclass(frozen=True)
class Advantage:
    """What the scores of a rollout say of its B samples.

    value: (B,) float32, summed over judges. weight: (B,), 1 = in the loss's denominator, 0 = masked or left out by
    best-of-N. valid: (B,) bool, False where a trained judge failed. per_judge: each judge's own normalised advantage
    (none where raw scores were summed). silent: (P,) bool, groups with samples to train on
    whose advantages are all 0.
    """

    value: Tensor
    weight: Tensor
    valid: Tensor
    per_judge: Mapping[str, Tensor]
    silent: Tensor


@dataclass(frozen=True)
class Pairs:
    """One micro-batch of N (sample, step) pairs; rows may sit at different steps.

    x_t, x_next: (N, *S). step: (N,) int64. noise_level, old_log_prob, advantage: (N,). condition: length N.
    old_log_prob is None before the first optimizer step of a rollout, where the ratio is 1 by definition.
    """

    x_t: Tensor
    x_next: Tensor
    step: Tensor
    noise_level: Tensor
    advantage: Tensor
    condition: Condition
    old_log_prob: Tensor | None


class Algorithm(Protocol):
    """What varies between policy-gradient algorithms on one rollout."""

    needs_reference: bool
    """Whether `loss` reads the starting policy's predictions."""

    def collect(
        self,
        policy: Policy,
        condition: Condition,
        iteration: int,
        on_batch: OnBatch | None = None,
    ) -> Trajectory:
        """One rollout of `condition`'s prompts. on_batch: given latents and conditions as they come."""

    def advantage(self, scores: Mapping[str, Scores], group: Tensor) -> Advantage:
        """Judges' scores -> advantage and weight of each sample."""

    def log_prob(self, policy: Policy, pairs: Pairs) -> Tensor:
        """(N,) log-probability of the transitions taken, under the current policy, by the training forward."""

    def loss(self, policy: Policy, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        """Per-pair loss (N,) and per-pair statistics (N,), `log_prob` and `ratio` among them."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on: JSON-able."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
