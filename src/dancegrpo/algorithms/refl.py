"""Reward feedback learning (ReFL, arXiv:2304.05977): the judge's own gradient, through one late step and decoding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dancegrpo.algorithms.base import Learning, Stateless, Workload
from dancegrpo.algorithms.baseline import weighted_sum
from dancegrpo.algorithms.work import deal, work_list
from dancegrpo.config import RunConfig
from dancegrpo.distributed import ALONE, World
from dancegrpo.errors import ConfigError
from dancegrpo.noise import generator
from dancegrpo.objectives import refl_loss
from dancegrpo.policies.base import Condition, Policy
from dancegrpo.prompts import Prompt
from dancegrpo.rewards import Judges, Scores
from dancegrpo.sampling import OnBatch, states


@dataclass(frozen=True)
class LateStates:
    """B samples stopped on their way. x_t: (B, *S), those of this rank; step: (B,) int64, of all, each where its step
    with gradient begins. group: (B,) int64 into condition."""

    x_t: Tensor
    step: Tensor
    group: Tensor
    condition: Condition


class ReFL(Stateless):
    """loss_scale * relu(margin - r(decode(x0 predicted at a late step))), differentiated through all of it.

    Every trained judge must be differentiable. Published: no classifier-free guidance, 40 steps, batch 64.
    """

    def __init__(self, config: RunConfig, judges: Judges, world: World = ALONE) -> None:
        super().__init__(config, world)
        trained = judges.trained
        self.judges = Judges({n: judges.rewards[n] for n in trained}, {n: judges.weights[n] for n in trained})
        self.watching = Judges({n: judge for n, judge in judges.rewards.items() if n not in judges.trained})
        blunt = [name for name in judges.trained if not judges.rewards[name].differentiable]
        if blunt:
            named = ", ".join(f"{name} ({config.rewards[name].judge})" for name in blunt)
            raise ConfigError(
                f"algorithm.name=refl differentiates its judges, and no gradient flows from {named}: use clip, hps, "
                "pickscore, imagereward, aesthetic or (for clips) videoalign without a threshold, or another algorithm"
            )

    def workload(self, policy: Policy) -> Workload:
        """See `Algorithm.workload`: one step with gradient per sample."""
        return Workload(self.config.prompts.per_iteration * self.config.rollout.group_size, 1)

    def collect(
        self, policy: Policy, condition: Condition, iteration: int, on_batch: OnBatch | None = None
    ) -> LateStates:
        """Samples without gradient down to a random step of the last `window`; judges see the result in `learn`."""
        config, size = self.config.rollout, self.config.rollout.group_size
        late = max(1, round(policy.dynamics.num_steps * self.config.algorithm.refl.window))
        rows = [(g, s) for g in range(len(condition)) for s in range(size)]
        picked = [
            int(torch.randint(late, (), generator=generator(self.config.seed, "late", iteration, g, s)))
            for g, s in rows
        ]
        step = policy.dynamics.num_steps - 1 - torch.tensor(picked)
        key = {"seed": self.config.seed, "iteration": iteration}
        x_t = states(policy, condition, config, step, **key, world=self.world)
        group = torch.tensor([g for g, _ in rows])
        return LateStates(x_t, step.to(policy.device), group.to(policy.device), condition)

    def learn(
        self, policy: Policy, batch: LateStates, scores: Mapping[str, Scores], prompts: Sequence[Prompt]
    ) -> ReFLLearning:
        """See `Algorithm.learn`."""
        return ReFLLearning(self, policy, batch, prompts)


class ReFLLearning(Learning):
    """Late states being learnt from; the judges are asked here, once per sample, with gradient."""

    def __init__(self, algorithm: ReFL, policy: Policy, batch: LateStates, prompts: Sequence[Prompt]) -> None:
        super().__init__(algorithm.world)
        self.algorithm, self.policy, self.batch, self.prompts = algorithm, policy, batch, prompts
        count, updates = len(batch.step), algorithm.config.update.updates_per_rollout
        everyone = torch.ones(count)
        dealt = deal(torch.zeros(count, dtype=torch.int64), everyone, updates)
        self.parts = work_list(dealt, everyone > 0, 1, updates)
        self.bucket, self.owner = policy.bucket(batch.step.cpu()[:, None]), algorithm.owner
        self.first = int((self.owner == self.world.share).nonzero()[0])
        self._asked: list[tuple[Tensor, dict[str, Scores]]] = []

    def loss(self, sample: Tensor, slot: Tensor) -> Tensor:
        """See `Learning.loss`: a sample that a judge failed on adds nothing."""
        batch, policy, judges = self.batch, self.policy, self.algorithm.judges
        config = self.algorithm.config.algorithm.refl
        here = sample.to(policy.device)
        x_t, step, condition = batch.x_t[here - self.first], batch.step[here], batch.condition[batch.group[here]]
        x0 = policy.dynamics.x0(x_t, policy.predict(x_t, step, condition), step)
        media, prompts = policy.decode(x0, condition), [self.prompts[g] for g in batch.group[here].tolist()]
        told = judges.score(media, prompts)
        total, valid = weighted_sum(told, judges.weights)
        # where on both sides: NaN times a gradient of 0 is NaN.
        total = torch.where(valid, torch.where(valid, total, 0.0), math.inf)
        # A batch on which a judge failed has no graph: this one, of slope 0, keeps the backward pass whole.
        total = total + 0.0 * x0.flatten(1).sum(1)
        with torch.no_grad():
            told |= self.algorithm.watching.score(media.detach(), prompts)
        if not self.silent:
            self._asked.append((sample, {name: _detached(scores) for name, scores in told.items()}))
        return refl_loss(total, config.margin, config.loss_scale)

    def mark(self) -> dict[str, int]:
        """See `Learning.mark`."""
        return super().mark() | {"": len(self._asked)}

    def forget(self, mark: Mapping[str, int]) -> None:
        """See `Learning.forget`."""
        super().forget(mark)
        del self._asked[mark[""] :]

    def metrics(self) -> dict[str, float | None]:
        """See `Learning.metrics`; from here on `scores` are those of all samples, in their order."""
        order = torch.cat([sample for sample, _ in self._asked]).argsort()
        names = self._asked[0][1]
        own = {name: _rows(Scores.cat([told[name] for _, told in self._asked]), order) for name in names}
        self.scores = {name: scores.gathered(self.world) for name, scores in own.items()}
        return super().metrics()


def _detached(scores: Scores) -> Scores:
    extra = {name: column.detach() for name, column in scores.extra.items()}
    return Scores(scores.values.detach(), scores.valid, extra, scores.causes).to("cpu")


def _rows(scores: Scores, order: Tensor) -> Scores:
    extra = {name: column[order] for name, column in scores.extra.items()}
    return Scores(scores.values[order], scores.valid[order], extra, scores.causes)
