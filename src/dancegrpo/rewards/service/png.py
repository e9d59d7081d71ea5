"""Requests in plain JSON with PNG pictures, for clients in any language.

`{"prompts": [...], "media": [...]}`: one entry of `media` per sample, a base64 PNG for a picture or a list of them for
a clip; all samples have one size and one number of frames. Prompts are as in `wire`, without images.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dancegrpo.rewards.service.wire import Request, WireError, check_media, read_head, read_prompts

_DEPTH_AT = 24
"""Where a PNG's header holds its bits per channel."""


def unpack_json(body: bytes, max_samples: int, max_bytes: int) -> Request:
    """The samples of a JSON request as uint8. `max_bytes` bounds the decoded pixels. Raises WireError for all else."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        raise WireError("the body is not JSON") from None
    identity, records = read_head(told, None)
    samples = told.get("media")
    if not isinstance(samples, list) or not samples:
        raise WireError("the request has no list of media")
    read_head(told, len(samples))
    if len(samples) > max_samples:
        raise WireError(f"{len(samples)} samples came at once: send at most {max_samples}", 413)
    budget = [max_bytes]
    clips = [_clip(number, sample, budget) for number, sample in enumerate(samples)]
    shapes = {clip.shape for clip in clips}
    if len(shapes) > 1:
        raise WireError("samples differ in size or number of frames: send those of one size together", 422)
    return Request(identity, check_media(torch.stack(clips), max_samples), read_prompts(records, _no_image))


def _clip(number: int, sample: Any, budget: list[int]) -> Tensor:
    frames = [sample] if isinstance(sample, str) else sample
    if not isinstance(frames, list) or not frames or not all(isinstance(frame, str) for frame in frames):
        raise WireError(f"sample {number} is neither a base64 PNG nor a list of them", 422)
    pictures = [_picture(number, frame, budget) for frame in frames]
    if len({picture.shape for picture in pictures}) > 1:
        raise WireError(f"the frames of sample {number} differ in size", 422)
    return torch.stack(pictures)


def _picture(number: int, text: str, budget: list[int]) -> Tensor:
    """One PNG as (3, H, W) uint8. Its size is checked before its pixels are read: small files can unpack to much."""
    from PIL import Image

    try:
        data = base64.b64decode(text, validate=True)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            # Pillow reads 16 bits per channel as 8 and drops the rest without a word.
            if picture.mode not in ("RGB", "L") or data[_DEPTH_AT] != 8 or "transparency" in picture.info:
                raise WireError(f"a picture of sample {number} is no 8-bit RGB or grey PNG: convert it", 422)
            budget[0] -= 3 * picture.width * picture.height
            if budget[0] < 0:
                raise WireError("the pictures are larger than a request may be: send fewer at once", 413)
            pixels = np.array(picture.convert("RGB"))
    except WireError:
        raise
    except (binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise WireError(f"a picture of sample {number} is no base64 PNG ({type(error).__name__})", 422) from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _no_image(name: str) -> Path:
    raise WireError("a prompt's image travels in safetensors requests only", 422)
