"""The rule-based judge of the shapes world."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dancegrpo.errors import ConfigError, RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Scores
from dancegrpo.shapes.verifier import judge

Mode = Literal["graded", "exact", "mix"]


class ShapesReward:
    """Judges drawings by rules: `graded` credit in [0, 1], `exact` 0/1, or `mix`, the mean of the two.

    Media (B, 1, 3, 64, 64) float in [0, 1]; prompts carry a scene in their metadata. `extra["pass"]` is the exact
    verdict whatever the mode. Pictures with a non-finite pixel are not valid.
    Raises ConfigError on an unknown mode, RewardError where prompts or pictures are not of the shapes world.
    """

    name = "shapes"
    differentiable = False
    batch_size: int | None = 64
    device = torch.device("cpu")

    def __init__(self, mode: Mode = "graded") -> None:
        if mode not in ("graded", "exact", "mix"):
            raise ConfigError(f"mode={mode!r} of the shapes reward does not exist: use graded, exact or mix.")
        self.mode = mode

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """media: (B, 1, 3, 64, 64) or (B, 3, 64, 64) float in [0, 1], on any device."""
        try:
            verdict = judge(media.detach().float().cpu().numpy(), prompts)
        except KeyError as missing:
            raise RewardError(
                f"a prompt has no {missing} in its metadata: the shapes reward only judges prompts of the shapes world."
            ) from missing
        except ValueError as wrong:
            raise RewardError(str(wrong)) from wrong
        passed = torch.from_numpy(verdict.exact).float()
        graded = torch.from_numpy(verdict.graded)
        values = {"graded": graded, "exact": passed, "mix": (graded + passed) / 2}[self.mode]
        valid = torch.from_numpy(verdict.valid)
        device = media.device
        return Scores(values.to(device), valid.to(device), {"pass": passed.to(device)})

    def to(self, device: Any) -> ShapesReward:
        """The judge has no weights: it works on the CPU wherever the media are, and answers there."""
        return self
