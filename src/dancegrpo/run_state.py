"""What a run goes on from: saved, restored after a stop, gone back to after trouble."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from dancegrpo.algorithms import Algorithm, build_algorithm
from dancegrpo.checkpoint import (
    Checkpoint,
    Keep,
    drop_after,
    iterations,
    load_latest,
    prune,
    remove_leftovers,
    truncate_metrics,
)
from dancegrpo.config import RunConfig
from dancegrpo.distributed import World
from dancegrpo.errors import CheckpointError
from dancegrpo.evaluate import best_iteration
from dancegrpo.health import Decision, Guard
from dancegrpo.policies import load_policy
from dancegrpo.progress import Progress
from dancegrpo.rewards import Judges
from dancegrpo.run_folder import RunFolder
from dancegrpo.saver import Saver
from dancegrpo.sharding import laid_out
from dancegrpo.update import Updater


@dataclass
class RunState:
    """All that changes while a run learns: weights, optimizer, averages, the algorithm's memory, the guard's."""

    config: RunConfig
    updater: Updater
    algorithm: Algorithm
    judges: Judges
    guard: Guard
    world: World
    saver: Saver = field(init=False)

    def __post_init__(self) -> None:
        self.saver = Saver(self.world)

    @contextmanager
    def saving(self, folder: RunFolder) -> Iterator[None]:
        """Within it the run may save; left when what was saved last is on the disk.

        Raises CheckpointError where that could not be written. An error under way is not held up by other ranks.
        """
        try:
            yield
        except BaseException:
            self.saver.join()
            raise
        self.finish(folder)
        if self.saver.saved is not None:
            self._tidy(folder, self.saver.saved, among=self.saver.saved)

    def finish(self, folder: RunFolder) -> None:
        """Waits until what was saved last is on the disk. Raises CheckpointError where it could not be written."""
        self.saver.wait()
        if self.saver.failure is not None:
            raise CheckpointError(f"{self.saver.failure}, then go on with --resume {folder.path}")

    def save(self, folder: RunFolder, done: int, seconds: float) -> None:
        """Starts to save the state after `done` iterations and `seconds` of training. Every rank must ask.

        The loop waits for a copy in the host's memory, and for the save before this one.
        """
        self.saver.wait()
        state = {"num_updates": self.updater.num_updates, "algorithm": self.algorithm.state_dict(), "seconds": seconds}
        state["guard"] = self.guard.state_dict()
        tensors = self.updater.state_dict() | {"algorithm": self.algorithm.tensors()}
        self.saver.begin(folder.path, Checkpoint(done, tensors, state), self._keep(folder, done, among=done - 1))

    def check(self, progress: Progress) -> None:
        """Says once of a save that it failed: the run goes on, and saves again when that is due. Never waits."""
        for failure in self.saver.poll():
            progress.message(f"{failure}: the run goes on, and saves again when the next checkpoint is due")

    def restore(self, folder: RunFolder, progress: Progress) -> tuple[int, float, list[Mapping[str, Any]]]:
        """Loads the newest whole checkpoint and drops later metrics: (iterations done, seconds so far, their rows)."""
        checkpoint = load_latest(folder.path, progress.message, world=self.world)
        done = 0 if checkpoint is None else checkpoint.iteration
        rows = self.world.from_main(truncate_metrics(folder.metrics_file, done) if self.world.main else None)
        if self.world.main:
            remove_leftovers(folder.path)
        # What is kept is what a run without a stop had at this point: where a rollback leads to depends on it.
        self._tidy(folder, done, among=done - 1)
        if checkpoint is None:
            return 0, 0.0, rows
        self._load(checkpoint)
        if "guard" in checkpoint.state:  # runs of earlier versions have none
            self.guard.load_state_dict(checkpoint.state["guard"])
        return done, checkpoint.state["seconds"], rows

    def roll_back(self, folder: RunFolder, done: int, seconds: float, decision: Decision, progress: Progress) -> None:
        """Goes back to the last good state, as the guard decided, and saves it as that of now, `done` iterations."""
        self.saver.wait()
        checkpoint = load_latest(folder.path, progress.message, until=decision.until, world=self.world)
        if self.world.main:
            drop_after(folder.path, checkpoint.iteration if checkpoint else -1, self._best(folder, done))
        if checkpoint is None:
            self._restart()
        else:
            self._load(checkpoint)
        back = f"to iteration {checkpoint.iteration}" if checkpoint else "to the starting weights"
        progress.message(f"went back {back}: {decision.reason}")
        self.save(folder, done, seconds)

    def _best(self, folder: RunFolder, until: int) -> int | None:
        """The checkpoint, of at most `until` iterations, that was measured best; asked of the main process alone."""
        if not (self.config.checkpoint.best and self.world.main):
            return None
        known = [iteration for iteration in iterations(folder.path, abandoned=True) if iteration <= until]
        return best_iteration(folder, self.config, known)

    def _tidy(self, folder: RunFolder, until: int, among: int) -> None:
        """Removes checkpoints that are not to be kept: as after a save of `until` iterations, best of `among`."""
        if self.world.main:
            prune(folder.path, until, self._keep(folder, until, among))

    def _keep(self, folder: RunFolder, done: int, among: int) -> Keep:
        refuge = self.guard.refuge(done) if self.guard.active else None
        return Keep(self.config.checkpoint.keep, self._best(folder, among), refuge)

    def _load(self, checkpoint: Checkpoint) -> None:
        self.updater.load_state_dict(checkpoint.tensors, checkpoint.state["num_updates"])
        held = checkpoint.tensors.get("algorithm", {})
        # An older policy that an algorithm keeps lies as the weights do, the rest whole on every rank.
        weights = self.updater.parameters
        tensors = {n: laid_out(t, weights[n]) if n in weights else t.read() for n, t in held.items()}
        self.algorithm.load_state_dict(checkpoint.state["algorithm"], tensors)

    def _restart(self) -> None:
        """The weights, averages and memories that the run began with."""
        fresh = load_policy(self.config.model, self.config.rollout, seed=self.config.seed).trainable()
        weights = {name: weight.detach() for name, weight in fresh.items()}
        state = {"weights": weights, "exp_avg": {}, "exp_avg_sq": {}, "step": {}, "ema": weights}
        self.updater.load_state_dict(state, 0)
        unused = build_algorithm(self.config, self.judges, self.world)
        self.algorithm.load_state_dict(unused.state_dict(), unused.tensors())
