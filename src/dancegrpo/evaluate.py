"""Held-out measurement: unseen prompts, fixed noise, the deterministic sampler as it is deployed."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dancegrpo.noise import generator, normal
from dancegrpo.policies.base import Policy
from dancegrpo.prompts import Prompt, PromptSource
from dancegrpo.rewards import Judges
from dancegrpo.sampling import sample


def choose(source: PromptSource, count: int, seed: int) -> list[Prompt]:
    """`count` prompts of the source in its order, the same ones for the same seed; all when there are fewer."""
    if count >= len(source):
        return [source[index] for index in range(len(source))]
    picked = torch.randperm(len(source), generator=generator(seed, "held-out"))[:count]
    return [source[index] for index in picked.sort().values.tolist()]


@torch.no_grad()
def pictures(
    policy: Policy, prompts: Sequence[Prompt], *, seed: int, batch_size: int
) -> Iterator[tuple[list[Prompt], Tensor]]:
    """Draws each prompt once from noise keyed by (seed, its position): yields (prompts, media (B, F, 3, H, W))."""
    for first in range(0, len(prompts), batch_size):
        batch = list(prompts[first : first + batch_size])
        rows = [(first + offset,) for offset in range(len(batch))]
        noise = normal(policy.latent_shape, seed, "evaluation", rows)
        yield batch, policy.decode(sample(policy, policy.encode(batch), noise))


def evaluate(
    policy: Policy, judges: Judges, prompts: Sequence[Prompt], *, seed: int, batch_size: int
) -> dict[str, Any]:
    """Scores one picture per prompt with every judge; rows are paired across evaluations of the same prompts and seed.

    Returns {"seconds", "prompt_ids", "texts", "tasks", "columns": {name: [float]}, "valid": {judge: [bool]}}, one entry
    per prompt. Columns are the judges' values and, as "judge/extra", what they report beside them.
    """
    started = time.perf_counter()
    columns: dict[str, list[float]] = defaultdict(list)
    valid: dict[str, list[bool]] = defaultdict(list)
    for batch, media in pictures(policy, prompts, seed=seed, batch_size=batch_size):
        for name, scores in judges.score(media, batch).items():
            columns[name] += scores.values.tolist()
            valid[name] += scores.valid.tolist()
            for extra, values in scores.extra.items():
                columns[f"{name}/{extra}"] += values.tolist()
    return {
        "seconds": time.perf_counter() - started,
        "prompt_ids": [prompt.id for prompt in prompts],
        "texts": [prompt.text for prompt in prompts],
        "tasks": [prompt.metadata.get("task") for prompt in prompts],
        "columns": dict(columns),
        "valid": dict(valid),
    }
