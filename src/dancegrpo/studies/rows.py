"""The pictures of a run's fixed-seed prompts as one small file: a row that the page sets under the other arms'."""

from __future__ import annotations

import io
from pathlib import Path

from dancegrpo.files import write_atomically
from dancegrpo.report.folder import read_run

PICTURES = 8
"""Prompts shown."""
CLIPS = 4
"""Prompts shown where they move, each by its first, middle and last frame."""
SIDE = 128
"""Pixels; larger pictures are shrunk."""


def shown_prompts(prompts: list[str], clips: bool) -> list[str]:
    """Those of the prompts that a row shows."""
    return prompts[: CLIPS if clips else PICTURES]


def write_row(folder: Path, target: Path, *, first: bool = False) -> None:
    """Writes a run's last samples (or its first) side by side as WebP; nothing where it drew none.

    Raises MediaError for a file that cannot be read.
    """
    samples = read_run(folder).samples
    if not samples:
        return
    drawn = samples[min(samples) if first else max(samples)]
    files = sorted((file for file in drawn.iterdir() if file.stem.isdigit()), key=lambda file: int(file.stem))
    if files:
        data = _row(files)
        write_atomically(target, lambda partial: partial.write_bytes(data))


def _row(files: list[Path]) -> bytes:
    import torch
    from PIL import Image

    from dancegrpo.media import grid, read_media, to_uint8
    from dancegrpo.video import fit

    media = [read_media(file) for file in files[:PICTURES]]
    cells = []
    for sample in media if len(media[0]) == 1 else media[:CLIPS]:
        frames = sample[sorted({0, len(sample) // 2, len(sample) - 1})]
        small = to_uint8(fit(frames / 255, SIDE))
        cells.append(torch.cat(list(small), dim=2))
    sheet = grid(cells, columns=len(cells), padding=4, background=255)
    out = io.BytesIO()
    Image.fromarray(sheet.permute(1, 2, 0).contiguous().numpy()).save(out, "WEBP", quality=88, method=6)
    return out.getvalue()
