"""What Qwen2-VL reads of clips and texts (arXiv:2409.12191), made from tensors: its video processor needs torchvision.

Frames are chosen, resized, cut into patches and the chat around them is tokenized and padded, as transformers and
qwen-vl-utils do for videos.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dancegrpo.errors import RewardError
from dancegrpo.rewards.base import describe
from dancegrpo.rewards.clip import normalize_pixels
from dancegrpo.rewards.weights import check_source

MIN_PIXELS = 128 * 28 * 28
"""Smallest area a frame of a video is scaled to, in pixels; qwen-vl-utils' value."""
RESERVED_TOKEN = "the prompt holds one of the judge's own tokens"
"""Cause under which samples are counted whose prompt would write into the judge's chat."""
_MAX_ASPECT = 200
_MIN_FRAMES, _MAX_FRAMES = 4, 768


def fitted_size(height: int, width: int, min_pixels: int, max_pixels: int, multiple: int = 28) -> tuple[int, int]:
    """(height, width) in pixels near the given ones: multiples of `multiple`, area from min_pixels to max_pixels.

    Raises RewardError for frames more than 200 times as long as wide.
    """
    if max(height, width) > _MAX_ASPECT * min(height, width):
        raise RewardError(f"frames of {height} x {width} pixels are too thin for Qwen2-VL: keep within 1 to 200.")
    rows, columns = (max(multiple, round(side / multiple) * multiple) for side in (height, width))
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(multiple, math.floor(s / shrink / multiple) * multiple) for s in (height, width))
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(s * grow / multiple) * multiple for s in (height, width))
    return rows, columns


def evenly_spaced_frames(total: int, clip_fps: float, sample_fps: float, count: int | None = None) -> Tensor:
    """Indices (n,) int64 of the frames to show of a clip of `total`, first and last included; n even where it can be.

    clip_fps, sample_fps: frames per second of the clip, and to show; at least 4 are shown where there are as many.
    count: shows that many whatever the speed. Raises RewardError for a clip of fewer than 2 frames.
    """
    if total < 2:
        raise RewardError(f"clips of {total} frame cannot be judged by their motion: give clips of 2 frames or more.")
    if count is None:
        most = min(_MAX_FRAMES, total) // 2 * 2
        wanted = min(max(total / clip_fps * sample_fps, _MIN_FRAMES), most)
    else:
        wanted = count
    shown = min(max(2, round(wanted / 2) * 2), total)
    return torch.linspace(0, total - 1, shown).round().long()


def resize_frames(clips: Tensor, height: int, width: int) -> Tensor:
    """(B, F, 3, H, W) float in [0, 1] -> (B, F, 3, height, width) float32: bicubic, antialiased, back within [0, 1].

    The published code rounds the result to 8 bits; this does not, so that gradients pass.
    """
    clips = clips.float()
    if clips.shape[-2:] == (height, width):
        return clips
    frames = F.interpolate(clips.flatten(0, 1), size=(height, width), mode="bicubic", antialias=True)
    return frames.clamp(0, 1).unflatten(0, clips.shape[:2])


def to_patches(clips: Tensor, patch: int = 14, merge: int = 2, temporal: int = 2) -> tuple[Tensor, Tensor]:
    """Clips cut into the flat patches Qwen2-VL's vision tower reads.

    clips: (B, F, 3, H, W) normalised, H and W multiples of patch * merge; F is filled up with its last frame to a
    multiple of `temporal`. Returns patches (B * t * h * w, 3 * temporal * patch * patch) and grid (B, 3) int64, each
    row (t, h, w): the patches of a clip by time, then by merge x merge blocks of the frame, then within the block.
    """
    size, frames, channels, height, width = clips.shape
    missing = -frames % temporal
    if missing:
        clips = torch.cat([clips, clips[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
    t, h, w = (frames + missing) // temporal, height // patch, width // patch
    blocks = clips.reshape(size, t, temporal, channels, h // merge, merge, patch, w // merge, merge, patch)
    patches = blocks.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(size * t * h * w, -1)
    return patches, torch.tensor([[t, h, w]] * size, device=clips.device)


def load_tokenizer(judge: str, source: str | Path, option: str, extra_tokens: Sequence[str] = ()) -> Any:
    """A tokenizer with Qwen2-VL's chat template from a folder or hub id, `extra_tokens` added to its vocabulary."""
    from transformers import AutoTokenizer

    name = check_source(judge, source, option=option)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise RewardError(f"{option}={name!r} has no tokenizer: {describe(error)}; give a complete folder.") from error
    if not tokenizer.chat_template:
        raise RewardError(f"{option}={name!r} has no chat template: give a folder of an instruction-tuned model.")
    if extra_tokens:
        tokenizer.add_tokens(list(extra_tokens), special_tokens=True)
    return tokenizer


def holds_reserved_token(tokenizer: Any, text: str) -> bool:
    """Whether a user's text would be read as one of the tokens that structure the chat."""
    tokens = tokenizer.added_tokens_decoder.values()
    return any(token.special and token.content and token.content in text for token in tokens)


def chat_inputs(tokenizer: Any, config: Any, clips: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
    """Everything Qwen2-VL's forward pass takes for B chats of one user turn each: a clip, then a text.

    tokenizer: with a chat template. config: the network's. clips: (B, F, 3, H, W) float in [0, 1], of fitted size.
    Returns input_ids, attention_mask and mm_token_type_ids (B, L) int64, padded on the right, so that a token's
    position never depends on its neighbours in the batch; pixel_values_videos and video_grid_thw as by `to_patches`.
    """
    vision = config.vision_config
    patches, grid = to_patches(
        normalize_pixels(clips), vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    )
    tokens = int(grid[0].prod()) // vision.spatial_merge_size**2
    rows = [_chat_tokens(tokenizer, text, config.video_token_id, tokens) for text in texts]
    length = max(map(len, rows))
    padding = tokenizer.pad_token_id or 0
    ids = torch.tensor([row + [padding] * (length - len(row)) for row in rows], device=clips.device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=clips.device)
    # 2 marks the tokens of a video, 1 those of pictures, of which there are none.
    kinds = torch.where((ids == config.video_token_id) & (mask == 1), 2, 0)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": kinds,
        "pixel_values_videos": patches,
        "video_grid_thw": grid,
    }


def _chat_tokens(tokenizer: Any, text: str, video_token: int, count: int) -> list[int]:
    """One chat's token ids, its placeholder of a video repeated `count` times."""
    content = [{"type": "video", "video": "clip"}, {"type": "text", "text": text}]
    chat = [{"role": "user", "content": content}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    if ids.count(video_token) != 1:
        raise RewardError(
            f"the chat template shows token {video_token} (a video) {ids.count(video_token)} times: "
            "use a Qwen2-VL tokenizer, whose template shows it once."
        )
    place = ids.index(video_token)
    return [*ids[:place], *[video_token] * count, *ids[place + 1 :]]
