"""DiffusionNFT (arXiv:2509.16117): contrasts good and bad samples on the forward process; any sampler will do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dancegrpo.algorithms.base import Advantage, Learning, Workload
from dancegrpo.algorithms.baseline import GroupBaseline
from dancegrpo.algorithms.forward import draw_steps, forward_noise
from dancegrpo.algorithms.work import work_list
from dancegrpo.config import RunConfig
from dancegrpo.distributed import ALONE, World
from dancegrpo.objectives import nft_loss, optimality
from dancegrpo.policies.base import Condition, Policy
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Scores
from dancegrpo.sampling import OnBatch, Trajectory, rollout
from dancegrpo.sharding import laid_out

_DEFAULT_BOUND = 5.0


class NFT(GroupBaseline):
    """Learns the velocity towards samples of high advantage and away from those of low.

    `old` is the sampling policy, an exponential moving average of the trained one: it draws the rollouts, and the
    implicit positive and negative policies lean from it to either side.
    """

    def __init__(self, config: RunConfig, world: World = ALONE) -> None:
        super().__init__(config, world)
        self.old: dict[str, Tensor] | None = None
        self.followed: int | None = None
        """The iteration for which `old` was last moved: drawn again after an interruption, it is not moved twice."""

    def workload(self, policy: Policy) -> Workload:
        """See `Algorithm.workload`: (sample, draw) items."""
        samples = self.config.prompts.per_iteration * (self.config.advantage.keep or self.config.rollout.group_size)
        return Workload(samples, self.config.algorithm.nft.draws)

    def collect(
        self, policy: Policy, condition: Condition, iteration: int, on_batch: OnBatch | None = None
    ) -> tuple[Trajectory, int]:
        """Samples groups from `old`, keeping their final latents alone."""
        self._follow(policy, iteration)
        config = self.config
        settings: Any = {"seed": config.seed, "iteration": iteration, "on_batch": on_batch, "keep": "x0"}
        settings["world"] = self.world
        with self.sampling_policy(policy):
            return rollout(policy, condition, config.rollout, **settings), iteration

    @torch.no_grad()
    def _follow(self, policy: Policy, iteration: int) -> None:
        """old <- decay old + (1 - decay) current, once per rollout."""
        if self.followed == iteration and self.old is not None:
            return
        self.followed = iteration
        current = {name: p.detach() for name, p in policy.trainable().items()}
        if self.old is None:
            self.old = {name: weight.clone() for name, weight in current.items()}
            return
        self.old = {
            name: laid_out(self.old[name], weight) for name, weight in current.items()
        }  # loaded: whole, on the CPU
        decay = self.config.algorithm.nft.old_decay
        torch._foreach_lerp_(list(self.old.values()), list(current.values()), 1.0 - decay)

    @contextmanager
    def sampling_policy(self, policy: Policy) -> Iterator[None]:
        """Within it, the policy predicts with `old`."""
        assert self.old is not None
        with policy.use_weights(self.old):
            yield

    def learn(
        self, policy: Policy, batch: tuple[Trajectory, int], scores: Mapping[str, Scores], prompts: Sequence[Prompt]
    ) -> NFTLearning:
        """See `Algorithm.learn`."""
        trajectory, iteration = batch
        group = torch.arange(len(prompts)).repeat_interleave(self.config.rollout.group_size)
        learning = NFTLearning(self, policy, trajectory, self.advantage(scores, group, prompts), iteration)
        learning.scores = scores
        return learning

    def state_dict(self) -> dict[str, Any]:
        """For which iteration the sampling policy was last moved."""
        return {"followed": self.followed}

    def tensors(self) -> dict[str, Tensor]:
        """The sampling policy's weights."""
        return dict(self.old or {})

    def load_state_dict(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restores both; runs of earlier versions have no `followed`."""
        self.old = {name: weight.clone() for name, weight in tensors.items()} or None
        self.followed = state.get("followed")


class NFTLearning(Learning):
    """Final latents being learnt from, each at `draws` noised states."""

    def __init__(
        self, algorithm: NFT, policy: Policy, trajectory: Trajectory, advantage: Advantage, iteration: int
    ) -> None:
        super().__init__(algorithm.world)
        config = algorithm.config
        settings, updates = config.algorithm.nft, config.update.updates_per_rollout
        self.algorithm, self.policy, self.trajectory, self.iteration = algorithm, policy, trajectory, iteration
        self.advantage = advantage
        self.optimality = optimality(advantage.value, config.advantage.clamp or _DEFAULT_BOUND)
        # A sample of no advantage is half positive, half negative: it has a gradient, unlike in GRPO.
        total = len(advantage.value)
        dealt = algorithm.deal(advantage, torch.arange(total) // (total // len(trajectory.condition)))
        self.parts = work_list(dealt, torch.ones_like(advantage.valid), settings.draws, updates)
        draws: Any = {"seed": config.seed, "iteration": iteration}
        self.step = draw_steps(policy, total, settings.draws, **draws)
        self.bucket, self.owner = policy.bucket(self.step), algorithm.owner

    def loss(self, sample: Tensor, slot: Tensor) -> Tensor:
        """See `Learning.loss`."""
        policy, config = self.policy, self.algorithm.config
        here = (sample - self.trajectory.first).to(policy.device)
        x0, step = self.trajectory.x0[here], self.step[sample, slot].to(policy.device)
        condition = self.trajectory.condition[self.trajectory.group[here]]
        noise = forward_noise(policy, sample, slot, seed=config.seed, iteration=self.iteration)
        x_t, _ = policy.dynamics.noised(x0, noise, step)
        with torch.no_grad(), self.algorithm.sampling_policy(policy):
            old = policy.predict_unguided(x_t, step, condition)
        lean = config.algorithm.nft.beta * (policy.predict_unguided(x_t, step, condition) - old)
        positive, negative = (policy.dynamics.x0(x_t, old + sign * lean, step) for sign in (1, -1))
        self.note(old_distance=lean.square().flatten(1).mean(1))
        weight = self.optimality[sample].to(policy.device)
        return nft_loss(positive, negative, x0, weight, config.algorithm.nft.beta)
