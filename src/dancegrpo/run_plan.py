"""What follows from a run's settings: samples, items, micro-batches, and advice where settings are known to hurt."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dancegrpo.algorithms import Algorithm
from dancegrpo.config import RunConfig
from dancegrpo.policies import Policy

_ITEMS = {"dpo": "(pair, draw) items", "nft": "(sample, draw) items", "refl": "late steps"}
"""What an update consists of, where it is not (sample, step) pairs."""


@dataclass(frozen=True)
class RunPlan:
    """The derived numbers of a run."""

    config: RunConfig
    policy: Policy
    algorithm: Algorithm

    def derived(self) -> dict[str, int]:
        """Samples, pairs and micro-batches, by name."""
        config, work = self.config, self.algorithm.workload(self.policy)
        pairs = work.samples * work.steps_per_sample // config.update.updates_per_rollout
        return {
            "samples_per_iteration": 0 if config.offline else config.prompts.per_iteration * config.rollout.group_size,
            "trained_samples_per_iteration": work.samples,
            "trained_steps_per_sample": work.steps_per_sample,
            "pairs_per_update": pairs,
            "micro_batches_per_update": self._micro_batches()[0],
            "updates": config.iterations * config.update.updates_per_rollout,
            "trainable_parameters": sum(p.numel() for p in self.policy.trainable().values()),
        }

    def _micro_batches(self) -> tuple[int, bool]:
        """Of one update: how many, and whether exactly so many; steps drawn from several buckets need more."""
        config, policy, work = self.config, self.policy, self.algorithm.workload(self.policy)
        samples, size = work.samples // config.update.updates_per_rollout, config.update.micro_batch_size
        if isinstance(work.steps, int):
            last = config.algorithm.name in _ITEMS or config.rollout.timesteps.include_last
            buckets = policy.bucket(torch.arange(policy.dynamics.num_steps - (not last)))
            return -(-samples * work.steps // size), len(buckets.unique()) == 1
        counts = policy.bucket(torch.tensor(work.steps)).unique(return_counts=True)[1].tolist()
        return sum(-(-samples * count // size) for count in counts), True

    def text(self) -> str:
        """The derived numbers in one line, and advice where the settings are known to hurt."""
        config, d = self.config, self.derived()
        prompts, size, updates = (
            config.prompts.per_iteration,
            config.rollout.group_size,
            config.update.updates_per_rollout,
        )
        bound = "" if self._micro_batches()[1] else "at least "
        drawn = f"{prompts} pairs of a file" if config.offline else f"{prompts} prompts x {size} samples"
        total = "" if config.offline else f" = {d['samples_per_iteration']}"
        trained = (
            f"; {d['trained_steps_per_sample']} of {config.rollout.num_steps} steps trained"
            if config.algorithm.name not in _ITEMS
            else ""
        )
        items = _ITEMS.get(config.algorithm.name, "pairs")
        lines = [
            f"{drawn}{total} per iteration{trained}; {updates} update(s) per "
            f"rollout of {d['pairs_per_update']} {items} in {bound}{d['micro_batches_per_update']} micro-batches; "
            f"{d['trainable_parameters']:,} trainable parameters"
        ]
        if size < 8 and config.algorithm.name in ("grpo", "nft"):
            lines.append(f"warning: rollout.group_size={size} makes noisy baselines; 8 or more is advised")
        if self.policy.guided and updates > 1:
            advice = "can be unstable with classifier-free guidance; 1 is advised"
            lines.append(f"warning: update.updates_per_rollout={updates} {advice}")
        return "\n".join(lines)
