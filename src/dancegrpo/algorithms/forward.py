"""Learning on the forward process: final latents noised again to steps of the deployed schedule."""

from __future__ import annotations

import torch
from torch import Tensor

from dancegrpo.noise import generator, normal
from dancegrpo.policies.base import Policy
from dancegrpo.sde import FlowDynamics


def draw_steps(policy: Policy, owners: int, draws: int, *, seed: int, iteration: int) -> Tensor:
    """(owners, draws) int64: the steps at which each owner (a group, a sample) is learnt from.

    Of the deployed schedule, for the network is asked nowhere else: uniform for diffusion; for rectified flow the step
    nearest to a logit-normal draw of sigma (arXiv:2403.03206, section 3.1).
    """
    dynamics, shape = policy.dynamics, (draws,)
    rows = []
    for owner in range(owners):
        random = generator(seed, "forward-step", iteration, owner)
        if isinstance(dynamics, FlowDynamics):
            drawn = torch.randn(shape, generator=random).sigmoid()
            rows.append((drawn[:, None] - dynamics.sigmas[:-1].cpu()[None]).abs().argmin(1))
        else:
            rows.append(torch.randint(dynamics.num_steps, shape, generator=random))
    return torch.stack(rows)


def forward_noise(policy: Policy, owner: Tensor, draw: Tensor, *, seed: int, iteration: int) -> Tensor:
    """(N, *S) float32 noise of each (owner, draw), both (N,) int64, on the policy's device."""
    rows = [(iteration, o, d) for o, d in zip(owner.tolist(), draw.tolist(), strict=True)]
    return normal(policy.latent_shape, seed, "forward", rows).to(policy.device)
