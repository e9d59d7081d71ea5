"""What each process of `test_context` does: a denoiser's forward and backward pass, whole and split, of many kinds."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from dancegrpo.distributed import World, started
from dancegrpo.noise import normal
from dancegrpo.policies import Condition, Policy, load_policy
from dancegrpo.prompts import Prompt
from dancegrpo.settings import ModelConfig, ParallelConfig, RolloutConfig
from dancegrpo.sharding import whole

TEXTS = ("a", "two blue squares above a green one")


def prepared(case: dict[str, Any]) -> tuple[Policy, Condition]:
    """A policy that has moved a little, and prompts of different length."""
    policy = load_policy(ModelConfig(**case), RolloutConfig(num_steps=4), seed=0)
    with torch.no_grad():
        for name, p in policy.trainable().items():  # adapters begin as 0, and then half of them have no gradient
            p.add_(0.05 * normal(tuple(p.shape), 0, name, [(0,)])[0])
    image = Image.merge("RGB", [Image.linear_gradient("L").resize((32, 32))] * 3) if policy.takes_image else None
    return policy, policy.encode([Prompt(i, text, "blurry", image) for i, text in enumerate(TEXTS)])


def passes(policy: Policy, condition: Condition, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """The prediction at noisy latents, a loss's gradient for all weights, and what this rank has of it by itself."""
    step = torch.zeros(len(condition), dtype=torch.int64)
    x_t = normal(policy.latent_shape, 0, "context", [(row,) for row in range(len(condition))])
    prediction = policy.predict(x_t, step, condition)
    (prediction - 1).square().mean().backward()
    parameters = list(policy.trainable().values())
    own = gradient(parameters)
    world.sum_gradients(parameters)
    found = gradient(parameters)
    for p in parameters:
        p.grad = None
    return prediction.detach(), found, own


def gradient(parameters: list[torch.nn.Parameter]) -> Tensor:
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else whole(p.grad).flatten() for p in parameters])


def compare(case: dict[str, Any], world: World) -> dict[str, float]:
    """Largest differences between the whole and the split denoiser, each relative to the largest of what it is of."""
    policy, condition = prepared(case)
    dense, expected, _ = passes(policy, condition, World())
    policy.shard(world)
    split, found, own = passes(policy, condition, world)
    gaps = {"prediction": (dense, split), "gradient": (expected, found), "own": (expected, own)}
    return {name: float((a - b).abs().max() / a.abs().max()) for name, (a, b) in gaps.items()}


def main() -> None:
    file = Path(sys.argv[1])
    asked, told = json.loads(file.read_text()), {}
    with started(ParallelConfig(context=2)) as world:
        both = replace(world, fsdp=2, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "fsdp")))
        for name, case in asked.items():
            told[name] = {"context": compare(case, world), "both": compare(case, both)}
        if world.main:
            file.with_suffix(".told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
