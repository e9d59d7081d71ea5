"""The algorithm's side of the contract: which batch to collect, which loss on it, what state it keeps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dancegrpo.algorithms.work import Part
from dancegrpo.config import RunConfig
from dancegrpo.distributed import ALONE, World
from dancegrpo.policies.base import Condition, Policy
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Scores
from dancegrpo.sampling import OnBatch


@dataclass(frozen=True)
class Advantage:
    """What the scores of a rollout say of its B samples.

    value: (B,) float32, summed over judges. weight: (B,), 1 = in the loss's denominator, 0 = masked or left out by
    best-of-N. valid: (B,) bool, False where a trained judge failed. per_judge: each judge's own normalised advantage
    (none where raw scores were summed). silent: (P,) bool, groups with samples to train on
    whose advantages are all 0.
    """

    value: Tensor
    weight: Tensor
    valid: Tensor
    per_judge: Mapping[str, Tensor]
    silent: Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Items that make one forward pass: sample, slot (N,) int64.

    counts: False where they are gone through to keep other ranks company. last: the last of their bucket.
    """

    sample: Tensor
    slot: Tensor
    bucket: int
    counts: bool = True
    last: bool = False


class Learning:
    """One scored batch, ready to learn from: what the updater asks, and what it tells.

    parts: one per optimizer step, the same on all ranks. bucket: (B, K) int64, which items may share a forward pass.
    owner: (B,) int64, the share (`World.share`) that has each sample. advantage: what the scores were turned into, None
    where an algorithm has no such thing. scores: the judges' verdicts on the samples, all ranks' together.
    """

    parts: Sequence[Part]
    bucket: Tensor
    owner: Tensor
    advantage: Advantage | None = None
    scores: Mapping[str, Scores]

    def __init__(self, world: World) -> None:
        self.world, self.scores = world, {}
        self.silent = False
        """Whether nothing is noted, as of items that are gone through for another rank's sake."""
        self._told: dict[str, list[Tensor]] = defaultdict(list)

    def loss(self, sample: Tensor, slot: Tensor) -> Tensor:
        """Loss (N,) of the items (sample, slot), both (N,) int64 and held here, with gradient; notes its statistics."""
        raise NotImplementedError

    def micro_batches(self, part: Part, size: int) -> Iterator[MicroBatch]:
        """This rank's items in runs of at most `size` of one bucket.

        Ranks that make their forward passes together make equally many of each bucket, in the same order: those with
        fewer items repeat one, which does not count.
        """
        world, of_item = self.world, self.bucket[part.sample, part.slot]
        for name in of_item.unique().tolist():
            held = self.owner[part.sample[of_item == name]]
            chosen = (of_item == name) & (self.owner[part.sample] == world.share)
            batches = list(zip(part.sample[chosen].split(size), part.slot[chosen].split(size), strict=True))
            made = [MicroBatch(sample, slot, name) for sample, slot in batches if len(sample)]
            if world.joint:
                most = int((-(-held.bincount(minlength=world.shares) // size)).max())
                made += [MicroBatch(*self._company(name), name, counts=False)] * (most - len(made))
            yield from made[:-1]
            yield from (replace(batch, last=True) for batch in made[-1:])

    def _company(self, bucket: int) -> tuple[Tensor, Tensor]:
        """One item of this rank, of the bucket where it has one; `Policy.company` sees to its network where not."""
        mine = (self.owner == self.world.share)[:, None].expand_as(self.bucket)
        for choice in (mine & (self.bucket == bucket), mine, torch.ones_like(mine)):  # the last: all have all pairs
            if choice.any():
                break
        sample, slot = choice.nonzero()[:1].unbind(1)
        return sample, slot

    def before_step(self, index: int) -> None:
        """The gradients of part `index` are there; its optimizer step follows."""

    def after_step(self, *, moved: bool) -> None:
        """moved: whether the weights changed; they do not where the gradient was not finite."""

    def metrics(self) -> dict[str, float | None]:
        """Statistics of all losses so far, by name under `train/`: the mean of each that was noted."""
        return {f"train/{name}": float(told.mean()) for name, told in self.noted().items()}

    def note(self, **statistics: Tensor) -> None:
        """Remembers (N,) values by name, without their graph."""
        if not self.silent:
            for name, values in statistics.items():
                self._told[name].append(values.detach())

    def mark(self) -> dict[str, int]:
        """How much was noted so far."""
        return {name: len(told) for name, told in self._told.items()}

    def forget(self, mark: Mapping[str, int]) -> None:
        """Drops what was noted since `mark`: those items are gone through again."""
        for name, told in self._told.items():
            del told[mark.get(name, 0) :]

    def noted(self) -> dict[str, Tensor]:
        """What all ranks noted, (N,) float64 by name."""
        names = sorted({name for told in self.world.gather_json(sorted(self._told)) for name in told})
        own = {name: torch.cat(self._told[name]) if self._told[name] else torch.empty(0) for name in names}
        return {name: self.world.gather(values.double()) for name, values in own.items()}


@dataclass(frozen=True)
class Workload:
    """What one rollout asks of the optimizer.

    samples: trained ones (pairs of samples for DPO). steps: of each, a list where they share it, a count where each
    draws its own.
    """

    samples: int
    steps: list[int] | int

    @property
    def steps_per_sample(self) -> int:
        """How many items a sample has."""
        return self.steps if isinstance(self.steps, int) else len(self.steps)


class Algorithm(Protocol):
    """What varies between algorithms on one loop."""

    config: RunConfig
    needs_reference: bool
    """Whether the loss reads the starting policy's predictions."""

    def workload(self, policy: Policy) -> Workload:
        """The work of a rollout of which every sample is valid and has a signal."""

    def collect(
        self,
        policy: Policy,
        condition: Condition,
        iteration: int,
        on_batch: OnBatch | None = None,
    ) -> Any:
        """One batch from `condition`'s prompts. on_batch: given the samples to judge, as they come: all or none."""

    def learn(self, policy: Policy, batch: Any, scores: Mapping[str, Scores], prompts: Sequence[Prompt]) -> Learning:
        """What `collect` gave, with the verdicts on it ({} where `collect` gave nothing to judge), ready to learn from.

        prompts: of the groups, in order.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on: JSON-able."""

    def tensors(self) -> dict[str, Tensor]:
        """The same of tensors, by name."""

    def load_state_dict(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restores both."""


class Stateless:
    """An algorithm that keeps nothing between iterations."""

    needs_reference = False

    def __init__(self, config: RunConfig, world: World = ALONE) -> None:
        self.config, self.world = config, world

    @property
    def owner(self) -> Tensor:
        """(B,) int64: the share that each sample of a rollout is in."""
        total = self.config.prompts.per_iteration * self.config.rollout.group_size
        return self.world.owners(total, self.config.rollout.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def load_state_dict(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Nothing to restore."""
