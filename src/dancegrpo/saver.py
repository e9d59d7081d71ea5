"""Writing checkpoints while the run goes on: every rank its own shards, from a copy in the host's memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dancegrpo.checkpoint import FORMAT, MANIFEST, PIECES, Checkpoint, Keep, digest, path_of, prune
from dancegrpo.distributed import ALONE, World
from dancegrpo.errors import CheckpointError
from dancegrpo.files import remove, replace, sync
from dancegrpo.sharding import local, part

Place = tuple[str, str, tuple[int, ...], tuple[int, ...]]
"""Part of a tensor: kind, name, first index, length by dimension."""


@dataclass(frozen=True)
class Flight:
    """A save under way. files: what this rank's thread has written, name -> SHA-256."""

    run_dir: Path
    manifest: dict[str, Any]
    keep: Keep
    files: Future[dict[str, str]]

    @property
    def target(self) -> Path:
        """The folder that will appear."""
        return path_of(self.run_dir, self.manifest["iteration"])

    @property
    def partial(self) -> Path:
        """Where all ranks write until it does."""
        return self.target.with_name(f".{self.target.name}.partial")

    def commit(self, files: Mapping[str, str]) -> None:
        """Makes the checkpoint appear, once all files are there; then removes what is no longer to be kept."""
        if missing := [name for name in files if not (self.partial / name).is_file()]:
            raise OSError(f"{missing[0]} is not there: all processes must see the same run folder")
        manifest = self.partial / MANIFEST
        manifest.write_text(json.dumps(self.manifest | {"sha256": dict(files)}, indent=1), encoding="utf-8")
        sync(manifest)
        sync(self.partial)
        replace(self.partial, self.target)
        sync(self.target.parent)
        prune(self.run_dir, self.manifest["iteration"], self.keep)


