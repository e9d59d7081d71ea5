"""What the policy gradients share: a rollout of Gaussian transitions, ratios of their probability, the clip range."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dancegrpo.algorithms.base import Advantage, Learning, Stateless, Workload
from dancegrpo.algorithms.work import Part, work_list
from dancegrpo.errors import ModelError
from dancegrpo.objectives import approx_kl, is_clipped, ratio
from dancegrpo.policies.base import Condition, Policy
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Scores
from dancegrpo.sampling import Keep, OnBatch, Trajectory, fetch, rollout, trained_steps
from dancegrpo.sde import Gaussian

REPLAY_LIMIT = 0.05
"""Largest believable |log-prob of the training forward - log-prob of the rollout|, per latent element. Rounding stays
under 1e-3 even in bfloat16; a schedule that is off by one step is past 1."""


@dataclass(frozen=True)
class Pairs:
    """One micro-batch of N (sample, step) pairs; rows may sit at different steps.

    x_t, x_next: (N, *S). step: (N,) int64. noise_level, old_log_prob, advantage: (N,). condition: length N.
    old_log_prob is None before the first optimizer step of a rollout, where the ratio is 1 by definition; old_mean
    (N, *S), the mean that x_next was drawn around, likewise, and where no algorithm asked for it.
    """

    x_t: Tensor
    x_next: Tensor
    step: Tensor
    noise_level: Tensor
    advantage: Tensor
    condition: Condition
    old_log_prob: Tensor | None
    old_mean: Tensor | None = None


def gather(trajectory: Trajectory, advantage: Advantage, sample: Tensor, slot: Tensor, old: Tensor | None) -> Pairs:
    """The rows (sample, slot) of a trajectory as one micro-batch; old: (B, K) log-probs, None on-policy.

    sample: places in this trajectory. advantage: of the samples of all ranks.
    """
    device = trajectory.log_prob.device
    x_t, x_next = (fetch(latents, sample, slot, device) for latents in (trajectory.x_t, trajectory.x_next))
    means = trajectory.mean if old is not None else None
    mean = None if means is None else fetch(means, sample, slot, device)
    sample, slot, value = sample.to(device), slot.to(device), advantage.value.to(device)
    return Pairs(
        x_t=x_t,
        x_next=x_next,
        step=trajectory.step[sample, slot],
        noise_level=trajectory.noise_level[sample, slot],
        advantage=value[sample + trajectory.first],
        condition=trajectory.condition[trajectory.group[sample]],
        old_log_prob=None if old is None else old[sample, slot],
        old_mean=mean,
    )


def transition(policy: Policy, pairs: Pairs) -> Gaussian:
    """The distribution of the next latents under the current policy, by the training forward."""
    prediction = policy.predict(pairs.x_t, pairs.step, pairs.condition)
    return policy.dynamics.transition(pairs.x_t, prediction, pairs.step, pairs.noise_level)


class PolicyGradient(Stateless):
    """Base of the algorithms that weigh the transitions taken by what came of them."""

    keep: Keep = "transitions"

    def workload(self, policy: Policy) -> Workload:
        """See `Algorithm.workload`: (sample, step) pairs."""
        config = self.config
        samples = config.prompts.per_iteration * (config.advantage.keep or config.rollout.group_size)
        return Workload(samples, trained_steps(config.rollout, policy.dynamics))

    def collect(
        self,
        policy: Policy,
        condition: Condition,
        iteration: int,
        on_batch: OnBatch | None = None,
    ) -> Trajectory:
        """Samples group_size outputs per prompt."""
        config = self.config
        return rollout(
            policy,
            condition,
            config.rollout,
            seed=config.seed,
            iteration=iteration,
            reduction=config.algorithm.log_prob_reduction,
            on_batch=on_batch,
            keep=self.keep,
            world=self.world,
        )

    @abstractmethod
    def advantage(self, scores: Mapping[str, Scores], group: Tensor, prompts: Sequence[Prompt] = ()) -> Advantage:
        """Judges' scores -> advantage and weight of each sample. group: (B,) int64 into prompts."""

    @abstractmethod
    def objective(self, policy: Policy, pairs: Pairs, learning: PolicyGradientLearning) -> Tensor:
        """Loss (N,) of the pairs; notes `log_prob` and `ratio`, (N,) each."""

    @abstractmethod
    def deal(self, advantage: Advantage, group: Tensor) -> Tensor:
        """Which of the rollout's updates each sample belongs to: (B,) int64, -1 = none."""

    @property
    def everywhere(self) -> bool:
        """Whether samples without advantage have a gradient too: a distance to the start has one."""
        return self.needs_reference

    def log_prob(self, policy: Policy, pairs: Pairs) -> Tensor:
        """(N,) log-probability of the transitions taken, under the current policy, by the training forward."""
        return transition(policy, pairs).log_prob(pairs.x_next, reduction=self.config.algorithm.log_prob_reduction)

    def learn(
        self, policy: Policy, batch: Trajectory, scores: Mapping[str, Scores], prompts: Sequence[Prompt]
    ) -> PolicyGradientLearning:
        """See `Algorithm.learn`."""
        group = torch.arange(len(prompts)).repeat_interleave(self.config.rollout.group_size)
        learning = self.learning(policy, batch, self.advantage(scores, group, prompts))
        learning.scores = scores
        return learning

    def learning(self, policy: Policy, trajectory: Trajectory, advantage: Advantage) -> PolicyGradientLearning:
        """A rollout with known advantages (of all ranks' samples), ready to learn from."""
        return PolicyGradientLearning(self, policy, trajectory, advantage)


