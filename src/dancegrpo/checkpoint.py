"""Checkpoints on disk: what a folder holds, which one to go on from, which ones to keep. `Saver` writes them.

`checkpoints/NNNNNN/` has a safetensors file for every rank and kind of tensor (weights, exp_avg, ..., ema, algorithm)
and a manifest with the state and the SHA-256 of every file, written last. The header of a file of sharded tensors says
which part of which whole tensor it holds; so any number of ranks reads it, each no more than it needs.

This is plain safetensors because torch.distributed.checkpoint, whose own format pickles its metadata, lacks what a run
needs when it stores safetensors (torch 2.8 to 2.13): hashes, and a folder that appears whole or not at all. And its
plans travel as pickled objects by collectives, which an asynchronous save makes on a thread beside the training's.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dancegrpo.distributed import ALONE, World
from dancegrpo.errors import CheckpointError
from dancegrpo.files import remove, write_text

MANIFEST = "manifest.json"
FORMAT = 2
"""Number of the layout on disk. 1, which says no number, had whole tensors alone, and is read as well."""
PIECES = "dancegrpo.pieces"
"""Key of a file's header that names the tensors which are parts: {name: {"shape": of the whole, "first": index}}."""
ABANDONED = "-abandoned"
"""Suffix of a folder that the run went back behind: kept because it was measured best, never gone on from."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run resumes from. state: JSON-able counters and positions."""

    iteration: int
    """Iterations finished."""
    tensors: Mapping[str, Mapping[str, Any]]
    """{kind: {parameter name: tensor}}: as they lie on this rank before a save, `Stored` ones after loading."""
    state: dict[str, Any]


@dataclass
class Stored:
    """A tensor of a checkpoint, read from its files when asked for."""

    shape: tuple[int, ...]
    pieces: list[tuple[Any, str, list[int], list[int]]] = field(default_factory=list)
    """(open file, name in it, first index, length by dimension)."""

    def read(self, first: Sequence[int] | None = None, length: Sequence[int] | None = None) -> Tensor:
        """A copy, on the CPU, of the elements from `first` on, `length` of them, by dimension; by default all."""
        first = [0] * len(self.shape) if first is None else first
        length = self.shape if length is None else length
        file, name, *_ = self.pieces[0]
        if not self.shape:
            return file.get_tensor(name).clone()
        wanted = file.get_slice(name)[(slice(0, 1),) * len(self.shape)].new_empty(tuple(length))  # of its type
        for file, name, begin, size in self.pieces:
            low = [max(a, b) for a, b in zip(first, begin)]
            high = [min(a + n, b + m) for a, n, b, m in zip(first, length, begin, size)]
            if all(a < b for a, b in zip(low, high)):
                there = tuple(slice(a - b, z - b) for a, b, z in zip(low, begin, high))
                here = tuple(slice(a - b, z - b) for a, b, z in zip(low, first, high))
                wanted[here] = file.get_slice(name)[there]
        return wanted


def load_latest(
    run_dir: Path,
    warn: Callable[[str], object],
    until: int | None = None,
    world: World = ALONE,
    kinds: Collection[str] | None = None,
) -> Checkpoint | None:
    """The newest whole checkpoint (of at most `until` iterations), or None where none was saved yet.

    A damaged one is named through `warn` and the one before it is used; CheckpointError where all are damaged. Every
    rank must ask: each checks some of the files, and all get the same. kinds: of tensors that are wanted; None = all.
    """
    known = world.from_main(iterations(run_dir))
    saved = [iteration for iteration in known if until is None or iteration <= until]
    for iteration in reversed(saved):
        folder = path_of(run_dir, iteration)
        found, damage = _load(folder, world, kinds)
        if found is not None:
            return found
        warn(f"checkpoint {folder} is damaged ({damage}): going back to the one before it")
    if saved:
        raise CheckpointError(f"every checkpoint in {_folder(run_dir)} is damaged: put one back, or start a new run")
    return None


def load(run_dir: Path, iteration: int, kinds: Collection[str] | None = None) -> Checkpoint:
    """The checkpoint after so many iterations, an abandoned one too. kinds: as in `load_latest`.

    Raises CheckpointError where there is none, or it is damaged.
    """
    known = iterations(run_dir, abandoned=True)
    others = f"choose among {', '.join(map(str, known))}" if known else "let the run reach one first"
    if iteration not in known:
        raise CheckpointError(f"{run_dir} has no checkpoint of iteration {iteration}: {others}")
    whole = path_of(run_dir, iteration)
    folder = whole if whole.is_dir() else whole.with_name(whole.name + ABANDONED)
    found, damage = _load(folder, kinds=kinds)
    if found is None:
        raise CheckpointError(f"checkpoint {folder} is damaged ({damage}): {others}")
    return found


