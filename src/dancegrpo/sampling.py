"""Sampling groups: shared starting noise, the step plan, and the `Trajectory` that training needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Literal, assert_never

import torch
from torch import Tensor

from dancegrpo.distributed import ALONE, Share, World
from dancegrpo.errors import ConfigError
from dancegrpo.noise import generator, normal
from dancegrpo.policies.base import Condition, Dynamics, Policy
from dancegrpo.sde import Gaussian, Reduction
from dancegrpo.settings import RolloutConfig

Keep = Literal["transitions", "means", "x0"]
OnBatch = Callable[[Tensor, Condition], None]
"""What takes a rollout's final latents (N, *S), with their N conditions, as they come."""


@dataclass(frozen=True)
class StepPlan:
    """Decided before the rollout: which K transitions of each sample are trained, and how noisy each of the T is.

    trained: (B, K) int64, ascending. noise_level: (B, T) float32, 0 = the deterministic step.
    """

    trained: Tensor
    noise_level: Tensor


@dataclass(frozen=True)
class Trajectory:
    """What training keeps of a rollout. B samples, K trained transitions each, latent shape S.

    x_t, x_next: (B, K, *S) latents before and after the trained transitions, in the host's memory with
    `rollout.store=host`; all else is on the policy's device. step: (B, K) int64. noise_level, log_prob: (B, K) float32.
    x0: (B, *S) final latents. group: (B,) int64 into `condition`. condition: one row per prompt, not per sample.
    mean: (B, K, *S) means of the transitions, beside x_next, where they were asked for. first: of a rollout that
    several ranks share, the place of this one's first sample in the whole.
    """

    x_t: Tensor
    x_next: Tensor
    step: Tensor
    noise_level: Tensor
    log_prob: Tensor
    x0: Tensor
    group: Tensor
    condition: Condition
    mean: Tensor | None = None
    first: int = 0

    def __len__(self) -> int:
        return len(self.group)


