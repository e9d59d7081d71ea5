"""CLIP as a judge: the cosine of a picture and its prompt, by any CLIP checkpoint (arXiv:2103.00020, 2104.08718)."""

from __future__ import annotations

import html
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dancegrpo.errors import RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import NOT_FINITE, Scores, as_pictures, describe
from dancegrpo.rewards.weights import NetworkReward, check_source

HUB_TOKENIZER = "openai/clip-vit-large-patch14"
"""Hub repository with CLIP's vocabulary, which nearly every CLIP shares."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
EMPTY_PROMPT = "the prompt is empty"
"""Cause under which samples without a text to compare with are counted."""


class CosineReward(NetworkReward):
    """Base of the judges that compare a picture with its prompt: cosine of CLIP's image and text features.

    The cosine stays without the logit scale. A sample with an empty prompt has no score. Gradients flow to the media.
    Subclasses say how pixels are prepared (`pixels`) and how texts are cleaned (`clean`).
    """

    differentiable = True
    pictures_only = True

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int, dtype: str, device: str | None) -> None:
        super().__init__(model, batch_size=batch_size, dtype=dtype, device=device)
        self.tokenizer = tokenizer
        self.text_features = TextFeatures(self._encode_text)

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score B pictures, media (B, 1, 3, H, W)."""
        pictures = as_pictures(media)
        text = self.text_features([prompt.text for prompt in prompts]).to(self.device)
        image = image_features(self.model, self.pixels(pictures.to(self.device)))
        values = (image * text).sum(-1).to(media.device)
        empty = torch.tensor([not prompt.text.strip() for prompt in prompts], device=media.device)
        scores = Scores(values, torch.ones_like(empty))
        return scores.mask(empty, EMPTY_PROMPT).mask(~values.isfinite(), NOT_FINITE)

    def pixels(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W) float in [0, 1] -> what the network reads, (N, 3, side, side) float32."""
        raise NotImplementedError

    def clean(self, text: str) -> str:
        """A prompt as the tokenizer should see it."""
        return text

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """(B, context) int64: start, text, end of text, cut or padded to the network's context."""
        context = self.model.config.text_config.max_position_embeddings
        cleaned = [self.clean(text) for text in texts]
        tokens = self.tokenizer(cleaned, padding="max_length", truncation=True, max_length=context, return_tensors="pt")
        return tokens["input_ids"]

    @torch.no_grad()
    def _encode_text(self, text: str) -> Tensor:
        return text_features(self.model, self.tokenize([text]).to(self.device))[0].cpu()


class TextFeatures:
    """A bounded memory of text features: a run asks for the same prompts again and again.

    encode: one text -> its features (D,). Texts are encoded one at a time, so that a feature does not depend, not even
    by rounding, on which texts came with it or were known before: a resumed run gives the same scores to the last bit.
    """

    def __init__(self, encode: Callable[[str], Tensor], capacity: int = 4096) -> None:
        self.encode, self.capacity = encode, capacity
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(N, D) features of N texts."""
        return torch.stack([self._of(text) for text in texts])

    def _of(self, text: str) -> Tensor:
        if text not in self._known:
            self._known[text] = self.encode(text)
            if len(self._known) > self.capacity:
                self._known.popitem(last=False)
        self._known.move_to_end(text)
        return self._known[text]


def image_features(model: Any, pixels: Tensor) -> Tensor:
    """(N, D) float32 of unit length. model: a `transformers.CLIPModel`. pixels: (N, 3, side, side), preprocessed."""
    return F.normalize(model.get_image_features(pixels.to(model.dtype)).pooler_output.float(), dim=-1)


def text_features(model: Any, token_ids: Tensor) -> Tensor:
    """(N, D) float32 of unit length. token_ids: (N, context) int64."""
    return F.normalize(model.get_text_features(token_ids).pooler_output.float(), dim=-1)


def normalize_pixels(pixels: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """(N, 3, H, W) in [0, 1] -> zero mean and unit variance per channel."""
    return (pixels - pixels.new_tensor(mean).view(3, 1, 1)) / pixels.new_tensor(std).view(3, 1, 1)


def clean_text(text: str) -> str:
    """Text as open_clip cleans it: broken Unicode mended, HTML entities resolved (twice), whitespace single."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def load_tokenizer(judge: str, source: str | Path, vocabulary: int) -> Any:
    """CLIP's tokenizer from a folder or hub id; its end of text must be the last of `vocabulary` ids."""
    from transformers import CLIPTokenizer

    name = check_source(judge, source, option="tokenizer")
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
