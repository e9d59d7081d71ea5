"""The phases of an iteration, each run once by the run's own code: on pretended tensors to be counted, on real ones to
be timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dancegrpo.algorithms import DPO, DPOK, NFT, Advantage, Learning, Part, ReFL
from dancegrpo.algorithms.dpo import DPOLearning, Preferences
from dancegrpo.algorithms.nft import NFTLearning
from dancegrpo.algorithms.refl import LateStates, ReFLLearning
from dancegrpo.config import RunConfig
from dancegrpo.distributed import ALONE
from dancegrpo.doctor.layout import ONE, Layout
from dancegrpo.policies import Condition
from dancegrpo.policies.pipeline import PipelinePolicy
from dancegrpo.prompts import Prompt
from dancegrpo.sampling import StepPlan, Trajectory, _Kept, _transition, step_plan
from dancegrpo.update import Updater

Make = Callable[..., Tensor]
"""Makes a float32 tensor of a shape: `make(2, 3)`."""


@dataclass
class Iteration:
    """What one iteration needs, of pretended or of real tensors. make: latents and noise."""

    config: RunConfig
    policy: PipelinePolicy
    algorithm: Any
    updater: Updater
    make: Make
    layout: Layout = ONE
    plan: StepPlan = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        if config.offline:
            empty = torch.empty(0, 0, dtype=torch.int64)
            self.plan = StepPlan(empty, torch.empty(0, config.rollout.num_steps))
        else:
            per_iteration, seed = config.prompts.per_iteration, config.seed
            self.plan = step_plan(config.rollout, self.policy.dynamics, per_iteration, seed, 0)
            if isinstance(self.algorithm, (DPO, NFT, ReFL)):
                self.plan = StepPlan(self.plan.trained[:, :0], self.plan.noise_level)

    @property
    def total(self) -> int:
        """Samples of an iteration, of all GPUs."""
        return 0 if self.config.offline else self.config.prompts.per_iteration * self.config.rollout.group_size

    @property
    def samples(self) -> int:
        """The most samples that one GPU has."""
        return self.layout.samples(self.total, self.config.rollout.batch_size)

    @property
    def batch(self) -> int:
        """Samples that are drawn together."""
        return min(self.config.rollout.batch_size, self.samples)

    # --- Encode -------------------------------------------------------------------------------------------------------

    def encode(self, prompt: Prompt) -> Condition:
        """One prompt's condition."""
        return self.policy.encode([prompt])

    def conditions(self, one: Condition) -> Condition:
        """The conditions of an iteration's prompts, as large as one prompt's."""
        return one[[0] * self.config.prompts.per_iteration]

    # --- Rollout ------------------------------------------------------------------------------------------------------

    @property
    def means(self) -> bool:
        """Whether the means of transitions are kept beside the latents."""
        return getattr(self.algorithm, "keep", "") == "means"

    @property
    def transition_bytes(self) -> int:
        """What one GPU keeps of its trained transitions: latents before and after, and their means."""
        latent = 4 * torch.Size(self.policy.latent_shape).numel()
        return (3 if self.means else 2) * self.samples * self.plan.trained.shape[1] * latent

    def kept(self, rows: int) -> _Kept:
        """What a rollout keeps of the trained transitions of its first `rows` samples."""
        kept = _Kept.__new__(_Kept)
        kept.plan, kept.device, kept.reduction = self.plan, self.policy.device, "mean"
        kept.mine = ALONE.rows(rows, self.config.rollout.batch_size)
        places = (rows, self.plan.trained.shape[1])
        shape = (*places, *self.policy.latent_shape)
        kept.log_prob = self.make(*places)
        kept.x_t, kept.x_next = self.make(*shape), self.make(*shape)
        kept.mean = self.make(*shape) if self.means else None
        return kept

    @torch.no_grad()
    def steps(self, condition: Condition, kept: _Kept, steps: list[int], noise: Tensor | None = None) -> Tensor:
        """Some transitions of one batch, from `noise` (N, *S) where it is given; returns its latents (N, *S)."""
        rows = torch.arange(self.batch)
        told = condition[rows // self.config.rollout.group_size]
        noise = self.make(len(rows), *self.policy.latent_shape) if noise is None else noise
        x = self.policy.start(noise, told)
        for step in steps:
            gaussian = _transition(self.policy, x, step, told, self.plan.noise_level[rows, step])
            noisy = bool((self.plan.noise_level[rows, step] > 0).any())
            following = gaussian.sample(self.make(*x.shape)) if noisy else gaussian.mean
            kept.record(rows, step, x, following, gaussian)
            x = following
        return x

    @torch.no_grad()
    def decode(self, x0: Tensor, condition: Condition) -> Tensor:
        """One batch's media (N, F, 3, H, W)."""
        told = condition[torch.arange(len(x0)) // self.config.rollout.group_size]
        return self.policy.decode(x0, told)

    # --- Update -------------------------------------------------------------------------------------------------------

    def learning(self, condition: Condition, kept: _Kept | None, x0: Tensor | None) -> Learning:
        """A rollout of which every sample is valid and has a signal, ready to learn from."""
        config, algorithm, policy = self.config, self.algorithm, self.policy
        if config.offline or x0 is None:
            pairs = self._pairs(condition)
            return DPOLearning(algorithm, policy, pairs)
        group = torch.arange(config.prompts.per_iteration).repeat_interleave(config.rollout.group_size)
        if isinstance(algorithm, DPO):
            return DPOLearning(algorithm, policy, self._pairs(condition))
        if isinstance(algorithm, ReFL):
            late = torch.full((len(group),), policy.dynamics.num_steps - 1)
            prompts = [Prompt(0, "a picture")] * len(condition)
            return ReFLLearning(algorithm, policy, LateStates(x0, late, group, condition), prompts)
        assert kept is not None
        level = self.plan.noise_level.gather(1, self.plan.trained)
        known = torch.zeros(self.plan.trained.shape)
        trajectory = Trajectory(kept.x_t, kept.x_next, self.plan.trained, level, known, x0, group, condition, kept.mean)
        advantage = self._advantage(group)
        if isinstance(algorithm, NFT):
            return NFTLearning(algorithm, policy, trajectory, advantage, 0)
        if isinstance(algorithm, DPOK):
            algorithm._value_network(policy, condition)
            return super(DPOK, algorithm).learning(policy, trajectory, advantage)
        return algorithm.learning(policy, trajectory, advantage)

    def _pairs(self, condition: Condition) -> Preferences:
        prompts = self.config.prompts.per_iteration
        winner, loser = (self.make(prompts, *self.policy.latent_shape) for _ in range(2))
        return Preferences(winner, loser, torch.arange(prompts), condition, 0)

    def _advantage(self, group: Tensor) -> Advantage:
        keep, size = self.config.advantage.keep, self.config.rollout.group_size
        weight = (torch.arange(len(group)) % size < (keep or size)).float()
        silent = torch.zeros(self.config.prompts.per_iteration, dtype=torch.bool)
        return Advantage(weight.clone(), weight, torch.ones(len(group), dtype=torch.bool), {}, silent)

    def micro_batches(self, learning: Learning, part: Part, size: int) -> list[tuple[Tensor, Tensor, float]]:
        """(sample, slot, scale) of every micro-batch of an optimizer step."""
        return [(batch.sample, batch.slot, part.scale) for batch in learning.micro_batches(part, size)]

    def backward(self, learning: Learning, micro_batch: tuple[Tensor, Tensor, float]) -> None:
        """One micro-batch's forward and backward pass."""
        self.updater._backward(learning, *micro_batch)


def start_optimizer(updater: Updater, make: Callable[[Tensor], Tensor]) -> None:
    """The state that AdamW has from its first step on: two moments of each weight's size, and a count."""
    for parameter in updater.parameters.values():
        updater.optimizer.state[parameter] = {
            "step": torch.zeros(()),
            "exp_avg": make(parameter),
            "exp_avg_sq": make(parameter),
        }


def resident(iteration: Iteration, extra: list[nn.Module]) -> Iterator[Tensor]:
    """Every tensor that is there before an iteration begins: weights, optimizer's state, averages, judges."""
    policy, updater = iteration.policy, iteration.updater
    networks = [*policy._networks().values(), *policy._references.values(), *extra]
    for network in networks:
        yield from network.parameters()
        yield from network.buffers()
    for state in updater.optimizer.state.values():
        yield from state.values()
    yield from (updater.ema or {}).values()
    yield from updater._landmarks.values()
    yield from (getattr(iteration.algorithm, "old", None) or {}).values()


@contextmanager
def timed(into: list[float], device: torch.device) -> Iterator[None]:
    """Adds the seconds of the block to a list, the device's queue drained."""

    def drain() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    drain()
    started = time.perf_counter()
    yield
    drain()
    into.append(time.perf_counter() - started)
