"""What each process of `test_distributed` does: a few iterations in a layout, and what came of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from dancegrpo import evaluate
from dancegrpo.config import load_config
from dancegrpo.distributed import started
from dancegrpo.rewards import FunctionReward
from dancegrpo.settings import ParallelConfig
from dancegrpo.sharding import whole
from dancegrpo.trainer import Trainer

ASKED: list[int] = []
"""How many samples this process showed to the judge, call by call."""


def brightness(images, prompts):
    """Mean of the picture, and a score of nothing for every fifth: masks fall unevenly on ranks."""
    ASKED.append(len(images))
    values = images.float().flatten(1).mean(1)
    return [None if i % 5 == 3 else float(v) for i, v in enumerate(values)]


def main() -> None:
    file = Path(sys.argv[1])
    asked = json.loads(file.read_text())
    with started(ParallelConfig(**asked["parallel"])) as world:
        for name, recipe, overrides in asked["cases"]:
            ASKED.clear()
            config = load_config(recipe, overrides)
            trainer = Trainer(config, {"bright": FunctionReward(brightness, "bright", 4)}, world)
            metrics = [trainer.iterate(i) for i in range(config.iterations)]
            weights = {name: whole(w) for name, w in trainer.updater.state_dict()["weights"].items()}
            record = evaluate.evaluate(
                trainer.policy, trainer.judges, trainer.held_out, seed=1, batch_size=3, world=world
            )
            asked_about = int(world.sum_of_ranks(torch.tensor([sum(ASKED)])))
            if world.main:
                kept = [{k: v for k, v in m.items() if not k.startswith(("seconds/", "memory/"))} for m in metrics]
                told = {"metrics": kept, "weights": weights, "columns": record["columns"], "asked": asked_about}
                torch.save(told, file.with_suffix(f".{name}.pt"))


if __name__ == "__main__":
    main()
