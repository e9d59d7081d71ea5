"""Pictures and clips between tensors in [0, 1] and files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from torch import Tensor

from dancegrpo.errors import MediaError, PromptError
from dancegrpo.files import write_atomically
from dancegrpo.prompt_images import CLIPS, PICTURES
from dancegrpo.prompts import Prompt


def to_uint8(picture: Tensor) -> Tensor:
    """Any shape, float in [0, 1] -> uint8 in [0, 255], rounded exactly as diffusers' image processor does.

    Values outside [0, 1] are clamped; a NaN raises ValueError, because no picture shows it.
    """
    values = picture.detach().to(dtype=torch.float32, device="cpu")
    if torch.isnan(values).any():
        raise ValueError("the picture holds NaN: values must be numbers in [0, 1].")
    return (values.clamp(0, 1) * 255).round().to(torch.uint8)


def require_numbers(sample: Tensor, name: str) -> None:
    """Raises MediaError where a model's sample holds NaN. name: how the user knows it."""
    if torch.isnan(sample).any():
        raise MediaError(f"{name}: the samples hold NaN: look at the weights or model.dtype")


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


def find_media(paths: Sequence[Path]) -> list[Path]:
    """The picture and clip files among `paths`, folders opened; names in a folder in the order a person counts.

    Raises MediaError for a path that does not exist or is no medium, and where nothing is found.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [file for file in path.iterdir() if file.suffix.lower() in PICTURES + CLIPS]
            found += sorted(inside, key=lambda file: _counted(file.name))
        elif not path.is_file():
            raise MediaError(f"{path} does not exist: name picture or clip files, or a folder of them.")
        elif path.suffix.lower() not in PICTURES + CLIPS:
            raise MediaError(f"{path} is no picture or clip: use {', '.join(PICTURES + CLIPS)}.")
        else:
            found.append(path)
    if not found:
        raise MediaError(f"no picture or clip in {', '.join(map(str, paths))}: use {', '.join(PICTURES + CLIPS)}.")
    return found


def read_media(path: Path) -> Tensor:
    """A file's frames (F, 3, H, W) uint8, F = 1 for a picture; what is transparent shows white.

    Raises MediaError for a file that cannot be read to its end.
    """
    try:
        frames = _read_clip(path) if path.suffix.lower() in CLIPS else _read_pictures(path)
    except Image.DecompressionBombError as error:
        raise MediaError(f"{path} has more pixels than can be trusted ({error}): make it smaller.") from error
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError) as error:  # PyAV's errors are among them
        raise MediaError(
            f"{path} cannot be read ({type(error).__name__}): the file is damaged, make it again."
        ) from error
    if not frames:
        raise MediaError(f"{path} holds no frame: the file is damaged, make it again.")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()


def reference_image(prompt: Prompt) -> Image.Image:
    """The picture that an image-to-video model animates: RGB, upright as its file says, its first frame if it moves.

    What is transparent shows white. Raises PromptError for a prompt without an image, a file that is missing or
    damaged, and a picture of more than 8 bits per channel.
    """
    if prompt.image is None:
        raise PromptError(
            f"prompt {prompt.id} ({prompt.text!r}) has no image: this model animates one, give each prompt an image"
        )
    name = f"image {prompt.image}" if isinstance(prompt.image, Path) else f"the image of prompt {prompt.id}"
    try:
        opened: AbstractContextManager[Image.Image] = (
            Image.open(prompt.image) if isinstance(prompt.image, Path) else nullcontext(prompt.image)
        )
        with opened as file:
            picture = ImageOps.exif_transpose(file)
    except FileNotFoundError as error:
        raise PromptError(f"{name} of prompt {prompt.id} does not exist: put it back") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PromptError(f"{name} cannot be read ({type(error).__name__}): save it again as PNG or JPEG") from error
    if picture.mode.startswith(("I", "F")):
        raise PromptError(f"{name} has more than 8 bits per channel (mode {picture.mode}): save it with 8")
    return _opaque(picture)


def _read_pictures(path: Path) -> list[np.ndarray]:
    with Image.open(path) as file:
        if file.mode.startswith(("I", "F")):
            # Pillow would cut such values off at 255, which is nearly white.
            raise MediaError(f"{path} has more than 8 bits per channel (mode {file.mode}): save it with 8.")
        frames = []
        for frame in ImageSequence.Iterator(file):
            frames.append(np.asarray(_opaque(frame)))
        return frames


def _opaque(picture: Image.Image) -> Image.Image:
    """Any picture of 8 bits per channel -> RGB; what is transparent shows white."""
    layer = picture.convert("RGBA")
    sheet = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return Image.alpha_composite(sheet, layer).convert("RGB")


def _read_clip(path: Path) -> list[np.ndarray]:
    import av

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise MediaError(f"{path} has no video in it: name a clip.")
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def _counted(name: str) -> list[tuple[int, str]]:
    """A key under which 2.png comes before 10.png."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(int(part), "") if part[0] in "0123456789" else (-1, part) for part in parts]
