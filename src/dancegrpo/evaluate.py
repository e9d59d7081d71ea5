"""Held-out measurement: unseen prompts, fixed noise, the deterministic sampler as it is deployed."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dancegrpo.config import RunConfig
from dancegrpo.distributed import ALONE, World
from dancegrpo.noise import generator, normal
from dancegrpo.policies.base import Condition, Policy
from dancegrpo.prompts import Prompt, open_prompts
from dancegrpo.rewards import Judges, Scores
from dancegrpo.run_folder import RunFolder
from dancegrpo.sampling import sample
from dancegrpo.statistics import main_column, summarize

Encode = Callable[[Sequence[Prompt]], Condition]


def held_out(config: RunConfig) -> list[Prompt]:
    """The held-out prompts of a run: the same ones for the same settings, in the source's order; [] without any."""
    if not config.prompts.evaluation:
        return []
    source = open_prompts(config.prompts.evaluation, **config.prompts.reading())
    count = config.evaluation.num_prompts or config.evaluation.samples
    if count >= len(source):
        return list(source)
    picked = torch.randperm(len(source), generator=generator(config.evaluation.seed, "held-out"))[:count]
    return [source[index] for index in picked.sort().values.tolist()]


@torch.no_grad()
def pictures(
    policy: Policy,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    batch_size: int,
    encode: Encode | None = None,
    start: int = 0,
) -> Iterator[tuple[list[Prompt], Tensor]]:
    """Draws each prompt once from noise keyed by (seed, its position): yields (prompts, media (B, F, 3, H, W)).

    encode: in place of `policy.encode`, a cached one. start: the first prompt's position.
    """
    for first in range(0, len(prompts), batch_size):
        batch = list(prompts[first : first + batch_size])
        places = [(start + first + offset,) for offset in range(len(batch))]
        noise = normal(policy.latent_shape, seed, "evaluation", places)
        condition = (encode or policy.encode)(batch)
        yield batch, policy.decode(sample(policy, condition, noise), condition)


@torch.no_grad()
def evaluate(
    policy: Policy,
    judges: Judges,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    batch_size: int,
    encode: Encode | None = None,
    world: World = ALONE,
) -> dict[str, Any]:
    """Scores one picture per prompt with every judge; rows are paired across evaluations of equal "sampling".

    Returns {"seconds", "sampling", "prompt_ids", "texts", "tasks", "columns": {name: [float | None]},
    "valid": {judge: [bool]}}, one entry per prompt; None where a score is not valid. Columns are the judges' values
    and, as "judge/extra", what they report beside them.
    """
    started = time.perf_counter()
    parts: dict[str, list[Scores]] = defaultdict(list)
    mine = world.rows(len(prompts), batch_size)
    how: Any = {"seed": seed, "batch_size": batch_size, "encode": encode}
    batches = -(-len(mine.rows) // batch_size)
    most = int(world.largest(batches))  # asked before: later, ranks with fewer would wait for those that wait for them
    for batch, media in pictures(policy, prompts[mine.slice], start=mine.rows.start, **how):
        for name, scores in judges.score(media, batch).items():
            parts[name].append(scores.to("cpu"))
    for rows in mine.spares():
        for _ in pictures(policy, [prompts[row] for row in rows.tolist()], **how):
            pass
    for _ in range(most - batches):
        judges.accompany()
    verdicts = {name: Scores.cat(parts[name]).gathered(world) for name in judges.rewards}
    columns: dict[str, list[float | None]] = {}
    for name, scores in verdicts.items():
        for column, values in {name: scores.values, **{f"{name}/{e}": v for e, v in scores.extra.items()}}.items():
            pairs = zip(values.tolist(), scores.valid.tolist(), strict=True)
            columns[column] = [value if known and math.isfinite(value) else None for value, known in pairs]
    return {
        "seconds": time.perf_counter() - started,
        "sampling": {"seed": seed, "steps": policy.dynamics.num_steps, "latent_shape": list(policy.latent_shape)},
        "prompt_ids": [prompt.id for prompt in prompts],
        "texts": [prompt.text for prompt in prompts],
        "tasks": [prompt.metadata.get("task") for prompt in prompts],
        "columns": columns,
        "valid": {name: scores.valid.tolist() for name, scores in verdicts.items()},
    }


def best_iteration(run: RunFolder, config: RunConfig, among: Iterable[int]) -> int | None:
    """Of these iterations the one after which the run measured the best mean, the earliest of equals; None without any.

    By the column that stands for the run in its report. What is measured before the first iteration does not count:
    there is no checkpoint of it.
    """
    means: dict[int, dict[str, float | None]] = {}
    for iteration in sorted(among):
        with contextlib.suppress(OSError, ValueError, KeyError):  # not measured
            record = json.loads(run.evaluation_file(iteration).read_text(encoding="utf-8"))
            means[iteration] = summarize(record).means
    trained = [name for name, reward in config.rewards.items() if reward.weight]
    column = main_column(next(iter(means.values()), {}), trained)
    known = {iteration: mean for iteration, held in means.items() if (mean := held.get(column or "")) is not None}
    return max(known, key=lambda iteration: known[iteration], default=None)
