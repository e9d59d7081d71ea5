"""Denoising diffusion policy optimization (DDPO, arXiv:2305.13301): the clipped surrogate on a running baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dancegrpo.advantages import standardize
from dancegrpo.algorithms.base import Advantage
from dancegrpo.algorithms.grpo import GRPO
from dancegrpo.config import RunConfig
from dancegrpo.distributed import ALONE, World
from dancegrpo.noise import key
from dancegrpo.prompts import Prompt


class DDPO(GRPO):
    """GRPO's loss with another baseline: mean and spread of the last rewards of the same prompt.

    A prompt of which fewer than `buffer_min` rewards are known takes mean and spread of the whole rollout. Published:
    starting noise of each sample's own (`rollout.shared_noise=false`), every step trained, the last too.
    """

    def __init__(self, config: RunConfig, world: World = ALONE) -> None:
        super().__init__(config, world)
        self._known: dict[str, dict[str, list[float]]] = {}

    def _normalize(
        self, judge: str, values: Tensor, valid: Tensor, group: Tensor, prompts: Sequence[Prompt]
    ) -> tuple[Tensor, Tensor]:
        """Remembers the valid scores, then takes off each prompt's own mean and divides by its own spread."""
        config, known = self.config.algorithm.ddpo, self._known.setdefault(judge, {})
        # Neither the group nor the id: a text that is drawn twice, or comes again, is one prompt.
        names = [key(0, repr(prompt.request())) for prompt in prompts]
        owners = [f"{names[index]:x}" for index in group.tolist()]
        for owner, value, counts in zip(owners, values.tolist(), valid.tolist(), strict=True):
            if counts:
                known.setdefault(owner, []).append(value)
        for owner in set(owners) & known.keys():
            known[owner] = known[owner][-config.buffer_size :]
        whole = values[valid].double()
        baselines = {
            owner: torch.tensor(known[owner], dtype=torch.float64)
            if len(known.get(owner, ())) >= config.buffer_min
            else whole
            for owner in set(owners)
        }
        settings: Any = {"estimator": self.config.advantage.estimator, "eps": self.config.advantage.eps}
        advantage = torch.zeros(len(values))
        for owner, baseline in baselines.items():
            mine = torch.tensor([name == owner for name in owners]) & valid
            if mine.any() and baseline.max() - baseline.min() > self.config.advantage.min_spread:
                advantage[mine] = standardize(values[mine], baseline, **settings)
        return advantage, valid.float()

    def deal(self, advantage: Advantage, group: Tensor) -> Tensor:
        """The rollout's samples round-robin: a group may be a single sample."""
        return super().deal(advantage, torch.zeros_like(group))

    def state_dict(self) -> dict[str, Any]:
        """The remembered rewards, by judge and prompt."""
        return {"rewards": self._known}

    def load_state_dict(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restores `state_dict`."""
        self._known = {judge: {p: list(r) for p, r in held.items()} for judge, held in state["rewards"].items()}
