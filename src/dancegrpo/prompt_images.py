"""Reference images of prompts: found by path, checked by their header, decoded only when a prompt is asked for."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dancegrpo.errors import PromptError

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
"""What Pillow reads; an animated file is a clip."""
CLIPS = (".mp4", ".mov", ".mkv", ".webm", ".avi")
"""What PyAV reads."""
CHECKED = 1000
"""So many images of a source are opened when it is; of the others only that they exist: headers of a million files
would take minutes, and what is wrong with one of them is told when its prompt is drawn."""

Reference = Path | bytes
"""Where an image lies: its file, or the file's bytes."""


def find_image(value: Any, folder: Path, where: str, *, by_name: bool = False) -> Reference | None:
    """A record's image: a path from `folder` on, the bytes of a file, or both as the `datasets` library stores them.

    by_name: a path that leads nowhere is looked up in `folder` by its file name alone. None for no image. Raises
    PromptError, which starts with `where`, for anything else and for a file that does not exist.
    """
    value = held(value)
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, str):
        paths = [folder / value, folder / Path(value).name] if by_name else [folder / value]
        found = next(filter(_is_file, paths), None)
        if found is not None:
            return found
    shown = f"{value!r}"[:200]
    raise PromptError(f"{where}: image {shown} is not a file: give a path, relative ones start at {folder}")


def held(value: Any) -> Any:
    """A record's image without the wrapping of the `datasets` library; None where nothing is held."""
    if isinstance(value, Mapping) and {"bytes", "path"} >= value.keys():
        value = value.get("bytes") or value.get("path")
    return None if value == "" else value


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, say
        return False


def check_image(image: Reference, where: str) -> None:
    """Reads a picture's header, and a PNG's checksums, or a clip's header. Raises PromptError that names the file."""
    from PIL import Image

    if isinstance(image, Path) and is_clip(image):
        return _check_clip(image, where)
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as picture:
            picture.verify()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(image, where, error) from error


def open_image(image: Reference, where: str) -> Path | Image:
    """What `Prompt.image` holds: a picture's path as it is, decoded bytes, a clip's first frame.

    Raises PromptError for bytes or a clip that cannot be decoded.
    """
    from PIL import Image

    if isinstance(image, Path):
        return _first_frame(image, where) if is_clip(image) else image
    try:
        picture = Image.open(io.BytesIO(image))
        picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(image, where, error) from error
    return picture


def is_clip(image: Reference) -> bool:
    """Whether a reference is a video, by its suffix."""
    return isinstance(image, Path) and image.suffix.lower() in CLIPS


def _check_clip(path: Path, where: str) -> None:
    import av

    try:
        with av.open(str(path)) as clip:
            if not clip.streams.video:
                raise ValueError("no video in it")
    except (OSError, ValueError, IndexError) as error:
        raise _unreadable(path, where, error) from error


def _first_frame(path: Path, where: str) -> Image:
    import av

    try:
        with av.open(str(path)) as clip:
            return next(clip.decode(video=0)).to_image()
    except (OSError, ValueError, IndexError, StopIteration) as error:  # PyAV's errors are among them
        raise _unreadable(path, where, error) from error


def _unreadable(image: Reference, where: str, error: Exception) -> PromptError:
    name = "in its bytes" if isinstance(image, bytes) else str(image)
    return PromptError(f"{where}: image {name} cannot be read ({type(error).__name__}): save it again, or take it out")
