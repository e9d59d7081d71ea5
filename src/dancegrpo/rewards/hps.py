"""HPS-v2.1, the human preference score (arXiv:2306.09341): cosine of a fine-tuned ViT-H-14 CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from dancegrpo.rewards.clip import HUB_TOKENIZER, CosineReward, clean_text, load_tokenizer, normalize_pixels
from dancegrpo.rewards.open_clip import load_open_clip
from dancegrpo.rewards.weights import check_placement, fetch, shipped

HUB_WEIGHTS = ("xswu/HPSv2", "HPS_v2.1_compressed.pt")
"""Hub repository and file of the published weights."""
SHIPPED_HEADS = (4, 4)
"""Of `shapes-hps`: (vision, text)."""


class HPSReward(CosineReward):
    """HPS-v2.1: how much people would prefer this picture for this prompt; published pictures score about 0.2 to 0.35.

    weights: path of `HPS_v2.1_compressed.pt` (open_clip's layout); None = fetched from the hub, once.
    tokenizer: folder or hub id with CLIP's vocabulary; None = `HUB_TOKENIZER`.
    heads: (vision, text) attention heads of a checkpoint that is not a ViT-H-14.
    weights `shapes-hps` come with the package, and bring tokenizer and heads.
    batch_size, dtype, device: as in `NetworkReward`.
    Raises RewardError for weights or a tokenizer that are missing or do not fit.
    """

    name = "hps"

    def __init__(
        self,
        weights: str | Path | None = None,
        tokenizer: str | Path | None = None,
        heads: Sequence[int] | None = None,
        batch_size: int = 32,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        check_placement(self.name, batch_size, dtype)
        if folder := shipped(weights):
            weights, heads = folder / "open_clip_model.safetensors", heads or SHIPPED_HEADS
        model = load_open_clip(fetch(*HUB_WEIGHTS) if weights is None else weights, heads)
        source = tokenizer or folder or HUB_TOKENIZER
        reader = load_tokenizer(self.name, source, vocabulary=model.config.text_config.vocab_size)
        super().__init__(model, reader, batch_size=batch_size, dtype=dtype, device=device)

    def pixels(self, pictures: Tensor) -> Tensor:
        """`hps_pixels` at the network's size."""
        return hps_pixels(pictures, self.model.config.vision_config.image_size)

    def clean(self, text: str) -> str:
        """As open_clip cleans texts."""
        return clean_text(text)


def hps_pixels(pictures: Tensor, side: int = 224) -> Tensor:
    """The published preprocessing: (N, 3, H, W) float in [0, 1] -> (N, 3, side, side) float32, normalised.

    The longest side is scaled to `side` (bicubic, antialiased) and the rest padded with zeros, centred, before CLIP's
    mean and std are taken off: the border is black, not grey.
    """
    pictures = pictures.float()
    height, width = pictures.shape[-2:]
    scale = side / max(height, width)
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    if scale != 1.0:
        pictures = F.interpolate(pictures, size=(height, width), mode="bicubic", antialias=True)
    top, left = (side - height) // 2, (side - width) // 2
    pictures = F.pad(pictures, (left, side - width - left, top, side - height - top))
    return normalize_pixels(pictures)
