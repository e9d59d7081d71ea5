"""Direct preference optimization for diffusion (Diffusion-DPO, arXiv:2311.12908), online and from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dancegrpo.algorithms.base import Advantage, Learning, Workload
from dancegrpo.algorithms.baseline import GroupBaseline, silent_groups
from dancegrpo.algorithms.forward import draw_steps, forward_noise
from dancegrpo.algorithms.work import deal, work_list
from dancegrpo.objectives import dpo_loss, mean_square
from dancegrpo.policies.base import Condition, Policy
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Scores
from dancegrpo.sampling import OnBatch, Trajectory, rollout
from dancegrpo.sde import FlowDynamics

FLOW_BETA, DIFFUSION_BETA = 100.0, 5000.0


@dataclass(frozen=True)
class Preferences:
    """P pairs of final latents, winner and loser: (P, *S) each. group: (P,) int64 into `condition`."""

    winner: Tensor
    loser: Tensor
    group: Tensor
    condition: Condition
    iteration: int


class DPO(GroupBaseline):
    """Raises the likelihood of a pair's winner over the loser's, against the starting policy; no sampler in the loss.

    Online pairs are the best and the worst of each group by the judges' summed advantage; a group of ties makes none.
    """

    needs_reference = True

    @property
    def clamp(self) -> None:
        """None: samples beyond a bound would tie."""
        return None

    @property
    def offline(self) -> bool:
        """Whether pairs come from a file."""
        return self.config.offline

    def workload(self, policy: Policy) -> Workload:
        """See `Algorithm.workload`: (pair, draw) items."""
        return Workload(self.config.prompts.per_iteration, self.config.algorithm.dpo.draws)

    def collect(
        self, policy: Policy, condition: Condition, iteration: int, on_batch: OnBatch | None = None
    ) -> tuple[Trajectory | Condition, int]:
        """Samples the groups, keeping their final latents alone; offline nothing is sampled."""
        if self.offline:
            return condition, iteration
        config = self.config
        settings: Any = {"seed": config.seed, "iteration": iteration, "on_batch": on_batch, "keep": "x0"}
        settings["world"] = self.world
        return rollout(policy, condition, config.rollout, **settings), iteration

    def learn(
        self,
        policy: Policy,
        batch: tuple[Trajectory | Condition, int],
        scores: Mapping[str, Scores],
        prompts: Sequence[Prompt],
    ) -> DPOLearning:
        """See `Algorithm.learn`."""
        found, iteration = batch
        if isinstance(found, Condition):
            size = self.config.rollout.batch_size
            return DPOLearning(self, policy, recorded_pairs(policy, found, prompts, iteration, size))
        group = torch.arange(len(prompts)).repeat_interleave(self.config.rollout.group_size)
        advantage = self.advantage(scores, group, prompts)
        winner, loser = best_and_worst(advantage.value, advantage.weight, group)
        # The two of a pair may have been drawn by different ranks: everyone gets all.
        x0 = self.world.gather(found.x0) if self.world.size > 1 else found.x0
        better, worse = (x0[side.to(x0.device)].to(policy.device) for side in (winner, loser))
        pairs = Preferences(better, worse, group[winner].to(policy.device), found.condition, iteration)
        learning = DPOLearning(self, policy, pairs)
        learning.scores = scores
        chosen = torch.zeros_like(advantage.weight)
        chosen[torch.cat([winner, loser])] = 1.0
        silent = silent_groups(advantage.value, advantage.weight, group)
        learning.advantage = Advantage(advantage.value, chosen, advantage.valid, advantage.per_judge, silent)
        return learning


def best_and_worst(value: Tensor, weight: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (P,), (P,) of each group's best and worst sample of weight > 0; groups whose values are equal make none.

    value, weight, group: (B,). Among equals the lower index.
    """
    winners, losers = [], []
    for name in group.unique().tolist():
        rows = ((group == name) & (weight > 0)).nonzero()[:, 0]
        if len(rows) and value[rows].max() > value[rows].min():
            winners.append(rows[value[rows].argmax()])
            losers.append(rows[value[rows].argmin()])
    empty = torch.empty(0, dtype=torch.int64)
    return (torch.stack(winners), torch.stack(losers)) if winners else (empty, empty)


def recorded_pairs(
    policy: Policy, condition: Condition, prompts: Sequence[Prompt], iteration: int, batch_size: int
) -> Preferences:
    """The pairs that prompts of a preference file carry, as latents of the policy's own autoencoder.

    batch_size: pairs whose pictures are in memory at once, and go through the autoencoder together, side by side.
    """
    from dancegrpo.preferences import read_pair

    latents: tuple[list[Tensor], list[Tensor]] = ([], [])
    for first in range(0, len(prompts), batch_size):
        rows = slice(first, first + batch_size)
        pairs = [read_pair(prompt, policy.media_shape) for prompt in prompts[rows]]
        for side, media in zip(latents, zip(*pairs, strict=True), strict=True):
            side.append(policy.latents(torch.stack(media).to(policy.device), condition[rows]))
    winner, loser = (torch.cat(side) for side in latents)
    return Preferences(winner, loser, torch.arange(len(prompts), device=policy.device), condition, iteration)


class DPOLearning(Learning):
    """Pairs being learnt from: both of a pair at the same step with the same noise."""

    def __init__(self, algorithm: DPO, policy: Policy, pairs: Preferences) -> None:
        super().__init__(algorithm.world)
        config, count = algorithm.config, len(pairs.group)
        settings, updates = config.algorithm.dpo, config.update.updates_per_rollout
        self.policy, self.pairs, self.seed = policy, pairs, config.seed
        default = FLOW_BETA if isinstance(policy.dynamics, FlowDynamics) else DIFFUSION_BETA
        self.beta = settings.beta or default
        everyone = torch.ones(count)
        dealt = deal(torch.zeros(count, dtype=torch.int64), everyone, updates)
        self.parts = work_list(dealt, everyone > 0, settings.draws, updates)
        self.owner = self.world.owners(count, 1)
        # Keyed by the group, not by its place among those that make a pair.
        self.group, groups = pairs.group.cpu(), len(pairs.condition)
        self.step = draw_steps(policy, groups, settings.draws, seed=self.seed, iteration=pairs.iteration)[self.group]
        self.bucket = policy.bucket(self.step)

    def loss(self, sample: Tensor, slot: Tensor) -> Tensor:
        """See `Learning.loss`; notes how often the policy prefers the winner more than the start did, and how much."""
        pairs, policy = self.pairs, self.policy
        noise = forward_noise(policy, self.group[sample], slot, seed=self.seed, iteration=pairs.iteration)
        step = self.step[sample, slot].to(policy.device)
        condition = pairs.condition[pairs.group[sample.to(policy.device)]]
        sides = [latents[sample.to(policy.device)] for latents in (pairs.winner, pairs.loser)]
        winner, loser = (self._error(x0, noise, step, condition) for x0 in sides)
        with torch.no_grad(), policy.reference():
            winner_start, loser_start = (self._error(x0, noise, step, condition) for x0 in sides)
        margin = (loser - winner - (loser_start - winner_start)).detach()
        self.note(preference_accuracy=(margin > 0).double(), preference_margin=margin)
        return dpo_loss(winner, loser, winner_start, loser_start, self.beta)

    def _error(self, x0: Tensor, noise: Tensor, step: Tensor, condition: Condition) -> Tensor:
        """Mean squared error of the prediction, (N,)."""
        x_t, target = self.policy.dynamics.noised(x0, noise, step)
        return mean_square(self.policy.predict_unguided(x_t, step, condition) - target)