class PolicyGradientLearning(Learning):
    """A rollout being learnt from; knows when the policy has moved away from the one that sampled.

    On-policy the old log-prob is the new one, so the first ratio is exactly 1. For later updates of the same rollout
    it is the rollout's, or a recomputed one where the two forwards round too differently for the clip range.
    """

    def __init__(self, algorithm: PolicyGradient, policy: Policy, trajectory: Trajectory, advantage: Advantage) -> None:
        super().__init__(algorithm.world)
        config = algorithm.config
        self.algorithm, self.policy, self.trajectory = algorithm, policy, trajectory
        self.advantage, self._advantage = advantage, advantage
        active = (advantage.value != 0) | algorithm.everywhere
        step = self.world.gather(trajectory.step)
        group = torch.arange(len(step)) // (len(step) // len(trajectory.condition))
        dealt = algorithm.deal(advantage, group)
        self.parts: list[Part] = work_list(dealt, active, step.shape[1], config.update.updates_per_rollout)
        self.bucket, self.owner = policy.bucket(step), self.world.owners(len(step), config.rollout.batch_size)
        self.old_log_prob, self.moved = trajectory.log_prob, False

    def loss(self, sample: Tensor, slot: Tensor) -> Tensor:
        """See `Learning.loss`; notes the rollout/trainer difference while the policy has not moved."""
        trajectory, known = self.trajectory, len(self._told["log_prob"])
        here = sample - trajectory.first
        pairs = gather(trajectory, self._advantage, here, slot, self.old_log_prob if self.moved else None)
        loss = self.algorithm.objective(self.policy, pairs, self)
        if not self.moved and not self.silent:
            (log_prob,), (first,) = self._told["log_prob"][known:], self._told["ratio"][known:]
            self.note(first=first, replay=(log_prob - trajectory.log_prob[here, slot]).abs())
        return loss

    def note_ratio(self, log_prob: Tensor, old_log_prob: Tensor) -> None:
        """Notes what the policy's move did to (N,) ratios."""
        taken, clip_range = log_prob.detach(), self.algorithm.config.algorithm.clip_range
        self.note(
            ratio=ratio(taken, old_log_prob),
            approx_kl=approx_kl(taken, old_log_prob),
            clipped=is_clipped(taken, old_log_prob, clip_range).float(),
        )

    def before_step(self, index: int) -> None:
        """Before the first step: checks that training replays the rollout; recomputes where rounding would mislead.

        Raises ModelError if the training forward does not reproduce the rollout's log-probs.
        """
        if self.moved:
            return
        config = self.algorithm.config
        own = self._told["replay"]
        largest = self.world.largest(float(torch.cat(own).max()) if own else 0.0)  # the same on all ranks
        elements = 1 if config.algorithm.log_prob_reduction == "mean" else math.prod(self.policy.latent_shape)
        if not largest / elements <= REPLAY_LIMIT:
            raise ModelError(
                f"the training forward misses the rollout's log-probs by {largest:.3g} (at most {REPLAY_LIMIT} is "
                "rounding): the schedule or dropout differs between sampling and training, or weights are not finite"
            )
        if largest > config.algorithm.clip_range / 10 and index + 1 < len(self.parts):
            # Rounding would eat the trust interval: take old log-probs from the forward that will be compared.
            self.old_log_prob = self._recompute(self.parts[index + 1 :])

    def after_step(self, *, moved: bool) -> None:
        """See `Learning.after_step`."""
        self.moved = self.moved or moved

    @torch.no_grad()
    def _recompute(self, parts: list[Part]) -> Tensor:
        log_prob, size = self.trajectory.log_prob.clone(), self.algorithm.config.update.micro_batch_size
        for part in parts:
            for batch in self.micro_batches(part, size):
                here = batch.sample - self.trajectory.first
                pairs = gather(self.trajectory, self._advantage, here, batch.slot, None)
                with self.policy.company(None if batch.counts else batch.bucket):
                    recomputed = self.algorithm.log_prob(self.policy, pairs)
                if batch.counts:
                    log_prob[here, batch.slot] = recomputed
        return log_prob

    def metrics(self) -> dict[str, float | None]:
        """Ratio, clipping, KL and the rollout/trainer difference; None where nothing was trained."""
        told = {name: values for name, values in self.noted().items() if len(values)}
        names = {"ratio_mean": "ratio", "ratio_first": "first", "clip_fraction": "clipped"}
        names |= {name: name for name in ("approx_kl", "kl", *sorted(told.keys() - _KNOWN))}
        means = {f"train/{name}": float(told[key].mean()) if key in told else None for name, key in names.items()}
        return means | {
            "train/ratio_max_deviation": float((told["ratio"] - 1).abs().max()) if "ratio" in told else None,
            "train/replay_difference": float(told["replay"].max()) if "replay" in told else None,
        }


_KNOWN = {"ratio", "first", "clipped", "approx_kl", "kl", "replay", "log_prob"}
