"""What each process of `test_placement` does: the same judge in several places, and what it said where."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from dancegrpo import evaluate
from dancegrpo.distributed import World, started
from dancegrpo.prompts import Prompt
from dancegrpo.rewards import Judges, Scores, load_placed
from dancegrpo.settings import ParallelConfig, RewardConfig
from toy import ToyPolicy

PLACES = {"all": "all", "main": "main", "second": [1]}


class Picky:
    """A network's rounding, a mask, a second column, and a failure: whatever a judge may answer."""

    name, differentiable = "picky", False
    built = 0

    def __init__(self, batch_size: int | None = None) -> None:
        self.batch_size = batch_size
        type(self).built += 1

    def __call__(self, media: torch.Tensor, prompts: list[Prompt]) -> Scores:
        if any(prompt.text == "raise" for prompt in prompts):
            raise ValueError("not this one")
        flat = media.flatten(1)
        weights = torch.randn(flat.shape[1], 7, generator=torch.Generator().manual_seed(0))
        values = (flat @ weights).tanh().sum(1) + torch.tensor([prompt.metadata["n"] for prompt in prompts]) / 7
        told = Scores(values, torch.ones(len(values), dtype=torch.bool), {"count": torch.arange(len(values))})
        return told.mask(torch.tensor([prompt.text == "mask" for prompt in prompts]), "masked")

    def to(self, device: object) -> Picky:
        return self


def media_of(rows: range) -> torch.Tensor:
    drawn = torch.rand(9, 2, 3, 5, 4, generator=torch.Generator().manual_seed(1))
    return drawn[rows.start : rows.stop]


def scored(judges: Judges, world: World) -> dict[str, object]:
    """Nine samples in batches of two, five on the first rank and four on the second."""
    texts = ["a", "mask", "b", "c", "d", "raise", "\ud83d \u202e", "mask", "e"]
    prompts = [Prompt(n, text, metadata={"n": n}) for n, text in enumerate(texts)]
    rows = range(5) if world.rank == 0 else range(5, 9)
    rows = range(9) if world.size == 1 else rows
    with judges.scoring([prompts[row] for row in rows]) as scoring:
        for row in range(rows.start, rows.stop, 2):
            scoring.add(media_of(range(row, min(row + 2, rows.stop))))
        told = judges.finish(scoring)["picky"].gathered(world)
    return {"values": told.values, "valid": told.valid, "count": told.extra["count"], "causes": dict(told.causes)}


def main() -> None:
    folder = Path(sys.argv[1])
    with started(ParallelConfig()) as world:
        for name, ranks in PLACES.items():
            for size in (None, 2):
                Picky.built = 0
                config = RewardConfig(judge="placement_worker:Picky", ranks=ranks, options={"batch_size": size})
                judges = Judges({"picky": load_placed("picky", config, world)}).to("cpu")
                told = scored(judges, world)
                held_out = [
                    Prompt(n, "word" * n, metadata={"n": n}) for n in range(5)
                ]  # 3 batches: 1 rank has one more
                record = evaluate.evaluate(ToyPolicy(), judges, held_out, seed=1, batch_size=2, world=world)
                told |= {"built": Picky.built, "columns": record["columns"]["picky"]}
                torch.save(told, folder / f"{name}.{size}.{world.rank}.pt")


if __name__ == "__main__":
    # Found by its name, as a user's judge is: not as this script.
    import placement_worker

    placement_worker.main()
