"""What pictures look like in numbers, as a judge: to be measured beside the others, not to be trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dancegrpo.errors import RewardError
from dancegrpo.image_statistics import STATISTICS
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import NOT_FINITE, Scores, as_media


class AppearanceReward:
    """The statistics of `dancegrpo.image_statistics`, each as an extra column of its name; the value is `saturation`.

    Media (B, F, 3, H, W), pictures or clips. A recipe gives it weight 0: a high number is no better than a low one.
    A sample with a NaN pixel has no score. Raises RewardError for media of another shape.
    """

    name = "appearance"
    differentiable = False
    batch_size: int | None = 64

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Measure B samples on the device they are on."""
        try:
            columns = {name: statistic(as_media(media)) for name, statistic in STATISTICS.items()}
        except ValueError as wrong:
            raise RewardError(str(wrong)) from wrong
        values = columns["saturation"]
        scores = Scores(values, torch.ones_like(values, dtype=torch.bool), columns)
        return scores.mask(~values.isfinite(), NOT_FINITE)

    def to(self, device: Any) -> AppearanceReward:
        """Nothing to move: statistics are taken where the media are."""
        return self
