"""A policy small enough to reason about: a two-layer network on 4-element latents, no diffusers."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from dancegrpo.policies import Condition, Policy
from dancegrpo.sde import FlowDynamics, flow_sigmas


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
