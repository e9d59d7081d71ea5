"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from dancegrpo.errors import CheckpointError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary sibling (a file or folder it makes), then renames it to `path`.

    Parents are made; an existing `path` of the same kind is replaced. Raises CheckpointError naming the path when the
    disk refuses.
    """
    from safetensors import SafetensorError  # how safetensors reports a full disk; it is no OSError

    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)
        write(partial)
        replace(partial, path)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(f"cannot write {path}: {reason}; free space or name another folder") from error
    finally:
        with contextlib.suppress(OSError):  # the error under way, if any, is the one to tell
            remove(partial)


def replace(partial: Path, path: Path) -> None:
    """Renames a file or folder to `path`; one of the same kind that is there gives way."""
    if path.is_dir() and partial.is_dir():
        # A folder cannot be replaced in one move: the old one goes aside, so that a kill in between loses nothing.
        aside = path.with_name(f".{path.name}.{os.getpid()}.old")
        remove(aside)
        path.rename(aside)
        partial.replace(path)
        remove(aside)
    else:
        partial.replace(path)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk itself, so that it outlives a loss of power."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():  # Windows opens no folders
            return
        raise
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically; half a surrogate pair, which a prompt may hold and UTF-8 cannot, becomes `?`."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8", errors="replace", newline="\n"))


def write_json(path: Path, value: object) -> None:
    """Writes JSON atomically. Numbers that are not finite have no place in JSON: ValueError."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False))


def remove(path: Path) -> None:
    """Deletes a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
