"""What a save costs the loop: `python benchmarks/checkpoint.py shapes-flux --rounds 12`.

In each round, in changing order: an iteration alone, one that begins with a save which the loop does not wait for, and
one that begins with a save which it waits for. Each save starts with nothing under way. Reported: the medians, and the
median over rounds of what the iterations with a save take longer than the one alone, as a share of it. On a machine
that does other things too these shares are noise; `bound` is less so: the seconds for which the loop is held up, plus
the processor seconds of the writing thread, which on idle cores cost the loop nothing. The exit code is 1 where an
asynchronous save costs more than 5 % of an iteration.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dancegrpo.config import load_config
from dancegrpo.rewards import load_judges
from dancegrpo.run_folder import RunFolder
from dancegrpo.trainer import Trainer
from timing import timed

LIMIT = 0.05
"""Share of an iteration that a save may cost."""
ORDERS = list(itertools.permutations(("alone", "asynchronous", "waited for")))


class Savings:
    """One run's trainer, and what its saves took."""

    def __init__(self, recipe: str, overrides: list[str], folder: Path) -> None:
        config = load_config(recipe, overrides)
        self.trainer = Trainer(config, load_judges(config.rewards).rewards)
        self.state, self.folder = self.trainer.state, RunFolder(folder)
        self.blocked: list[float] = []
        self.processor: list[float] = []
        self.done = 0
        self._work = self.state.saver._work
        self.state.saver._work = self._clocked  # type: ignore[method-assign]

    def _clocked(self, *args: Any) -> None:
        start = time.thread_time()
        self._work(*args)
        self.processor.append(time.thread_time() - start)

    def iterate(self, how: str) -> float:
        """Seconds of one iteration, with what it begins with."""

        def act() -> None:
            if how != "alone":
                self.blocked.append(timed(lambda: self.state.save(self.folder, self.done, 0.0)))
            if how == "waited for":
                self.state.saver.wait()
            self.trainer.iterate(self.done)
            self.state.saver.poll()

        self.done += 1
        seconds = timed(act)
        self.state.saver.wait()
        return seconds

    def size(self) -> int:
        """Bytes of the newest checkpoint."""
        newest = max((self.folder.path / "checkpoints").iterdir())
        return sum(file.stat().st_size for file in newest.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="shapes-flux")
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=12, help="of three iterations each")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:  # beside the runs: /tmp may be memory
        savings = Savings(args.recipe, args.overrides, Path(folder))
        savings.iterate("waited for")  # the optimizer's state, and the host's memory
        savings.iterate("asynchronous")
        savings.blocked, savings.processor = [], []
        rounds = [{how: savings.iterate(how) for how in ORDERS[n % len(ORDERS)]} for n in range(args.rounds)]
        told = summary(rounds, savings)
    print(json.dumps(told, indent=1) if args.json else "\n".join(f"{key:34} {value}" for key, value in told.items()))
    sys.exit(told["cost of an asynchronous save"] > LIMIT)


def summary(rounds: list[dict[str, float]], savings: Savings) -> dict[str, Any]:
    alone = statistics.median(each["alone"] for each in rounds)
    held = statistics.median(savings.blocked)
    bound = (held + statistics.median(savings.processor)) / alone

    def cost(how: str) -> float:
        return round(statistics.median((each[how] - each["alone"]) / each["alone"] for each in rounds), 4)

    return {
        "bytes": savings.size(),
        "seconds of an iteration": round(alone, 3),
        "seconds the loop is held up": round(held, 4),
        "share of an iteration": round(held / alone, 4),
        "cost of an asynchronous save": cost("asynchronous"),
        "bound": round(bound, 4),
        "cost of a save waited for": cost("waited for"),
    }


if __name__ == "__main__":
    main()