def trained_steps(config: RolloutConfig, dynamics: Dynamics, iteration: int = 0) -> list[int] | int:
    """The transitions that `config.timesteps` names: a list where samples share it, a count where each draws its own.

    The last transition is not among them (its noise does not reach a flow's reward; arXiv:2505.07818, section 4) but
    with `include_last`. Raises ConfigError for that on a flow, and where a step that every sample shares has no noise.
    """
    candidates, chosen = _candidates(config, dynamics), config.timesteps
    match chosen.select:
        case "list":
            steps = sorted(set(chosen.steps))
        case "window":
            first = min(iteration // chosen.slide_every * chosen.stride, len(candidates) - chosen.window)
            steps = list(candidates[first : first + chosen.window])
        case "random":
            return int(len(candidates) * chosen.fraction)
        case "first" | "last":
            count = int(len(candidates) * chosen.fraction)
            steps = list(candidates[:count] if chosen.select == "first" else candidates[len(candidates) - count :])
        case _:
            assert_never(chosen.select)
    # A window gets to all of them: better refused now than hours into a run.
    reached = candidates if chosen.select == "window" else steps
    silent = [step for step in reached if config.noise_levels()[step] == 0]
    if silent:
        raise ConfigError(
            f"rollout.noise_level is 0 at trained steps {silent}: a deterministic step has no probability, "
            "give it noise or leave it out of rollout.timesteps"
        )
    return steps


def _candidates(config: RolloutConfig, dynamics: Dynamics) -> range:
    if not config.timesteps.include_last:
        return dynamics.trainable_steps
    if not dynamics.last_step_trainable:
        raise ConfigError(
            "rollout.timesteps.include_last=true: this model's last step is decoded as its mean, its noise reaches no "
            "judge; set it to false"
        )
    return range(dynamics.num_steps)


def step_plan(config: RolloutConfig, dynamics: Dynamics, num_prompts: int, seed: int, iteration: int) -> StepPlan:
    """The plan for num_prompts x group_size samples; a sample's subset is keyed by (seed, iteration, group, sample)."""
    batch, levels = num_prompts * config.group_size, torch.tensor(config.noise_levels())
    if not levels.any():  # the deterministic sampler: nothing that it does has a probability to train
        return StepPlan(torch.empty(batch, 0, dtype=torch.int64), levels.expand(batch, -1))
    chosen = trained_steps(config, dynamics, iteration)
    if isinstance(chosen, int):
        noisy = torch.tensor([step for step in _candidates(config, dynamics) if levels[step] > 0], dtype=torch.int64)
        if len(noisy) < chosen:
            raise ConfigError(
                f"rollout.noise_level leaves {len(noisy)} stochastic steps, rollout.timesteps.fraction="
                f"{config.timesteps.fraction} asks for {chosen}: raise one or lower the other"
            )
        rows = [
            noisy[torch.randperm(len(noisy), generator=generator(seed, "steps", iteration, g, s))[:chosen]]
            .sort()
            .values
            for g in range(num_prompts)
            for s in range(config.group_size)
        ]
        trained = torch.stack(rows)
    else:
        trained = torch.tensor(chosen, dtype=torch.int64).expand(batch, -1).contiguous()
    noise_level = levels.expand(batch, -1).clone()
    if config.timesteps.stochastic == "trained":
        noise_level = torch.zeros_like(noise_level).scatter_(1, trained, noise_level.gather(1, trained))
    if not dynamics.last_step_trainable:
        # A flow's last transition is its x0 prediction: noise there would be in the picture, yet never be trained.
        noise_level[:, -1] = 0.0
    return StepPlan(trained, noise_level)


def starting_noise(
    config: RolloutConfig, shape: tuple[int, ...], num_prompts: int, seed: int, iteration: int
) -> Tensor:
    """(num_prompts * group_size, *shape) float32: one draw per group when `shared_noise`, else one per sample."""
    if config.shared_noise:
        noise = normal(shape, seed, "start", [(iteration, g) for g in range(num_prompts)])
        return noise.repeat_interleave(config.group_size, dim=0)
    rows = [(iteration, g, s) for g in range(num_prompts) for s in range(config.group_size)]
    return normal(shape, seed, "start", rows)


@torch.no_grad()
def rollout(
    policy: Policy,
    condition: Condition,
    config: RolloutConfig,
    *,
    seed: int = 0,
    iteration: int = 0,
    reduction: Reduction = "mean",
    on_batch: OnBatch | None = None,
    keep: Keep = "transitions",
    world: World = ALONE,
) -> Trajectory:
    """Samples group_size outputs for each of the P prompts of `condition` with the policy's stochastic sampler.

    Groups are contiguous: sample i belongs to group i // group_size. Noise is keyed by (seed, iteration, group, sample,
    step), so the result does not depend on `config.batch_size` beyond rounding. `sde` and `shift` are the policy's own,
    fixed by `load_policy`; another `num_steps` than its raises ConfigError. reduction: of the log-probability over
    the latent's elements, `mean` or `sum`. on_batch: called with the final latents (N, *S) and the conditions of each
    batch as it is done, in the order of samples. keep: what is recorded of the trained transitions; `x0` = nothing
    of them (K = 0), `means` = their means too. world: whose share of the samples is drawn.
    """
    num_prompts, size = len(condition), config.group_size
    if config.num_steps != policy.dynamics.num_steps:
        raise ConfigError(
            f"rollout.num_steps={config.num_steps} differs from the policy's {policy.dynamics.num_steps}: "
            "load the policy with the same rollout settings"
        )
    plan = step_plan(config, policy.dynamics, num_prompts, seed, iteration)
    if keep == "x0":
        plan = StepPlan(plan.trained[:, :0], plan.noise_level)
    start = starting_noise(config, policy.latent_shape, num_prompts, seed, iteration)
    group = torch.arange(num_prompts).repeat_interleave(size)
    noise_of = partial(_step_noise, plan, policy.latent_shape, size=size, seed=seed, iteration=iteration)
    mine, device = world.rows(len(group), config.batch_size), policy.device
    kept = _Kept(plan, mine, policy.latent_shape, config.store, device, reduction, means=keep == "means")
    x0 = torch.empty(len(mine.rows), *policy.latent_shape, device=device)
    for rows in mine.batches():
        told = condition[group[rows].to(device)]
        x = _draw(policy, start[rows].to(device), told, plan, rows, noise_of, kept)
        x0[mine.places(rows).to(device)] = x
        if on_batch is not None:
            on_batch(x, told)
    for rows in mine.spares():
        _draw(policy, start[rows].to(device), condition[group[rows].to(device)], plan, rows, noise_of)
    kept.settle()
    own = plan.trained[mine.slice]
    return Trajectory(
        x_t=kept.x_t,
        x_next=kept.x_next,
        step=own.to(device),
        noise_level=plan.noise_level[mine.slice].gather(1, own).to(device),
        log_prob=kept.log_prob,
        x0=x0,
        group=group[mine.slice].to(device),
        condition=condition,
        mean=kept.mean,
        first=mine.rows.start,
    )


@torch.no_grad()
def states(
    policy: Policy,
    condition: Condition,
    config: RolloutConfig,
    at: Tensor,
    *,
    seed: int,
    iteration: int,
    world: World = ALONE,
) -> Tensor:
    """Latents (B, *S) of P x group_size samples, each right before its own step `at` (B,) int64; as `rollout` draws.

    Nothing is drawn past the latest of those steps. Groups are contiguous; condition: of P prompts. Of `world`, only
    this process's share of the samples is drawn and returned.
    """
    num_prompts, size = len(condition), config.group_size
    start = starting_noise(config, policy.latent_shape, num_prompts, seed, iteration)
    plan = step_plan(config, policy.dynamics, num_prompts, seed, iteration)
    mine, last = world.rows(len(at), config.batch_size), int(at.max())
    found = torch.empty(len(mine.rows), *policy.latent_shape, device=policy.device)
    for rows, wanted in chain(((rows, True) for rows in mine.batches()), ((rows, False) for rows in mine.spares())):
        told = condition[(rows // size).to(policy.device)]
        x = policy.start(start[rows].to(policy.device), told)
        # Ranks that make their forward passes together all go to the latest step of the whole rollout.
        stop = last if world.size > 1 else int(at[rows].max())
        for step in range(stop + 1):
            here = rows[at[rows] == step]
            if wanted:
                found[mine.places(here).to(policy.device)] = x[(here - rows[0]).to(policy.device)]
            if step == stop:
                break
            key = {"size": size, "step": step, "seed": seed, "iteration": iteration}
            noise = _step_noise(plan, policy.latent_shape, rows=rows, **key)
            gaussian = _transition(policy, x, step, told, plan.noise_level[rows, step])
            x = gaussian.mean if noise is None else gaussian.sample(noise.to(x.device))
    return found


def _draw(
    policy: Policy,
    x: Tensor,
    told: Condition,
    plan: StepPlan,
    rows: Tensor,
    noise_of: Callable[..., Tensor | None],
    kept: _Kept | None = None,
) -> Tensor:
    """The samples `rows` of a rollout, (N, *S), from their starting noise x; recorded in `kept`."""
    # A function of its own: what the last step leaves behind is freed before the latents are decoded.
    x = policy.start(x, told)
    for step in range(policy.dynamics.num_steps):
        gaussian = _transition(policy, x, step, told, plan.noise_level[rows, step])
        noise = noise_of(rows=rows, step=step)
        following = gaussian.mean if noise is None else gaussian.sample(noise.to(x.device))
        if kept is not None:
            kept.record(rows, step, x, following, gaussian)
        x = following
    return x


class _Kept:
    """What is kept of the trained transitions while they are drawn; latents on the device or in the host's memory."""

    def __init__(
        self,
        plan: StepPlan,
        mine: Share,
        shape: tuple[int, ...],
        store: str,
        device: torch.device,
        reduction: Reduction,
        *,
        means: bool,
    ) -> None:
        self.plan, self.mine, self.device, self.reduction = plan, mine, device, reduction
        places = (len(mine.rows), plan.trained.shape[1])
        self.log_prob = torch.empty(places, device=device)
        # Pinned pages go to and from the accelerator without a detour; where host and device are one there are none.
        place = (
            {"device": device} if store == "device" or device.type == "cpu" else {"pin_memory": device.type == "cuda"}
        )
        self.x_t, self.x_next = (torch.empty(*places, *shape, **place) for _ in range(2))
        self.mean = torch.empty(*places, *shape, **place) if means else None

    def record(self, rows: Tensor, step: int, x: Tensor, following: Tensor, gaussian: Gaussian) -> None:
        """Keeps the transition x -> following, both (N, *S), of those samples of `rows` (N,) that train this step."""
        local, slot = (self.plan.trained[rows] == step).nonzero(as_tuple=True)
        if not len(local):
            return
        at, local = self.mine.places(rows[local]), local.to(self.device)
        put(self.x_t, at, slot, x[local])
        put(self.x_next, at, slot, following[local])
        if self.mean is not None:
            put(self.mean, at, slot, gaussian.mean[local])
        taken = Gaussian(gaussian.mean[local], gaussian.std[local])
        put(self.log_prob, at, slot, taken.log_prob(following[local], reduction=self.reduction))

    def settle(self) -> None:
        """Waits for copies to the host that are still under way."""
        if self.x_t.device != self.log_prob.device:
            torch.accelerator.synchronize(self.device)


def put(store: Tensor, sample: Tensor, slot: Tensor, values: Tensor) -> None:
    """store[sample, slot] = values, (N, *S) into a store (B, K, *S) wherever it lies; sample, slot: (N,) int64."""
    if store.device == values.device:
        store[sample.to(store.device), slot.to(store.device)] = values
        return
    for row, value in zip(_rows(store, sample, slot), values, strict=True):
        row.copy_(value, non_blocking=store.is_pinned())


def fetch(store: Tensor, sample: Tensor, slot: Tensor, device: torch.device) -> Tensor:
    """store[sample, slot] on `device`: (N, *S) of a store (B, K, *S) wherever it lies; sample, slot: (N,) int64."""
    if store.device == device:
        return store[sample.to(device), slot.to(device)]
    fetched = torch.empty(len(sample), *store.shape[2:], dtype=store.dtype, device=device)
    for target, row in zip(fetched, _rows(store, sample, slot), strict=True):
        target.copy_(row, non_blocking=store.is_pinned())
    return fetched


def _rows(store: Tensor, sample: Tensor, slot: Tensor) -> list[Tensor]:
    # Views: an index over pinned memory would first gather a second copy, which is not pinned.
    return [store[s, k] for s, k in zip(sample.tolist(), slot.tolist(), strict=True)]


@torch.no_grad()
def sample(policy: Policy, condition: Condition, noise: Tensor) -> Tensor:
    """The deterministic deployment sampler: starting noise (B, *S), condition of length B -> final latents (B, *S)."""
    x = policy.start(noise.to(policy.device), condition)
    silent = torch.zeros(len(x))
    for step in range(policy.dynamics.num_steps):
        x = _transition(policy, x, step, condition, silent).mean
    return x


def _transition(policy: Policy, x: Tensor, step: int, condition: Condition, noise_level: Tensor) -> Gaussian:
    rows = torch.full((len(x),), step, dtype=torch.int64, device=x.device)
    prediction = policy.predict(x, rows, condition)
    return policy.dynamics.transition(x, prediction, rows, noise_level.to(x.device))


def _step_noise(
    plan: StepPlan, shape: tuple[int, ...], *, rows: Tensor, size: int, step: int, seed: int, iteration: int
) -> Tensor | None:
    """Keyed noise of this step for the rows; None where every row takes the deterministic step."""
    if not bool((plan.noise_level[rows, step] > 0).any()):
        return None
    return normal(shape, seed, "step", [(iteration, row // size, row % size, step) for row in rows.tolist()])
