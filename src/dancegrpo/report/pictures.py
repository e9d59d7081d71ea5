"""Fixed-seed pictures of a run, embedded in the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from dancegrpo.report.folder import RunFolder

LARGEST_SIDE = 512
"""Pixels; larger pictures are embedded at this size, as JPEG."""
PIXELATED_BELOW = 160
"""Pixels; smaller pictures are shown enlarged with hard edges."""
BUDGET_BYTES = 6_000_000
"""Pictures between first and last are embedded too while all of them together stay below this."""


@dataclass(frozen=True)
class Pair:
    """One prompt's pictures: `frames` are data URIs (None = missing), one per shown iteration."""

    text: str
    task: str | None
    frames: list[str | None]
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


def gallery(run: RunFolder) -> Gallery | None:
    """First and last pictures of every prompt, and those between where they are small; None without pictures."""
    shown = {number: files for number, folder in run.samples.items() if (files := _files(folder))}
    if not shown:
        return None
    iterations = sorted(shown)
    size = sum(file.stat().st_size for files in shown.values() for file in files.values())
    if size > BUDGET_BYTES:
        iterations = sorted({iterations[0], iterations[-1]})
    indices = sorted({index for number in iterations for index in shown[number]})
    pairs = [pair for index in indices if (pair := _pair(run, index, [shown[n].get(index) for n in iterations]))]
    return Gallery(iterations, pairs) if pairs else None


def _files(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    return {int(file.stem): file for file in folder.glob("*.png") if file.stem.isdigit()}


def _pair(run: RunFolder, index: int, files: list[Path | None]) -> Pair | None:
    embedded = [_embed(file) if file else None for file in files]
    sizes = [found[1] for found in embedded if found]
    if not sizes:
        return None
    prompt = run.prompts[index] if index < len(run.prompts) else {}
    text = str(prompt.get("text") or f"sample {index}")
    width, height = sizes[-1]
    return Pair(text, prompt.get("task"), [found[0] if found else None for found in embedded], width, height)


def _embed(file: Path) -> tuple[str, tuple[int, int]] | None:
    """A data URI and the picture's size in pixels; None where the file is torn."""
    try:
        data = file.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            kind, size = "png", image.size
            if max(image.size) > LARGEST_SIDE:
                kind, data = "jpeg", _reduced(image)
    except (OSError, UnidentifiedImageError, SyntaxError):
        return None
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}", size


def _reduced(image: Image.Image) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, format="JPEG", quality=90)
    return out.getvalue()
