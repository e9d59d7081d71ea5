"""A policy small enough to reason about: a two-layer network on 4-element latents, no diffusers."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from dancegrpo.algorithms import build_algorithm
from dancegrpo.config import load_config
from dancegrpo.policies import Condition, Policy
from dancegrpo.prompts import Prompt
from dancegrpo.rewards import Judges, Scores
from dancegrpo.sde import DiffusionDynamics, FlowDynamics, flow_sigmas
from dancegrpo.update import Updater


class ToyPolicy(Policy):
    """Velocity = network(x, sigma, word); a picture is its latent squashed into 3 x 2 x 2 pixels."""

    condition_id = "toy"

    def __init__(self, num_steps: int = 6, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(4 + 1 + 2, 16), nn.Tanh(), nn.Linear(16, 4))
        self.pipeline = None
        self.dynamics = FlowDynamics(flow_sigmas(num_steps, 1.5))
        self.latent_shape = (4,)
        self.device = torch.device("cpu")
        self.kept: dict[str, Tensor] | None = None
        self.override: dict[str, Tensor] = {}

    def encode(self, prompts) -> Condition:
        return Condition({"word": torch.tensor([[float(len(p.text)), float(p.id)] for p in prompts]) / 10})

    def predict(self, x_t: Tensor, step: Tensor, condition: Condition) -> Tensor:
        sigma = self.dynamics.sigmas[step][:, None]
        told = torch.cat([x_t, sigma, condition.tensors["word"]], dim=1)
        return torch.func.functional_call(self.module, self.override, told)

    def decode(self, latents: Tensor, condition: Condition) -> Tensor:
        return latents.sigmoid().repeat(1, 3).reshape(len(latents), 1, 3, 2, 2)

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def keep_reference(self) -> None:
        self.kept = {name: p.detach().clone() for name, p in self.trainable().items()}

    @contextmanager
    def use_weights(self, weights):
        held, self.override = self.override, weights
        yield
        self.override = held

    def reference(self):
        return self.use_weights(self.kept) if self.kept else nullcontext()

    def export(self, folder: Path, card=None) -> None:
        raise NotImplementedError


class ToyDiffusion(ToyPolicy):
    """The same network as the noise predictor of a diffusion model, told alpha_bar in place of sigma."""

    def __init__(self, num_steps: int = 6, seed: int = 0) -> None:
        super().__init__(num_steps, seed)
        alpha_bar = torch.linspace(0.05, 0.98, num_steps + 1)
        self.dynamics = DiffusionDynamics(torch.arange(num_steps).flip(0) * 100, alpha_bar)

    def predict(self, x_t: Tensor, step: Tensor, condition: Condition) -> Tensor:
        told = torch.cat([x_t, self.dynamics.alpha_bar[step][:, None], condition.tensors["word"]], dim=1)
        return torch.func.functional_call(self.module, self.override, told)


FAMILIES = {"flow": ToyPolicy, "diffusion": ToyDiffusion}
WORDS = [Prompt(i, "word" * (i + 1)) for i in range(3)]


class Bright:
    """A differentiable judge: the mean of a picture's values; None for those whose index in the batch is in `blind`."""

    name, differentiable, batch_size = "bright", True, None

    def __init__(self, blind: tuple[int, ...] = ()) -> None:
        self.blind = blind

    def __call__(self, media: Tensor, prompts) -> Scores:
        values = media.flatten(1).mean(1)
        return Scores(values, torch.tensor([index not in self.blind for index in range(len(values))]))

    def to(self, device) -> Bright:
        return self


def toy_config(algorithm: str, *overrides: str):
    """A run of 3 prompts x 4 samples with noise in every step, the starting noise each sample's own."""
    base = {
        "name": "toy",
        "model": {"path": "toy"},
        "prompts": {"train": "none.txt", "per_iteration": 3},
        "rewards": {"bright": {"judge": "python:bright"}},
        "algorithm": {"name": algorithm},
        "rollout": {
            "group_size": 4,
            "num_steps": 6,
            "noise_level": 0.5,
            "shared_noise": False,
            "timesteps": {"fraction": 0.8},
        },
        "optimizer": {"learning_rate": 1e-3},
        "update": {"micro_batch_size": 7},
    }
    return load_config(base, overrides)


def toy_setup(family: str, algorithm: str, *overrides: str):
    """(policy, algorithm), as the trainer makes them."""
    policy, config = FAMILIES[family](), toy_config(algorithm, *overrides)
    built = build_algorithm(config, Judges({"bright": Bright()}))
    if built.needs_reference:
        policy.keep_reference()
    return policy, built


def teach(policy, steps: int = 100) -> None:
    """Fits the policy to standard normal data, so that it samples as a trained generator does."""
    generator, condition = torch.Generator().manual_seed(0), policy.encode(WORDS)
    optimizer = torch.optim.Adam(policy.trainable().values(), lr=1e-2)
    for _ in range(steps):
        x0, noise = torch.randn(2, 128, 4, generator=generator).unbind()
        step = torch.randint(policy.dynamics.num_steps, (128,), generator=generator)
        x_t, target = policy.dynamics.noised(x0, noise, step)
        told = condition[torch.randint(len(WORDS), (128,), generator=generator)]
        optimizer.zero_grad()
        (policy.predict(x_t, step, told) - target).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()


def toy_learning(algorithm, policy, iteration: int = 0, judge=None, prompts=WORDS):
    """One batch of the algorithm as the trainer forms it: (what was collected, learning)."""
    scored, size = [], algorithm.config.rollout.group_size
    drawn = [prompt for prompt in prompts for _ in range(size)]
    with torch.no_grad():
        condition = policy.encode(prompts)
        batch = algorithm.collect(policy, condition, iteration, lambda x0, told: scored.append(policy.decode(x0, told)))
        scores = Judges({"bright": judge or Bright()}).score(torch.cat(scored), drawn) if scored else {}
    return batch, algorithm.learn(policy, batch, scores, prompts)


def items(samples: int, slots: int) -> tuple[Tensor, Tensor]:
    """Every (sample, slot)."""
    return torch.arange(samples).repeat_interleave(slots), torch.arange(slots).repeat(samples)


def nudge(policy, size: float, seed: int = 5) -> None:
    """Moves every weight a little: the policy is no longer the one that sampled."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def normal_log_prob(policy, trajectory, sample: Tensor, slot: Tensor) -> Tensor:
    """Mean log-density of the transitions taken, by torch.distributions: (N,)."""
    x_t, step = trajectory.x_t[sample, slot], trajectory.step[sample, slot]
    prediction = policy.predict(x_t, step, trajectory.condition[trajectory.group[sample]])
    gaussian = policy.dynamics.transition(x_t, prediction, step, trajectory.noise_level[sample, slot])
    normal = torch.distributions.Normal(gaussian.mean, gaussian.std.reshape(-1, 1))
    return normal.log_prob(trajectory.x_next[sample, slot]).mean(1)


def gradients(policy, learning, part: int = 0, micro_batch_size: int = 7) -> dict[str, Tensor]:
    """Of one part's loss, as the updater accumulates them."""
    updater = Updater(policy, toy_config("grpo", f"update.micro_batch_size={micro_batch_size}"))
    updater.accumulate(learning.parts[part], learning)
    return {name: p.grad.clone() for name, p in policy.trainable().items()}
