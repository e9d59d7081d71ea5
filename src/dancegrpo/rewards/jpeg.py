"""JPEG size: how well pictures compress, or how badly (arXiv:2305.13301). No weights; a check that training works."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from dancegrpo.errors import RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Scores, as_pictures
from dancegrpo.rewards.encoding import to_bytes


class JpegReward:
    """Minus the size of the picture as a JPEG file, in kilobytes of 1000 bytes: higher = compresses better.

    incompressible: the size itself, without the minus. quality: of the JPEG, 1 to 95. Pixels are rounded to bytes;
    a pixel outside [0, 1] is cut to it. No gradient flows. Raises RewardError for another quality.
    """

    name = "jpeg"
    differentiable = False
    pictures_only = True
    batch_size: int | None = 64
    device = torch.device("cpu")

    def __init__(self, incompressible: bool = False, quality: int = 95) -> None:
        if not isinstance(quality, int) or not 1 <= quality <= 95:
            raise RewardError(
                f"quality={quality!r} of the jpeg judge is out of range: use a whole number from 1 to 95."
            )
        self.sign = 1.0 if incompressible else -1.0
        self.quality = quality

    @torch.no_grad()
    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score B pictures, media (B, 1, 3, H, W)."""
        pictures = to_bytes(as_pictures(media))
        sizes = [self._kilobytes(picture) for picture in pictures]
        values = self.sign * torch.tensor(sizes, dtype=torch.float32, device=media.device)
        return Scores(values, torch.ones_like(values, dtype=torch.bool))

    def _kilobytes(self, picture: Any) -> float:
        from PIL import Image

        file = BytesIO()
        Image.fromarray(picture).save(file, format="JPEG", quality=self.quality)
        return file.tell() / 1000

    def to(self, device: Any) -> JpegReward:
        """Nothing to move: the pictures are compressed on the CPU."""
        return self
