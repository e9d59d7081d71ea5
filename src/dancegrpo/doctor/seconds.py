"""Seconds of each phase: timed on the machine where the networks are small, else operations over the speed reached."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dancegrpo.algorithms import ReFL, build_algorithm
from dancegrpo.config import RunConfig
from dancegrpo.doctor.calibrate import Speed
from dancegrpo.doctor.phases import Iteration, start_optimizer, timed
from dancegrpo.doctor.predict import Prediction
from dancegrpo.health import Looks, use_threads
from dancegrpo.policies import Condition, load_policy
from dancegrpo.prompts import Prompt, open_prompts
from dancegrpo.rewards import CATALOG, Judges, Scores, load_reward
from dancegrpo.update import Updater

SMALL = 50_000_000
"""Parameters up to which a pipeline is loaded and timed: overhead decides there, not operations."""
_ASKED = ("encode", "rollout", "decode", "score", "update")


@dataclass(frozen=True)
class Seconds:
    """By phase of an iteration; None where nothing is known. measured: whether the networks themselves were timed."""

    phases: dict[str, float | None]
    measured: bool

    @property
    def iteration(self) -> float | None:
        """All that is known of an iteration; None where nothing is."""
        known = [value for name in _ASKED if (value := self.phases.get(name)) is not None]
        return sum(known) if known else None


def by_operations(prediction: Prediction, speed: Speed, load_rate: float) -> Seconds:
    """Operations over speed. load_rate: bytes per second at which weights come from the disk."""
    phases: dict[str, float | None] = {phase: speed.seconds(prediction.flops(phase)) for phase in _ASKED}
    phases["load"] = prediction.peak["load"] / load_rate
    phases["save"] = prediction.checkpoint_bytes / speed.disk
    return Seconds(phases, measured=False)


def is_small(prediction: Prediction) -> bool:
    """Whether the pipeline itself can be timed in seconds."""
    return sum(prediction.parameters.values()) <= SMALL


def by_trial(config: RunConfig, prediction: Prediction, disk: float, budget: float) -> Seconds:
    """Repetitions of each phase on the real networks for about `budget` seconds, scaled by how often each comes.

    disk: bytes per second at which a checkpoint is written.
    """
    use_threads(config.threads)
    loading: list[float] = []
    with timed(loading, torch.device("cpu")):
        policy: Any = load_policy(config.model, config.rollout, seed=config.seed)
    prompts = open_prompts(config.prompts.train, **config.prompts.reading())
    judges = {
        name: load_reward(name, reward)
        for name, reward in config.rewards.items()
        if reward.judge in CATALOG and not CATALOG[reward.judge].weights and not CATALOG[reward.judge].placing
    }
    panel = Judges(judges, {name: config.rewards[name].weight for name in judges}).to(policy.device)
    iteration = _real_iteration(config, policy, panel)
    spent = _repeated(iteration, panel, prompts, budget)
    layout, work = prediction.layout, prediction.work
    batches = layout.samples(iteration.total, config.rollout.batch_size) / max(1, iteration.batch)
    updates = config.update.updates_per_rollout
    told: dict[str, float | None] = {
        "encode": spent["encode"] * work["encode"].times,
        # The pictures are watched within the rollout's clock.
        "rollout": (spent["rollout"] + spent["watch"]) * batches / layout.context,
        "decode": spent["decode"] * batches,
        "score": spent["score"] * batches,
        "update": spent["update"] * work["update"].times * spent["signal"] / layout.context + spent["step"] * updates,
    }
    return Seconds(told | {"load": loading[0], "save": prediction.checkpoint_bytes / disk}, measured=True)


def _real_iteration(config: RunConfig, policy: Any, panel: Judges) -> Iteration:
    algorithm: Any = build_algorithm(config, panel)
    if algorithm.needs_reference:
        policy.keep_reference()
    if config.algorithm.name == "nft":
        algorithm._follow(policy)
    updater = Updater(policy, config)
    start_optimizer(updater, torch.zeros_like)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=policy.device)

    return Iteration(config, policy, algorithm, updater, make)


def _repeated(iteration: Iteration, panel: Judges, prompts: Any, budget: float) -> dict[str, float]:
    """Mean seconds of one repetition of what an iteration is made of; 0 for what this algorithm does not do.

    And as `signal` the share of groups whose samples were judged differently: the others are not learnt from. A first
    repetition, which chooses kernels and fills caches, counts only where there is no time for another.
    """
    spent: dict[str, list[float]] = {name: [] for name in _PARTS}
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(iteration.config.seed)).tolist()
    groups = max(1, iteration.batch // iteration.config.rollout.group_size)
    started = time.perf_counter()
    for done in range(1, _REPETITIONS + 1):
        asked = [prompts[order[(done * groups + i) % len(order)]] for i in range(groups)]
        _once(iteration, panel, asked, spent)
        if (time.perf_counter() - started) * (done + 1) / done > budget:
            break
        if done == 1:
            spent = {name: [] for name in spent if name != "signal"} | {"signal": spent["signal"]}
    means = {name: sum(values) / len(values) if values else 0.0 for name, values in spent.items()}
    return means | ({} if spent["signal"] else {"signal": 1.0})


_PARTS = ("encode", "rollout", "decode", "score", "watch", "update", "step", "signal")
_REPETITIONS = 20


def _once(iteration: Iteration, panel: Judges, prompts: list[Prompt], spent: dict[str, list[float]]) -> None:
    """The prompts of one batch, the batch and one micro-batch through everything, and an optimizer step."""
    config, device = iteration.config, iteration.policy.device
    encoded = []
    for prompt in prompts:
        with timed(spent["encode"], device):
            encoded.append(iteration.encode(prompt))
    condition = Condition.cat(encoded)[[i % len(prompts) for i in range(config.prompts.per_iteration)]]
    kept = None if config.offline else iteration.kept(iteration.samples)
    x0: Tensor | None = None
    if kept is not None:
        _sample(iteration, panel, prompts, condition, kept, spent)
        x0 = iteration.make(iteration.samples, *iteration.policy.latent_shape)
    learning = iteration.learning(condition, kept, x0)
    size = config.update.micro_batch_size
    batches = [batch for part in learning.parts for batch in iteration.micro_batches(learning, part, size)]
    with timed(spent["update"], device):
        iteration.backward(learning, max(batches, key=lambda batch: len(batch[0])))
    with timed(spent["step"], device):
        iteration.updater._step()


def _sample(
    iteration: Iteration,
    panel: Judges,
    prompts: list[Prompt],
    condition: Condition,
    kept: Any,
    spent: dict[str, list[float]],
) -> None:
    """One batch drawn, decoded, judged and watched."""
    config, device, group = iteration.config, iteration.policy.device, iteration.config.rollout.group_size
    drawn = iteration.make(iteration.batch, *iteration.policy.latent_shape)
    rows = torch.arange(iteration.batch, device=device)
    with timed(spent["rollout"], device):
        noise = drawn[rows // group] if config.rollout.shared_noise else drawn
        x = iteration.steps(condition, kept, list(range(config.rollout.num_steps)), noise)
    if isinstance(iteration.algorithm, ReFL):
        return
    with timed(spent["decode"], device):
        media = iteration.decode(x, condition).clamp(0, 1)
    asked = [prompts[i // group % len(prompts)] for i in range(len(media))]
    with timed(spent["score"], device), torch.no_grad():
        scores = panel.score(media, asked)
    if config.health.watch != "none":
        with timed(spent["watch"], device):
            Looks().add(media)
    # Only where a group is its own baseline, and nothing else pulls at its samples, is one without signal left out.
    grouped = config.algorithm.name == "grpo" and config.advantage.normalization == "group"
    if grouped and not iteration.algorithm.needs_reference and len(media) >= group and panel.trained:
        spent["signal"].append(_signal(scores, panel.trained, group, config.advantage.min_spread))


def _signal(scores: Mapping[str, Scores], trained: Sequence[str], group: int, least: float) -> float:
    """The share of whole groups in which a trained judge's scores differ by more than `least`."""
    told = [scores[name].values[: len(scores[name].values) // group * group].view(-1, group) for name in trained]
    return float(torch.stack([values.amax(1) - values.amin(1) > least for values in told]).any(0).float().mean())


def run_seconds(config: RunConfig, seconds: Seconds, prediction: Prediction) -> float | None:
    """Of the whole run: loading, iterations, checkpoints, held-out evaluations."""
    each = seconds.iteration
    if each is None:
        return None
    told, every = seconds.phases, config.checkpoint.every
    saves = (config.iterations // every if every else 0) + (1 if not every or config.iterations % every else 0)
    evaluations = 0
    if config.evaluation.num_prompts:
        between = config.evaluation.every
        evaluations = 2 + (max(0, config.iterations - 1) // between if between else 0)
    samples = 0 if config.offline else config.prompts.per_iteration * config.rollout.group_size
    drawing = sum(told.get(name) or 0.0 for name in ("rollout", "decode", "score"))
    evaluating = drawing / samples * config.evaluation.num_prompts if samples else 0.0
    fixed = (told.get("load") or 0.0) + saves * (told.get("save") or 0.0)
    return fixed + config.iterations * each + evaluations * evaluating
