"""Fixed-seed pictures and clips of a run, embedded in the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from dancegrpo.errors import MediaError
from dancegrpo.media import read_media
from dancegrpo.report.folder import RunFolder
from dancegrpo.report.strips import GAP, film_strip

LARGEST_SIDE = 512
"""Pixels; larger pictures are embedded at this size, as JPEG."""
MOVING = (".webp", ".mp4")
PIXELATED_BELOW = 160
"""Pixels; smaller pictures are shown enlarged with hard edges."""
BUDGET_BYTES = 6_000_000
"""Pictures between first and last are embedded too while all of them together stay below this. The first and last
clips together stay below it whatever they show."""
CLIP_BYTES = 250_000
"""The most that one clip takes."""


@dataclass(frozen=True)
class Picture:
    """One embedded picture, or a clip: then its frames in rows of `columns`, each of width x height pixels, GAP apart.

    source: a data URI. fps: frames per second as shown.
    """

    source: str
    width: int
    height: int
    frames: int = 1
    columns: int = 1
    fps: float = 1.0

    @property
    def sheet(self) -> tuple[int, int]:
        """Width and height of all frames together, in pixels."""
        rows = -(-self.frames // self.columns)
        return self.columns * (self.width + GAP) - GAP, rows * (self.height + GAP) - GAP


@dataclass(frozen=True)
class Pair:
    """One prompt's pictures or clips (None = missing), one per shown iteration, or one per run."""

    text: str
    task: str | None
    frames: list[Picture | None]
    width: int
    height: int

    @property
    def pixelated(self) -> bool:
        """Whether it is enlarged with hard edges."""
        return max(self.width, self.height) < PIXELATED_BELOW


@dataclass(frozen=True)
class Gallery:
    """All prompts with pictures, and the iterations (done so far) their frames belong to."""

    iterations: list[int]
    pairs: list[Pair]

    @property
    def clip(self) -> Picture | None:
        """The first one that moves, if any does."""
        return next((frame for pair in self.pairs for frame in pair.frames if frame and frame.frames > 1), None)


def gallery(run: RunFolder) -> Gallery | None:
    """First and last pictures of every prompt, and those between where they are small; None without pictures."""
    shown = {number: files for number, folder in run.samples.items() if (files := _files(folder))}
    if not shown:
        return None
    iterations = sorted(shown)
    size = sum(_cost(file) for files in shown.values() for file in files.values())
    if size > BUDGET_BYTES:
        iterations = sorted({iterations[0], iterations[-1]})
    indices = sorted({index for number in iterations for index in shown[number]})
    limit = min(CLIP_BYTES, BUDGET_BYTES // (2 * max(1, len(indices))))
    pairs = [pair for i in indices if (pair := _pair(run, i, [shown[n].get(i) for n in iterations], limit))]
    return Gallery(iterations, pairs) if pairs else None


def _files(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    found = [file for suffix in (".png", *MOVING) for file in folder.glob(f"*{suffix}")]
    return {int(file.stem): file for file in found if file.stem.isdigit()}


def _cost(file: Path) -> int:
    """About the bytes it takes in the page; an mp4 is small on disk for what its frames will take."""
    size = file.stat().st_size
    return size if file.suffix == ".png" else min(size, CLIP_BYTES) if file.suffix == ".webp" else CLIP_BYTES


def newest_samples(run: RunFolder) -> tuple[int, dict[int, Path]] | None:
    """The newest iteration (done so far) with a whole set of samples, and its files by prompt; None without any.

    A set that is still being written has fewer files than those before it.
    """
    shown = {number: files for number, folder in run.samples.items() if (files := _files(folder))}
    return max(shown.items(), key=lambda item: (len(item[1]), item[0]), default=None)


def side_by_side(samples: Sequence[tuple[RunFolder, Mapping[int, Path]]], indices: Sequence[int]) -> list[Pair]:
    """One `Pair` for each prompt of `indices`, its frames those of several runs; the first run says what was asked.

    samples: each run with its files by prompt. Prompts that would take the page beyond BUDGET_BYTES are left out.
    """
    limit, pairs, size = min(CLIP_BYTES, BUDGET_BYTES // (len(samples) * max(1, len(indices)))), list[Pair](), 0
    for index in indices:
        embedded = [_embedded(run, files.get(index), limit) for run, files in samples]
        size += sum(len(frame.source) for frame in embedded if frame)
        if pairs and size > BUDGET_BYTES * 4 // 3:  # base64 is a third longer than its bytes
            break
        if pair := _captioned(samples[0][0], index, embedded):
            pairs.append(pair)
    return pairs


def _pair(run: RunFolder, index: int, files: list[Path | None], limit: int) -> Pair | None:
    return _captioned(run, index, [_embedded(run, file, limit) for file in files])


def _embedded(run: RunFolder, file: Path | None, limit: int) -> Picture | None:
    if file is None:
        return None
    return _embed_clip(file, float(run.setting("model.fps", 8)), limit) if file.suffix in MOVING else _embed(file)


def _captioned(run: RunFolder, index: int, embedded: list[Picture | None]) -> Pair | None:
    shown = [found for found in embedded if found]
    if not shown:
        return None
    prompt = run.prompts[index] if index < len(run.prompts) else {}
    text = str(prompt.get("text") or f"sample {index}")
    return Pair(text, prompt.get("task"), embedded, shown[-1].width, shown[-1].height)


def _embed_clip(file: Path, fps: float, limit: int) -> Picture | None:
    """A clip as a strip of at most `limit` bytes; None where the file is torn."""
    try:
        strip = film_strip(read_media(file), limit)
    except MediaError:
        return None
    source = f"data:image/webp;base64,{base64.b64encode(strip.data).decode('ascii')}"
    return Picture(source, strip.width, strip.height, strip.frames, strip.columns, fps / strip.stride)


def _embed(file: Path) -> Picture | None:
    """The picture, with its size in pixels on disk; None where the file is torn."""
    try:
        data = file.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            kind, size = "png", image.size
            if max(image.size) > LARGEST_SIDE:
                kind, data = "jpeg", _reduced(image)
    except (OSError, UnidentifiedImageError, SyntaxError):
        return None
    return Picture(f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}", *size)


def _reduced(image: Image.Image) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, format="JPEG", quality=90)
    return out.getvalue()
