"""What an iteration costs beside its bare compute: `python benchmarks/iteration.py shapes-flux --pairs 12`.

The floor replays the network calls of an iteration and nothing else: the denoiser's forward passes of the rollout and
its forward and backward passes on the pairs actually trained (each at the batch size that is fastest here), the VAE's
decoding, the judge, and one optimizer step per update. Iterations and floors alternate in one process; the result is
the median of the paired ratios with a bootstrap interval.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dancegrpo.config import load_config
from dancegrpo.rewards import load_judges
from dancegrpo.trainer import Trainer
from timing import timed


class Floor:
    """The bare calls of one trainer's iteration, on inputs captured from its own policy."""

    def __init__(self, trainer: Trainer, sizes: list[int]) -> None:
        self.trainer, self.policy, config = trainer, trainer.policy, trainer.config
        self.prompts = [trainer.prompts[i] for i in trainer.sampler.indices(0)]
        condition = self.policy.encode(self.prompts)
        self.trajectory = trainer.algorithm.collect(self.policy, condition, 0)
        self.samples, self.steps = len(self.trajectory), config.rollout.num_steps
        self.media = self._decode()
        # Its own optimizer at rate 0: the floor must neither train nor touch the run's moments.
        self.optimizer = torch.optim.AdamW(self.policy.trainable().values(), lr=0.0, weight_decay=0.0, fused=True)
        self.forward_size, self.backward_size = self._best(sizes, self._forward), self._best(sizes, self._backward)

    def _inputs(self, size: int) -> dict[str, Any]:
        """The denoiser's own arguments for `size` rows of a rollout, captured on their way in."""
        told = self.trajectory
        rows = torch.arange(size) % self.samples
        captured: dict[str, Any] = {}

        def keep(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured.update(args=args, kwargs=kwargs)

        hook = self.policy.module.register_forward_pre_hook(keep, with_kwargs=True)
        with torch.no_grad():
            self.policy.predict(told.x_t[rows, 0], told.step[rows, 0], told.condition[told.group[rows]])
        hook.remove()
        return captured

    def _forward(self, count: int, size: int) -> None:
        inputs = self._inputs_of(count, size)
        with torch.no_grad():
            for held in inputs:
                self.policy.module(*held["args"], **held["kwargs"])

    def _backward(self, count: int, size: int) -> None:
        for held in self._inputs_of(count, size):
            out = self.policy.module(*held["args"], **held["kwargs"])[0]
            out.backward(torch.ones_like(out))

    def _inputs_of(self, count: int, size: int) -> list[dict[str, Any]]:
        key, rest = (count, size), count % size
        cache = self.__dict__.setdefault("_cache", {})
        if key not in cache:
            whole, last = self._inputs(size), [self._inputs(rest)] if rest else []
            cache[key] = [whole] * (count // size) + last
        return cache[key]

    def _best(self, sizes: list[int], call: Callable[[int, int], None]) -> int:
        """The size with the least time for 256 rows, the better of two tries."""
        seconds = {}
        for size in sizes:
            call(256, size)
            seconds[size] = min(timed(lambda size=size: call(256, size)) for _ in range(2))
        self.policy.module.zero_grad(set_to_none=True)
        return min(seconds, key=seconds.__getitem__)

    @torch.no_grad()
    def _decode(self) -> torch.Tensor:
        told = self.trajectory
        rows = torch.arange(len(told)).split(64)
        return torch.cat([self.policy.decode(told.x0[r], told.condition[told.group[r]]) for r in rows])

    def run(self, pairs: int, updates: int) -> None:
        """The calls of an iteration that trained `pairs` pairs in `updates` optimizer steps."""
        self._forward(self.samples * self.steps, self.forward_size)
        media = self._decode()
        drawn = [self.prompts[i] for i in self.trajectory.group.tolist()]
        for judge in self.trainer.judges.rewards.values():
            judge(media, drawn)
        for update in range(updates):
            self._backward(pairs // updates + (update < pairs % updates), self.backward_size)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="shapes-flux")
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--pairs", type=int, default=12, help="interleaved (iteration, floor) pairs; at least 10")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.pairs < 10:
        parser.error(f"--pairs={args.pairs} is too few for an interval: use 10 or more")
    config = load_config(args.recipe, args.overrides)
    trainer = Trainer(config, load_judges(config.rewards).rewards)
    floor = Floor(trainer, [32, 64, 128, 256])
    trainer.iterate(0)  # warm-up, and the optimizer's state
    rows = []
    for number in range(1, args.pairs + 1):
        metrics: dict[str, Any] = {}
        seconds = timed(lambda number=number, metrics=metrics: metrics.update(trainer.iterate(number)))
        pairs, updates = metrics["pairs/trained"], max(1, metrics["train/updates"])
        bare = timed(lambda pairs=pairs, updates=updates: floor.run(pairs, updates))
        rows.append({"iteration": seconds, "floor": bare, "pairs": pairs, "phases": _phases(metrics)})
        if not args.json:
            print(
                f"pair {number:2}: iteration {seconds:.3f} s, floor {bare:.3f} s, ratio {seconds / bare:.3f}",
                flush=True,
            )
    ratios = np.array([row["iteration"] / row["floor"] for row in rows])
    resampled = np.median(np.random.default_rng(0).choice(ratios, (10_000, len(ratios))), axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    result = {
        "recipe": config.name,
        "iteration_over_floor": float(np.median(ratios)),
        "interval": [float(low), float(high)],
        "iteration_seconds": statistics.median(row["iteration"] for row in rows),
        "floor_seconds": statistics.median(row["floor"] for row in rows),
        "phase_seconds": {k: statistics.median(r["phases"][k] for r in rows) for k in rows[0]["phases"]},
        "forward_batch": floor.forward_size,
        "backward_batch": floor.backward_size,
        "threads": torch.get_num_threads(),
        "pairs": len(rows),
    }
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print(f"iteration / floor: {np.median(ratios):.3f} [{low:.3f}, {high:.3f}] over {len(rows)} interleaved pairs")
        print("median seconds by phase: " + ", ".join(f"{k} {v:.3f}" for k, v in result["phase_seconds"].items()))
        sizes = f"forward {floor.forward_size}, backward {floor.backward_size}"
        print(f"floor batch sizes: {sizes}; {torch.get_num_threads()} threads")


def _phases(metrics: dict[str, Any]) -> dict[str, float]:
    return {key.removeprefix("seconds/"): value for key, value in metrics.items() if key.startswith("seconds/")}


if __name__ == "__main__":
    main()
