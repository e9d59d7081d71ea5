"""ImageReward v1.0: what people prefer, learned from 137 thousand comparisons (arXiv:2304.05977)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dancegrpo.errors import RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import NOT_FINITE, Scores, as_pictures, describe
from dancegrpo.rewards.blip import BLIP_LARGE, infer_sizes, load_image_reward
from dancegrpo.rewards.clip import EMPTY_PROMPT
from dancegrpo.rewards.clip_score import Preprocessing
from dancegrpo.rewards.weights import NetworkReward, check_placement, check_source, fetch, read_tensors

HUB_WEIGHTS = ("THUDM/ImageReward", "ImageReward.pt")
"""Hub repository and file of the published weights."""
HUB_TOKENIZER = "google-bert/bert-base-uncased"
"""Hub repository with the text encoder's vocabulary."""
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""What the published code takes off the head's output, and divides it by."""
TOKENS = 35
"""Length that prompts are cut or padded to."""


class ImageRewardReward(NetworkReward):
    """ImageReward: how well a picture follows its prompt and how good it looks; about -2 to 2, 0 on average.

    weights: path of `ImageReward.pt`; None = fetched from the hub, once. tokenizer: folder or hub id with BERT's
    uncased vocabulary. heads: (vision, text) attention heads of a checkpoint of another size, whose other sizes are
    read off its tensors. batch_size, dtype, device: as in `NetworkReward`; the head always computes in float32.
    A sample with an empty prompt has no score. Gradients flow to the media.
    Raises RewardError for weights or a tokenizer that are missing or do not fit.
    """

    name = "imagereward"
    differentiable = True
    pictures_only = True

    def __init__(
        self,
        weights: str | Path | None = None,
        tokenizer: str | Path = HUB_TOKENIZER,
        heads: Sequence[int] | None = None,
        batch_size: int = 16,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        check_placement(self.name, batch_size, dtype)
        path = fetch(*HUB_WEIGHTS) if weights is None else weights
        tensors = read_tensors(path)
        sizes = BLIP_LARGE if heads is None else infer_sizes(tensors, heads)
        network = load_image_reward(tensors, sizes, path)
        self.tokenizer = _load_tokenizer(tokenizer, sizes.vocabulary)
        self.preprocessing = Preprocessing(sizes.image, sizes.image, rounded=True)
        super().__init__(network, batch_size=batch_size, dtype=dtype, device=device, full_precision="head")

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score B pictures, media (B, 1, 3, H, W)."""
        pixels = self.preprocessing(as_pictures(media).to(self.device))
        tokens = self.tokenizer(
            [prompt.text for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        ).to(self.device)
        values = (self.model(pixels, tokens["input_ids"], tokens["attention_mask"]) - MEAN) / STD
        values = values.to(media.device)
        empty = torch.tensor([not prompt.text.strip() for prompt in prompts], device=media.device)
        scores = Scores(values, torch.ones_like(empty))
        return scores.mask(empty, EMPTY_PROMPT).mask(~values.isfinite(), NOT_FINITE)


def _load_tokenizer(source: str | Path, vocabulary: int) -> Any:
    """BERT's uncased tokenizer; the network has two more words, BLIP's [DEC] and [ENC], which no score uses."""
    from transformers import BertTokenizer

    name = check_source(ImageRewardReward.name, source, option="tokenizer")
    try:
        tokenizer = BertTokenizer.from_pretrained(name)
    except Exception as error:
        raise RewardError(f"tokenizer {name!r} cannot be loaded: {describe(error)}; give a local folder.") from error
    if len(tokenizer) not in (vocabulary - 2, vocabulary) or tokenizer.cls_token_id is None:
        raise RewardError(
            f"tokenizer {name!r} has {len(tokenizer)} words, the network {vocabulary}, two of them BLIP's own: "
            f"give a folder or hub id with BERT's uncased vocabulary."
        )
    return tokenizer
