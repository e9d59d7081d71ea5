"""Save and resume: whole or not at all, checked by hash, safetensors and JSON only."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dancegrpo.errors import CheckpointError
from dancegrpo.files import remove, write_atomically, write_text

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a run resumes from. tensors: {kind: {parameter name: tensor}}. state: JSON-able counters and positions."""

    iteration: int
    """Iterations finished."""
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(run_dir: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes checkpoints/NNNNNN atomically with a manifest of hashes, then removes all but the newest `keep`."""
    from safetensors.torch import save_file

    folder = _folder(run_dir) / f"{checkpoint.iteration:06d}"

    def write(partial: Path) -> None:
        partial.mkdir(parents=True)
        for kind, tensors in checkpoint.tensors.items():
            held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(held, partial / f"{kind}.safetensors")
        hashes = {path.name: _digest(path) for path in sorted(partial.iterdir())}
        manifest = {"iteration": checkpoint.iteration, "state": checkpoint.state, "sha256": hashes}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    write_atomically(folder, write)
    for old in _iterations(run_dir)[:-keep]:
        shutil.rmtree(_folder(run_dir) / f"{old:06d}", ignore_errors=True)
    return folder


def load_latest(run_dir: Path, warn: Callable[[str], object], until: int | None = None) -> Checkpoint | None:
    """The newest whole checkpoint (of at most `until` iterations), or None where none was saved yet.

    A damaged one is named through `warn` and the one before it is used; CheckpointError where all are damaged.
    """
    saved = [iteration for iteration in _iterations(run_dir) if until is None or iteration <= until]
    for iteration in reversed(saved):
        folder = _folder(run_dir) / f"{iteration:06d}"
        try:
            return _load(folder)
        except (OSError, ValueError, KeyError) as error:
            warn(f"checkpoint {folder} is damaged ({error}): going back to the one before it")
    if saved:
        raise CheckpointError(f"every checkpoint in {_folder(run_dir)} is damaged: put one back, or start a new run")
    return None


def drop_after(run_dir: Path, iteration: int) -> None:
    """Deletes the checkpoints of more than `iteration` iterations: their weights are not to be gone on from."""
    for saved in _iterations(run_dir):
        if saved > iteration:
            remove(_folder(run_dir) / f"{saved:06d}")


def _load(folder: Path) -> Checkpoint:
    from safetensors.torch import load_file

    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for name, digest in manifest["sha256"].items():
        if _digest(folder / name) != digest:
            raise ValueError(f"{name} does not match its hash")
    tensors = {Path(name).stem: load_file(folder / name) for name in manifest["sha256"]}
    return Checkpoint(manifest["iteration"], tensors, manifest["state"])


def _folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def _iterations(run_dir: Path) -> list[int]:
    folder = _folder(run_dir)
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def truncate_metrics(path: Path, iteration: int) -> list[Mapping[str, Any]]:
    """Drops lines of iterations that are not in the checkpoint (and a half-written last line); returns the rest."""
    kept: list[Mapping[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if row["iteration"] < iteration:
                kept.append(row)
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_text(path, text)
    return kept
