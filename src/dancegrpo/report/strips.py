"""A clip as one picture that holds its frames side by side.

The page's script plays it. So all clips of a page run on one clock and stay in step, can be paused, play in every
browser that shows pictures, and can be looked at frame by frame where no script runs.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dancegrpo.media import grid

MOST_FRAMES = 32
"""Longer clips are thinned evenly, and shown as long as they are."""
MOST_PIXELS = 1_500_000
"""Frames x height x width; larger clips are shrunk."""
LARGEST_SIDE = 512
"""Pixels of a frame."""
GAP = 2
"""Grey pixels between frames, for whoever sees the strip itself."""


@dataclass(frozen=True)
class Strip:
    """A WebP of `frames` frames, each width x height pixels, in rows of `columns`, GAP apart; every
    `stride`-th of the clip's."""

    data: bytes
    width: int
    height: int
    frames: int
    columns: int
    stride: int


def film_strip(clip: Tensor, limit: int) -> Strip:
    """A clip (F, 3, H, W) uint8 as a WebP of at most `limit` bytes: without loss where that fits, else smaller."""
    stride = -(-len(clip) // MOST_FRAMES)
    frames = clip[::stride]
    count, height, width = len(frames), *frames.shape[2:]
    columns = math.ceil(math.sqrt(count))
    scale = min(1.0, LARGEST_SIDE / max(height, width), math.sqrt(MOST_PIXELS / (count * height * width)))
    if scale == 1.0:
        data = _encode(frames, columns, lossless=True)
        if len(data) <= limit:
            return Strip(data, width, height, count, columns, stride)
    while True:
        size = max(1, round(scale * width)), max(1, round(scale * height))
        data = _encode(_resized(frames, size), columns, lossless=False)
        if len(data) <= limit or max(size) == 1:
            return Strip(data, *size, count, columns, stride)
        scale *= 0.8


def _resized(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """(F, 3, H, W) uint8 at another (width, height)."""
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    small = np.stack([np.asarray(image.resize(size, Image.Resampling.LANCZOS)) for image in images])
    return torch.from_numpy(small).permute(0, 3, 1, 2)


def _encode(frames: Tensor, columns: int, *, lossless: bool) -> bytes:
    sheet = grid(list(frames), columns, padding=GAP, background=128)
    out = io.BytesIO()
    Image.fromarray(sheet.permute(1, 2, 0).contiguous().numpy()).save(out, "WEBP", lossless=lossless, quality=80)
    return out.getvalue()
