"""The fixed-seed samples of a run: a file for each prompt, and all of them on one sheet."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from torch import Tensor

from dancegrpo.background import BackgroundWriter, Call
from dancegrpo.media import grid, require_numbers, save_image, to_uint8
from dancegrpo.video import clip_grid, clip_suffix, film_strips, fit, save_clip

SHEET = "grid.png"
"""Written last: where it is, the others are too."""
MOVING_SHEET = "grid.mp4"
COLUMNS = 6
STRIP_FRAMES = 8
SHEET_SIDE = 320
"""Pixels: larger clips are shrunk to this on the moving sheet (1,930 pixels wide at most), and to half of it on the
strips; on the moving sheet small ones are enlarged to half of it at most."""


def write_samples(
    media: Iterable[Tensor], folder: Path, *, fps: float, writer: BackgroundWriter, then: Call | None = None
) -> None:
    """Queues the files of `media`, one (F, 3, H, W) in [0, 1] for each prompt, all of one shape.

    Pictures (F = 1): `N.png` and `grid.png`. Clips: `N.webp` without loss (`N.mp4` where they are large, see
    `clip_suffix`), `grid.mp4` with all of them playing, and `grid.png` with a strip of frames for each.
    then: called once all of them are there. Raises MediaError for media with NaN.
    """
    pictures: list[Tensor] = []
    clips: list[Tensor] = []
    for number, sample in enumerate(media):
        require_numbers(sample, f"sample {number} of {folder}")
        if len(sample) == 1:
            pictures.append(sample[0].cpu())
            writer.submit(partial(save_image, pictures[-1], folder / f"{number}.png"))
        else:
            clips.append(to_uint8(fit(sample, SHEET_SIDE)))
            writer.submit(partial(save_clip, to_uint8(sample), folder / f"{number}{clip_suffix(sample)}", fps))
    if clips:
        writer.submit(lambda: save_clip(_sheet(clips), folder / MOVING_SHEET, fps))
        writer.submit(lambda: save_image(_strips(clips), folder / SHEET), then)
    else:
        writer.submit(lambda: save_image(grid(pictures, min(COLUMNS, len(pictures))), folder / SHEET), then)


def _sheet(clips: list[Tensor]) -> Tensor:
    """(F, 3, H, W) uint8."""
    factor = max(1, SHEET_SIDE // 2 // max(clips[0].shape[2:]))
    return clip_grid([clip.repeat_interleave(factor, 2).repeat_interleave(factor, 3) for clip in clips], COLUMNS)


def _strips(clips: list[Tensor]) -> Tensor:
    """(3, H, W) in [0, 1]."""
    small = [to_uint8(fit(clip / 255, SHEET_SIDE // 2)) for clip in clips]
    return film_strips(small, STRIP_FRAMES) / 255
