"""Clips from tensors in [0, 1] to files: mp4 that every player and browser shows, WebP that keeps every pixel."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dancegrpo.files import write_atomically
from dancegrpo.media import grid, to_uint8

VISIBLE_SIDE = 256
"""Pixels: an mp4 of smaller frames is enlarged by the largest whole factor that keeps its longer side within this."""
LOSSLESS_PIXELS = 4_000_000
"""Frames x height x width up to which a run keeps its clips without loss."""
QUALITY = 14
"""x264's constant rate factor: 0 = no loss, 18 = hardly visible."""


def save_clip(clip: Tensor, path: Path, fps: float) -> None:
    """Write (F, 3, H, W), float in [0, 1] or uint8, as `.mp4` or `.webp` (by the path's name), whole or not at all.

    fps: frames per second. WebP loses nothing and loops; with F = 1 it is a plain picture. mp4 is H.264 in yuv420p:
    small frames are enlarged (see VISIBLE_SIDE), odd sides repeat their last pixel.
    """
    frames = _frames(clip)
    if path.suffix == ".webp":
        data = webp(frames, fps)
        write_atomically(path, lambda partial: partial.write_bytes(data))
    elif path.suffix == ".mp4":
        write_atomically(path, lambda partial: _write_mp4(_for_players(frames), partial, fps))
    else:
        raise ValueError(f"{path.name}: clips are written as .mp4 or .webp.")


def clip_suffix(clip: Tensor) -> str:
    """How a run keeps a clip (F, 3, H, W): `.webp` while it has at most LOSSLESS_PIXELS, else `.mp4`."""
    return ".webp" if clip.shape[0] * clip.shape[2] * clip.shape[3] <= LOSSLESS_PIXELS else ".mp4"


def fit(clip: Tensor, side: int) -> Tensor:
    """(F, 3, H, W) float, shrunk by averaging until neither side is above `side` pixels; small ones as they are."""
    longer = max(clip.shape[2:])
    if longer <= side:
        return clip
    height, width = (max(1, round(length * side / longer)) for length in clip.shape[2:])
    return torch.nn.functional.interpolate(clip.float(), size=(height, width), mode="area")


def clip_grid(clips: Sequence[Tensor], columns: int) -> Tensor:
    """Equal clips (F, 3, H, W) uint8, side by side and playing together: (F, 3, rows, columns) on white."""
    stills = zip(*clips, strict=True)
    return torch.stack([grid(frames, columns=columns, background=255) for frames in stills])


def film_strips(clips: Sequence[Tensor], columns: int) -> Tensor:
    """One row for each clip (F, 3, H, W) uint8, of `columns` frames evenly spaced from its first to its last."""
    count = min(columns, len(clips[0]))
    picked = torch.linspace(0, len(clips[0]) - 1, count).round().long().tolist()
    return grid([clip[index] for clip in clips for index in picked], columns=count, background=255)


def webp(frames: np.ndarray, fps: float) -> bytes:
    """Frames (F, H, W, 3) uint8 as an animated WebP without loss; F = 1 as a still one.

    The container is written here, because libwebp's own encoder merges equal neighbours: a frozen clip of 9 frames
    would come back as one picture. (RIFF layout: developers.google.com/speed/webp/docs/riff_container.)
    """
    images = [_still(frame) for frame in frames]
    if len(images) == 1:
        return images[0]
    height, width = frames.shape[1:3]
    size = _u24(width - 1) + _u24(height - 1)
    body = _chunk(b"VP8X", b"\x02\0\0\0" + size) + _chunk(b"ANIM", struct.pack("<IH", 0xFFFFFFFF, 0))
    # Whole milliseconds, so that rounding errors do not add up over the clip.
    moments = [round(1000 * index / fps) for index in range(len(images) + 1)]
    for index, image in enumerate(images):
        duration = max(1, moments[index + 1] - moments[index])
        place_over = b"\x02"  # no blending with the frame before
        body += _chunk(b"ANMF", _u24(0) + _u24(0) + size + _u24(duration) + place_over + image[12:])
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def _still(frame: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="WEBP", lossless=True, quality=80)
    return buffer.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def _u24(value: int) -> bytes:
    return value.to_bytes(3, "little")


def _frames(clip: Tensor) -> np.ndarray:
    """(F, 3, H, W), float in [0, 1] or uint8 -> (F, H, W, 3) uint8."""
    if clip.ndim != 4 or clip.shape[1] != 3 or not len(clip):
        raise ValueError(f"a clip is (F, 3, H, W), not {tuple(clip.shape)}.")
    values = clip.cpu() if clip.dtype == torch.uint8 else to_uint8(clip)
    return values.permute(0, 2, 3, 1).contiguous().numpy()


def _for_players(frames: np.ndarray) -> np.ndarray:
    """Enlarged to be seen, and to even sides: colour has half the resolution in yuv420p."""
    factor = max(1, VISIBLE_SIDE // max(frames.shape[1:3]))
    large = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    odd = [(0, 0), (0, large.shape[1] % 2), (0, large.shape[2] % 2), (0, 0)]
    return np.pad(large, odd, mode="edge")


def _write_mp4(frames: np.ndarray, path: Path, fps: float) -> None:
    import av

    try:
        # The index comes first ("faststart"), so that a browser plays while it loads.
        with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            stream.options = {"crf": str(QUALITY)}
            codec = stream.codec_context
            codec.thread_count = 1  # the bytes depend on how many there are
            # BT.709, and said so: without it players guess, and colours shift.
            codec.colorspace = codec.color_primaries = codec.color_trc = codec.color_range = 1
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
    except av.FFmpegError as error:  # a full disk, mostly
        raise OSError(error.errno, error.strerror) from error