class Saver:
    """Saves one checkpoint at a time. All ranks make the same calls in the same order.

    `begin` copies this rank's shards to the host's memory, which is all that the loop waits for; a thread writes, syncs
    and hashes them. The checkpoint appears, in one rename, once the files of all ranks are complete: alone, the thread
    sees to that; of several ranks, the first does it in `poll` or `wait`, where they tell each other. The thread itself
    makes no collectives: they would meet those of the training.
    """

    def __init__(self, world: World = ALONE) -> None:
        self.world = world
        self.saved: int | None = None
        """The newest checkpoint that this saver knows to be whole."""
        self.failure: CheckpointError | None = None
        """Why the checkpoint that was begun last could not be written; the ones before it are as they were."""
        self._untold: list[CheckpointError] = []
        self._flight: Flight | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._buffers: dict[Place, Tensor] = {}
        self._places: list[Place] = []
        self._mine: list[Place] = []

    def begin(self, run_dir: Path, checkpoint: Checkpoint, keep: Keep) -> None:
        """Starts to save; waits for the save before it. keep: what is left of older ones.

        A checkpoint that is saved already is not saved again.
        """
        self.wait()
        if checkpoint.iteration == self.saved:
            return
        state = json.loads(json.dumps(checkpoint.state))  # a copy: the run goes on changing it
        manifest = {"format": FORMAT, "iteration": checkpoint.iteration, "state": state}
        files: Future[dict[str, str]] = Future()
        flight, self.failure = Flight(run_dir, manifest, keep, files), None
        if problem := self.world.from_main(_attempt(lambda: _prepare(flight.partial)) if self.world.main else None):
            self._fail(flight, problem)
            return
        held = self._snapshot(checkpoint.tensors)
        self._flight = flight
        self._pool.submit(self._work, flight, held)

    def poll(self) -> list[CheckpointError]:
        """Settles a save that all ranks have finished; never waits for one. The failures since the last call."""
        self._settle()
        told, self._untold = self._untold, []
        return told

    def wait(self) -> None:
        """Waits until nothing is under way."""
        self.join()
        self._settle()

    def join(self) -> None:
        """Waits for this rank's thread alone: where an error is under way, the other ranks are elsewhere."""
        if self._flight is not None:
            wait_for([self._flight.files])

    def _settle(self) -> None:
        flight = self._flight
        if flight is None:
            return
        done = flight.files.done()
        error = flight.files.exception() if done else None
        files = flight.files.result() if done and error is None else {}
        told = self.world.gather_json([done, _reason(error) if error else "", files])
        if not all(each[0] for each in told):
            return
        self._flight = None
        problem = next((each[1] for each in told if each[1]), "")
        if self.world.size > 1 and not problem:
            merged = {name: sha for each in told for name, sha in each[2].items()}
            problem = self.world.from_main(_attempt(partial(flight.commit, merged)) if self.world.main else None)
        if not problem:
            self.saved = flight.manifest["iteration"]
            return
        self._fail(flight, problem)

    def _fail(self, flight: Flight, reason: str) -> None:
        self.failure = CheckpointError(f"cannot write {flight.target}: {reason}; free space on its disk")
        self._untold.append(self.failure)
        if self.world.main:
            _attempt(lambda: remove(flight.partial))

    def _work(self, flight: Flight, held: Mapping[str, Mapping[Place, tuple[Tensor, list[int]]]]) -> None:
        try:
            files = self._write(flight.partial, held)
            if self.world.size == 1:
                flight.commit(files)
            flight.files.set_result(files)
        except BaseException as error:  # told where the run can hear it
            flight.files.set_exception(error)

    def _write(self, folder: Path, held: Mapping[str, Mapping[Place, tuple[Tensor, list[int]]]]) -> dict[str, str]:
        """This rank's files: name -> SHA-256."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        rank, size = self.world.rank, self.world.size
        suffix = f"-{rank + 1:05d}-of-{size:05d}" if size > 1 else ""
        files = {}
        for kind, places in held.items():
            parts = {
                name: {"shape": shape, "first": first}
                for (_, name, first, length), (_, shape) in places.items()
                if list(length) != shape
            }
            file = folder / f"{kind}{suffix}.safetensors"
            tensors = {name: tensor for (_, name, _, _), (tensor, _) in places.items()}
            save_file(tensors, file, {PIECES: json.dumps(parts)} if parts else None)
            sync(file)
            files[file.name] = digest(file)
        return files

    @torch.no_grad()
    def _snapshot(
        self, tensors: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, dict[Place, tuple[Tensor, list[int]]]]:
        """What this rank writes: kind -> place -> (copy in the host's memory, shape of the whole)."""
        there = {_place(kind, name, tensor): tensor for kind, held in tensors.items() for name, tensor in held.items()}
        mine = self._share(there)
        # Kept for the next save: memory that is pinned, or touched for the first time, takes long to get.
        self._buffers = {place: _buffer(there[place], self._buffers.get(place)) for place in mine}
        held: dict[str, dict[Place, tuple[Tensor, list[int]]]] = {kind: {} for kind in tensors}
        for place in mine:
            self._buffers[place].copy_(local(there[place]), non_blocking=True)
            held[place[0]][place] = self._buffers[place], list(there[place].shape)
        if any(tensor.is_cuda for tensor in there.values()):
            torch.cuda.current_stream().synchronize()
        return {kind: places for kind, places in held.items() if places or self.world.main}

    def _share(self, there: Mapping[Place, Tensor]) -> list[Place]:
        """The parts that this rank writes: of those with the same part, the one that has least to write so far."""
        places = [place for place, tensor in there.items() if 0 not in place[3] or not tensor.numel()]
        if self.world.size == 1:
            return places
        if places != self._places:  # they change together on all ranks
            self._places, self._mine = places, []
            sizes = [local(there[place]).nbytes for place in places]
            holders: dict[Place, tuple[list[int], int]] = {}
            for rank, listed in enumerate(self.world.gather_json([places, sizes])):
                for (kind, name, first, length), size in zip(*listed):
                    holders.setdefault((kind, name, tuple(first), tuple(length)), ([], size))[0].append(rank)
            load = [0] * self.world.size
            for place, (ranks, size) in holders.items():
                writer = min(ranks, key=load.__getitem__)
                load[writer] += size
                if writer == self.world.rank:
                    self._mine.append(place)
        return self._mine


def _place(kind: str, name: str, tensor: Tensor) -> Place:
    first, length = part(tensor)
    return kind, name, tuple(first), tuple(length)


def _buffer(tensor: Tensor, old: Tensor | None) -> Tensor:
    """Memory of the host for what of a tensor lies here: pinned for a GPU's, which copies into it without a detour."""
    here = local(tensor)
    if old is not None and (old.shape, old.dtype) == (here.shape, here.dtype):
        return old
    return torch.empty(here.shape, dtype=here.dtype, pin_memory=here.is_cuda)


def _prepare(folder: Path) -> None:
    remove(folder)
    folder.mkdir(parents=True)


def _attempt(act: Callable[[], object]) -> str:
    """Does it; what the disk refused, "" = nothing."""
    from safetensors import SafetensorError  # how safetensors reports a full disk; it is no OSError

    try:
        act()
    except (OSError, SafetensorError) as error:
        return _reason(error)
    return ""


def _reason(error: BaseException) -> str:
    """Never empty: that would say that nothing was wrong."""
    told = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
    return told or type(error).__name__
