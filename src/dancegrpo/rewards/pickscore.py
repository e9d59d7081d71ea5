"""PickScore: which picture people would pick for a prompt (arXiv:2305.01569), a fine-tuned ViT-H-14 CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Scores
from dancegrpo.rewards.clip import CosineReward, load_tokenizer
from dancegrpo.rewards.clip_score import load_preprocessing
from dancegrpo.rewards.weights import check_placement, check_source, load_pretrained, shipped

HUB_MODEL = "yuvalkirstain/PickScore_v1"
"""Hub repository of the published weights."""
HUB_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Hub repository of the tokenizer and preprocessing that PickScore was trained with."""


class PickScoreReward(CosineReward):
    """PickScore: cosine of picture and prompt, about 0.2 for published pictures.

    model: folder or hub id of PickScore_v1, in transformers' layout, or the shipped `shapes-pickscore`.
    processor: folder or hub id with its tokenizer and `preprocessor_config.json`; None = `HUB_PROCESSOR`, or the
    shipped judge's own. scaled: multiply by the logit scale, as upstream's example does (scores near 20; no difference
    to a normalised advantage). batch_size, dtype, device: as in `NetworkReward`.
    Raises RewardError for a checkpoint or processor that is missing or does not fit.
    """

    name = "pickscore"

    def __init__(
        self,
        model: str | Path = HUB_MODEL,
        processor: str | Path | None = None,
        scaled: bool = False,
        batch_size: int = 32,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        from transformers import CLIPModel

        check_placement(self.name, batch_size, dtype)
        folder = shipped(model)
        source = check_source(self.name, processor or folder or HUB_PROCESSOR, option="processor")
        network = load_pretrained(CLIPModel, check_source(self.name, folder or model, option="model"), judge=self.name)
        reader = load_tokenizer(self.name, source, vocabulary=network.config.text_config.vocab_size)
        self.preprocessing = load_preprocessing(source, network.config.vision_config.image_size)
        # Read before the network goes to a smaller number format.
        self.scale = network.logit_scale.float().exp().item() if scaled else 1.0
        super().__init__(network, reader, batch_size=batch_size, dtype=dtype, device=device)

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score B pictures, media (B, 1, 3, H, W)."""
        scores = super().__call__(media, prompts)
        return scores if self.scale == 1.0 else replace(scores, values=scores.values * self.scale)

    def pixels(self, pictures: Tensor) -> Tensor:
        """As the processor's preprocessing says."""
        return self.preprocessing(pictures)
