"""Samples as bytes that a browser or a service understands."""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor


def to_bytes(pictures: Tensor) -> np.ndarray:
    """(..., 3, H, W), uint8 or float in [0, 1], as a (..., H, W, 3) uint8 array on the CPU.

    Floats are rounded as they are for files; a NaN becomes black.
    """
    if pictures.dtype != torch.uint8:
        pictures = (pictures.detach().float().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    return pictures.movedim(-3, -1).contiguous().cpu().numpy()


def to_png(frame: np.ndarray) -> bytes:
    """One frame (H, W, 3) uint8 as PNG, without loss."""
    from PIL import Image

    # Level 1: pictures of a generator hardly shrink further, and higher levels cost several times the time.
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def to_webp(frames: np.ndarray, fps: float) -> bytes:
    """Frames (F, H, W, 3) uint8 as an animated WebP that loops."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    # Small clips are cheap enough to keep every pixel; large ones would take seconds each.
    lossless = max(frames.shape[1:3]) <= 256
    buffer, duration = io.BytesIO(), max(1, round(1000 / fps))
    images[0].save(
        buffer,
        format="WEBP",
        save_all=True,
        append_images=images[1:],
        duration=duration,
        loop=0,
        lossless=lossless,
        quality=80,
        method=2,
    )
    return buffer.getvalue()
