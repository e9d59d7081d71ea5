"""Pairs of pictures or clips of which one was preferred, as media of a model's size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dancegrpo.config import RunConfig
from dancegrpo.errors import ConfigError, PromptError
from dancegrpo.media import read_media, reference_image
from dancegrpo.prompt_images import Reference, is_clip, open_image
from dancegrpo.prompts import Prompt, brings_pairs


def match_pairs(config: RunConfig) -> None:
    """Raises ConfigError where the algorithm learns from recorded pairs and the prompts bring none, or the reverse."""
    source, told = config.prompts.train, brings_pairs(config.prompts.train)
    if config.offline and not told:
        raise ConfigError(
            f"algorithm.dpo.source=offline learns from recorded pairs, and prompts.train={source} brings none: name a "
            "file of them as preferences:FILE or pickapic-pairs:FILE, or set algorithm.dpo.source=online"
        )
    if told and not config.offline:
        name = config.algorithm.name
        own = "algorithm.dpo.source=online" if name == "dpo" else f"algorithm.name={name}"
        raise ConfigError(
            f"prompts.train={source} brings recorded pairs, which {own} does not read: set algorithm.name=dpo and "
            "algorithm.dpo.source=offline, or name prompts alone"
        )


def read_pair(prompt: Prompt, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The preferred side and the other of a prompt's pair, each of `shape` (F, 3, H, W), float32 in [0, 1].

    Each is scaled (`fit`); of a clip the first F frames are taken. Raises PromptError for a prompt without a pair and
    a clip that is too short, PromptError or MediaError for a file that cannot be read to its end.
    """
    if prompt.pair is None:
        raise PromptError(f"prompt {prompt.id} ({prompt.text!r}) has no pair: name the file as preferences:FILE")
    chosen, rejected = (fit(_frames(side, prompt, shape[0]), *shape[2:]) for side in prompt.pair)
    return chosen, rejected


def fit(media: Tensor, height: int, width: int) -> Tensor:
    """(F, 3, h, w) uint8 -> (F, 3, height, width) float32 in [0, 1]: scaled until it covers the size, cut around its
    centre, as Diffusion-DPO (arXiv:2311.12908) prepares Pick-a-Pic.

    Bicubic, antialiased, back within [0, 1]; a picture of the size is not touched. Neither side of the picture is
    stretched more than the other, but for the pixel that rounding takes.
    """
    pixels, (h, w) = media.float() / 255, media.shape[-2:]
    size = (height, max(width, w * height // h)) if height * w >= width * h else (max(height, h * width // w), width)
    if size != (h, w):
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = ((size[0] - height) // 2, (size[1] - width) // 2)
    return pixels[..., top : top + height, left : left + width]


def _frames(side: Reference, prompt: Prompt, count: int) -> Tensor:
    """The first `count` frames (count, 3, h, w) uint8 of a picture or clip; of a clip asked for one, its first."""
    where = f"the pair of prompt {prompt.id} ({prompt.text!r})"
    if count == 1 or isinstance(side, bytes):
        image = open_image(side, where) if isinstance(side, bytes) or is_clip(side) else side
        picture = np.array(reference_image(replace(prompt, image=image)))
        frames = torch.from_numpy(picture)[None].permute(0, 3, 1, 2)
    else:
        frames = read_media(side)[:count]
    if len(frames) < count:
        name = "a side in its bytes" if isinstance(side, bytes) else str(side)
        raise PromptError(f"{where}: {name} has {len(frames)} of {count} frames: lower model.num_frames, or film more")
    return frames