def iterations(run_dir: Path, *, abandoned: bool = False) -> list[int]:
    """Of which iterations there are checkpoints, in order. abandoned: with those that are not to be gone on from."""
    folder = _folder(run_dir)
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if abandoned:
        names = {name.removesuffix(ABANDONED) for name in names}
    return sorted(int(name) for name in names if name.isdigit())


@dataclass(frozen=True)
class Keep:
    """Which checkpoints are left: the newest `newest`, the best, and where a run may have to go back to.

    refuge: iterations of which a state still counts as good, or fewer; None where no run goes back.
    """

    newest: int
    best: int | None = None
    refuge: int | None = None

    def among(self, saved: Sequence[int]) -> set[int]:
        """Those to keep of the checkpoints of so many iterations each, in order."""
        kept = set(saved[-self.newest :])
        if self.best is not None and self.best in saved:
            kept.add(self.best)
        if self.refuge is not None:
            # The newest that is old enough, and the one after it, which will be: so there always is one.
            old = [iteration for iteration in saved if iteration <= self.refuge]
            kept |= {*old[-1:], *saved[len(old) : len(old) + 1]}
        return kept


def prune(run_dir: Path, until: int, keep: Keep) -> None:
    """Of the checkpoints of at most `until` iterations, removes those that are not to be kept.

    Those beyond, which are damaged where there are any, do not count as newest.
    """
    saved = [iteration for iteration in iterations(run_dir) if iteration <= until]
    for old in set(saved) - keep.among(saved):
        shutil.rmtree(path_of(run_dir, old), ignore_errors=True)
    for path in _folder(run_dir).glob(f"*{ABANDONED}"):
        if keep.best is None or path.name != f"{keep.best:06d}{ABANDONED}":
            shutil.rmtree(path, ignore_errors=True)


def drop_after(run_dir: Path, iteration: int, best: int | None = None) -> None:
    """Deletes the checkpoints of more than `iteration` iterations: their weights are not to be gone on from.

    Where the best is among them it is abandoned instead: still there to be exported.
    """
    for saved in iterations(run_dir):
        if saved <= iteration:
            continue
        folder = path_of(run_dir, saved)
        if saved == best:
            aside = folder.with_name(folder.name + ABANDONED)
            remove(aside)
            folder.rename(aside)
        else:
            remove(folder)


def remove_leftovers(run_dir: Path) -> None:
    """Deletes what a kill in the middle of a save left behind."""
    for path in _folder(run_dir).glob(".*"):
        remove(path)


def path_of(run_dir: Path, iteration: int) -> Path:
    """Folder of the checkpoint after so many iterations."""
    return _folder(run_dir) / f"{iteration:06d}"


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def _load(
    folder: Path, world: World = ALONE, kinds: Collection[str] | None = None
) -> tuple[Checkpoint | None, str | None]:
    """The checkpoint, or what is wrong with it: the same on every rank."""
    from safetensors import SafetensorError

    found, damage = None, None
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("format", 1) > FORMAT:
            raise CheckpointError(
                f"checkpoint {folder} is of format {manifest['format']}, this version reads up to {FORMAT}: "
                "install the version that wrote it"
            )
        wanted = {name: sha for name, sha in manifest["sha256"].items() if kinds is None or _kind(name) in kinds}
        for name in sorted(wanted)[world.rank :: world.size]:
            if digest(folder / name) != wanted[name]:
                raise ValueError(f"{name} does not match its hash")
        found = Checkpoint(manifest["iteration"], _open(folder, sorted(wanted)), manifest["state"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        damage = " ".join(str(error).split()) or type(error).__name__
    told = next((each for each in world.gather_json(damage) if each is not None), None)
    return (found, None) if told is None else (None, told)


def _open(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Stored]]:
    """Every tensor of these files, by kind and name. Raises ValueError where one misses a part."""
    from safetensors import safe_open

    tensors: dict[str, dict[str, Stored]] = {}
    for file in names:
        held = tensors.setdefault(_kind(file), {})
        handle: Any = safe_open(folder / file, framework="pt")
        parts = json.loads((handle.metadata() or {}).get(PIECES, "{}"))
        for name in handle.keys():  # noqa: SIM118
            size = handle.get_slice(name).get_shape()
            whole = parts.get(name, {"shape": size, "first": [0] * len(size)})
            stored = held.setdefault(name, Stored(tuple(whole["shape"])))
            stored.pieces.append((handle, name, whole["first"], size))
    for kind, held in tensors.items():
        for name, stored in held.items():
            if sum(math.prod(size) for *_, size in stored.pieces) != math.prod(stored.shape):
                raise ValueError(f"{name} of {kind} misses a part")
    return tensors


def _kind(file: str) -> str:
    """`weights` of `weights.safetensors` and `weights-00001-of-00008.safetensors`."""
    return file.removesuffix(".safetensors").split("-")[0]


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
