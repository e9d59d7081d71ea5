"""What a run goes on from: saved, restored after a stop, gone back to after trouble."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dancegrpo.algorithms import Algorithm, build_algorithm
from dancegrpo.checkpoint import Checkpoint, drop_after, load_latest, save, truncate_metrics
from dancegrpo.config import RunConfig
from dancegrpo.distributed import World
from dancegrpo.health import Decision, Guard
from dancegrpo.policies import load_policy
from dancegrpo.progress import Progress
from dancegrpo.rewards import Judges
from dancegrpo.run_folder import RunFolder
from dancegrpo.update import Updater


@dataclass(frozen=True)
class RunState:
    """All that changes while a run learns: weights, optimizer, averages, the algorithm's memory, the guard's."""

    config: RunConfig
    updater: Updater
    algorithm: Algorithm
    judges: Judges
    guard: Guard
    world: World

    def save(self, folder: RunFolder, done: int, seconds: float) -> None:
        """Saves the state after `done` iterations and `seconds` of training. Every rank must ask."""
        state = {"num_updates": self.updater.num_updates, "algorithm": self.algorithm.state_dict(), "seconds": seconds}
        state["guard"] = self.guard.state_dict()
        tensors = self.updater.state_dict() | {"algorithm": self.algorithm.tensors()}
        if self.world.main:
            save(folder.path, Checkpoint(done, tensors, state), self.config.checkpoint.keep)
        self.world.barrier()

    def restore(self, folder: RunFolder, progress: Progress) -> tuple[int, float, list[Mapping[str, Any]]]:
        """Loads the newest whole checkpoint and drops later metrics: (iterations done, seconds so far, their rows)."""
        checkpoint = load_latest(folder.path, progress.message)
        done = 0 if checkpoint is None else checkpoint.iteration
        rows = self.world.from_main(truncate_metrics(folder.metrics_file, done) if self.world.main else None)
        if checkpoint is None:
            return 0, 0.0, rows
        self._load(checkpoint)
        if "guard" in checkpoint.state:  # runs of earlier versions have none
            self.guard.load_state_dict(checkpoint.state["guard"])
        return done, checkpoint.state["seconds"], rows

    def roll_back(self, folder: RunFolder, done: int, seconds: float, decision: Decision, progress: Progress) -> None:
        """Goes back to the last good state, as the guard decided, and saves it as that of now, `done` iterations."""
        checkpoint = load_latest(folder.path, progress.message, until=decision.until)
        self.world.barrier()  # all have read before one deletes
        if self.world.main:
            drop_after(folder.path, checkpoint.iteration if checkpoint else -1)
        if checkpoint is None:
            self._restart()
        else:
            self._load(checkpoint)
        back = f"to iteration {checkpoint.iteration}" if checkpoint else "to the starting weights"
        progress.message(f"went back {back}: {decision.reason}")
        self.save(folder, done, seconds)

    def _load(self, checkpoint: Checkpoint) -> None:
        self.updater.load_state_dict(checkpoint.tensors, checkpoint.state["num_updates"])
        self.algorithm.load_state_dict(checkpoint.state["algorithm"], checkpoint.tensors.get("algorithm", {}))

    def _restart(self) -> None:
        """The weights, averages and memories that the run began with."""
        fresh = load_policy(self.config.model, self.config.rollout, seed=self.config.seed).trainable()
        weights = {name: weight.detach() for name, weight in fresh.items()}
        state = {"weights": weights, "exp_avg": {}, "exp_avg_sq": {}, "step": {}, "ema": weights}
        self.updater.optimizer.state.clear()
        self.updater.load_state_dict(state, 0)
        unused = build_algorithm(self.config, self.judges, self.world)
        self.algorithm.load_state_dict(unused.state_dict(), unused.tensors())
