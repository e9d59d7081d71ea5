"""Pictures between tensors in [0, 1] and files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dancegrpo.files import write_atomically


def to_uint8(picture: Tensor) -> Tensor:
    """Any shape, float in [0, 1] -> uint8 in [0, 255], rounded exactly as diffusers' image processor does.

    Values outside [0, 1] are clamped; a NaN raises ValueError, because no picture shows it.
    """
    values = picture.detach().to(dtype=torch.float32, device="cpu")
    if torch.isnan(values).any():
        raise ValueError("the picture holds NaN: values must be numbers in [0, 1].")
    return (values.clamp(0, 1) * 255).round().to(torch.uint8)


def grid(pictures: Sequence[Tensor], columns: int, padding: int = 2, background: float = 1.0) -> Tensor:
    """Equal pictures (3, H, W), row by row -> one (3, rows*(H+padding)-padding, columns*(W+padding)-padding).

    Places left over in the last row show the background. ValueError on no picture, or on unequal shapes.
    """
    if not pictures or columns < 1:
        raise ValueError(f"{len(pictures)} pictures in {columns} columns: a grid needs at least one of each.")
    if len({tuple(picture.shape) for picture in pictures}) > 1:
        raise ValueError(f"pictures of shapes {sorted({tuple(p.shape) for p in pictures})} do not share a grid.")
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    channels, height, width = pictures[0].shape
    sheet = pictures[0].new_full(
        (channels, rows * (height + padding) - padding, columns * (width + padding) - padding), background
    )
    for index, picture in enumerate(pictures):
        top, left = (index // columns) * (height + padding), (index % columns) * (width + padding)
        sheet[:, top : top + height, left : left + width] = picture
    return sheet


def to_image(picture: Tensor) -> Image.Image:
    """(3, H, W) float in [0, 1] -> a PIL picture."""
    if picture.ndim != 3 or picture.shape[0] != 3:
        raise ValueError(f"a picture is (3, H, W), not {tuple(picture.shape)}.")
    return Image.fromarray(to_uint8(picture).permute(1, 2, 0).contiguous().numpy())


def save_image(picture: Tensor, path: Path) -> None:
    """Write (3, H, W) in [0, 1] as PNG: the file is there whole, or as it was before. Folders are made."""
    image = to_image(picture)
    write_atomically(path, lambda partial: image.save(partial, format="PNG"))
