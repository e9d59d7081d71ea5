"""HPS-v2.1, the human preference score (arXiv:2306.09341): cosine of a fine-tuned ViT-H-14 CLIP."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dancegrpo.errors import RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import NOT_FINITE, Scores, as_media, describe
from dancegrpo.rewards.open_clip import load_open_clip

HUB_WEIGHTS = ("xswu/HPSv2", "HPS_v2.1_compressed.pt")
"""Hub repository and file of the published weights."""
HUB_TOKENIZER = "openai/clip-vit-large-patch14"
"""Hub repository with CLIP's vocabulary, which ViT-H-14 shares."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class HPSReward:
    """HPS-v2.1: how much people would prefer this picture for this prompt; published pictures score about 0.2 to 0.35.

    The score is the cosine between image and text features, without the logit scale; for video, its mean over frames.
    A sample with an empty prompt has no score. Gradients flow to the media.

    weights: path of `HPS_v2.1_compressed.pt` (open_clip's layout); None = fetched from the hub, once.
    tokenizer: folder or hub id with CLIP's vocabulary.
    heads: (vision, text) attention heads of a checkpoint that is not a ViT-H-14.
    batch_size: pictures per forward pass. dtype: of the network; preprocessing and cosine stay in float32.
    device: pins the judge to a device of its own; None = it goes where the run's panel goes.
    Raises RewardError for weights or a tokenizer that are missing or do not fit.
    """

    name = "hps"
    differentiable = True

    def __init__(
        self,
        weights: str | Path | None = None,
        tokenizer: str | Path = HUB_TOKENIZER,
        heads: Sequence[int] | None = None,
        batch_size: int = 32,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise RewardError(f"dtype={dtype!r} of the hps judge is unknown: use {', '.join(_DTYPES)}.")
        if batch_size < 1:
            raise RewardError(f"batch_size={batch_size} of the hps judge is no batch: use 1 or more.")
        self.batch_size: int | None = batch_size
        self.model = load_open_clip(_fetch(*HUB_WEIGHTS) if weights is None else weights, heads).to(_DTYPES[dtype])
        self.tokenizer = _load_tokenizer(tokenizer, vocabulary=self.model.config.text_config.vocab_size)
        self._pinned = device is not None
        self.device = torch.device(device or "cpu")
        self.model.to(self.device)

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score B samples: pictures, or videos by the mean over their frames."""
        media = as_media(media)
        num_samples, frames = media.shape[:2]
        token_ids = self.tokenize([prompt.text for prompt in prompts]).repeat_interleave(frames, dim=0)
        size, side = self.batch_size or len(token_ids), self.model.config.vision_config.image_size
        # In pieces, as the frames of a video count as pictures each.
        cosines = [
            score_tokens(self.model, hps_pixels(pictures.to(self.device), side), ids.to(self.device))
            for pictures, ids in zip(media.flatten(0, 1).split(size), token_ids.split(size), strict=True)
        ]
        values = torch.cat(cosines).view(num_samples, frames).mean(1).to(media.device)
        empty = torch.tensor([not prompt.text.strip() for prompt in prompts], device=media.device)
        scores = Scores(values, torch.ones_like(empty))
        return scores.mask(empty, "the prompt is empty").mask(~values.isfinite(), NOT_FINITE)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """(B, context) int64: start, text, end of text, cut or padded to the context as the published judge does."""
        context = self.model.config.text_config.max_position_embeddings
        cleaned = [clean_text(text) for text in texts]
        tokens = self.tokenizer(cleaned, padding="max_length", truncation=True, max_length=context, return_tensors="pt")
        return tokens["input_ids"]

    def to(self, device: Any) -> HPSReward:
        """Move the network, unless the recipe pinned it to a device."""
        if not self._pinned:
            self.device = torch.device(device)
            self.model.to(self.device)
        return self


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
    mean, std = (pictures.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pictures - mean) / std


def score_tokens(model: Any, pixels: Tensor, token_ids: Tensor) -> Tensor:
    """Cosine of image and text features, (N,) float32.

    model: a `transformers.CLIPModel`. pixels: (N, 3, side, side), preprocessed. token_ids: (N, context) int64.
    """
    # The samples of a group share a prompt: each distinct one is encoded once.
    distinct, index = token_ids.unique(dim=0, return_inverse=True)
    text = F.normalize(model.get_text_features(distinct).pooler_output.float(), dim=-1)
    image = F.normalize(model.get_image_features(pixels).pooler_output.float(), dim=-1)
    return (image * text[index]).sum(-1)


def clean_text(text: str) -> str:
    """Text as open_clip cleans it: broken Unicode mended, HTML entities resolved (twice), whitespace single."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def _fetch(repository: str, filename: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repository, filename)
    except Exception as error:
        raise RewardError(
            f"{filename} cannot be fetched from {repository}: {describe(error)}; give its path as the option `weights`."
        ) from error


def _load_tokenizer(source: str | Path, vocabulary: int) -> Any:
    from transformers import CLIPTokenizer

    name = str(source)
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.count("/") != 1 or name.startswith((".", "~"))):
        raise RewardError(f"tokenizer {name!r} is neither a folder nor a hub id: give one with CLIP's vocabulary.")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(name)
    except Exception as error:
        raise RewardError(f"tokenizer {name!r} cannot be loaded: {describe(error)}; give a local folder.") from error
    # A folder without vocabulary files gives an empty tokenizer rather than an error.
    if tokenizer.eos_token_id != vocabulary - 1:
        raise RewardError(
            f"tokenizer {name!r} ends texts with id {tokenizer.eos_token_id}, the network with {vocabulary - 1}: "
            f"give a folder or hub id with CLIP's vocabulary."
        )
    return tokenizer
