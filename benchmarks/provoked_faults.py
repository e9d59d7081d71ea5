"""Provoked faults must raise their own alarm, healthy seeds none: `python benchmarks/provoked_faults.py`.

Trains the miniature FLUX pipeline once per fault and once per healthy seed and prints which alarms were raised, and at
which iteration. The faults: a learning rate 100 times the recipe's (collapse), a judge that pays for saturation
(hacking), a judge that scores everything alike (no-signal), a hundredth of the noise (clip-range). Nothing is skipped
or rolled back, so that the alarms are seen alone. `--size 4x8` takes a minute or two per run on a CPU core; the
recipe's own is 16x16. Ends with status 1 where a fault goes unseen, or a healthy seed raises an alarm.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from dancegrpo import train
from dancegrpo.config import load_config
from dancegrpo.errors import DanceError
from dancegrpo.health import Alarm, alarms_of

RECIPE = "shapes-flux"


def saturation(images: Tensor, prompts: list[str]) -> Tensor:
    """Pays for saturated colours, whatever was asked for. images: (B, 3, H, W)."""
    return (images.amax(1) - images.amin(1)).mean((-2, -1))


def constant(images: Tensor, prompts: list[str]) -> Tensor:
    """The same score for everything."""
    return torch.full((len(images),), 0.5)


@dataclass(frozen=True)
class Case:
    """One run. expected: the alarm it must raise, None = none at all."""

    name: str
    expected: str | None
    overrides: tuple[str, ...] = ()
    seed: int = 0


def cases(seeds: int) -> list[Case]:
    """The four faults, then the healthy seeds."""
    config = load_config(RECIPE)
    assert isinstance(config.rollout.noise_level, float)

    def replaced(judge: str) -> tuple[str, ...]:
        return ("rewards.hps=null", "rewards.shapes.weight=0", f"rewards.paid.judge=provoked_faults:{judge}")

    return [
        Case("learning rate x100", "collapse", (f"optimizer.learning_rate={100 * config.optimizer.learning_rate}",)),
        Case("pays for saturation", "hacking", replaced("saturation")),
        Case("constant judge", "no-signal", replaced("constant")),
        Case("noise level x0.01", "clip-range", (f"rollout.noise_level={config.rollout.noise_level / 100}",)),
        *(Case(f"healthy, seed {seed}", None, seed=seed) for seed in range(seeds)),
    ]


def run(case: Case, iterations: int, size: tuple[int, int], folder: Path) -> tuple[list[Alarm], str]:
    """Trains; the alarms of what was done, and the error that ended the run early, "" = none."""
    overrides = [
        f"iterations={iterations}",
        f"seed={case.seed}",
        f"prompts.per_iteration={size[0]}",
        f"rollout.group_size={size[1]}",
        "rewards.shapes.weight=0",
        "rewards.hps={judge: hps, options: {weights: shapes-hps}}",
        "rewards.pickscore={judge: pickscore, weight: 0, options: {model: shapes-pickscore}}",
        "evaluation.num_prompts=0",
        "evaluation.samples=0",
        "checkpoint.every=0",
        "tracking.backend=none",
        "threads=1",
        "health.watch=alarms",
        *case.overrides,
    ]
    error, target = "", folder / case.name.replace(" ", "-").replace(",", "")
    try:
        train(load_config(RECIPE, overrides), out=target)
    except DanceError as stopped:
        if not (target / "metrics.jsonl").is_file():
            raise
        error = str(stopped)
    settings = load_config(target / "config.yaml").model_dump(mode="json")
    rows = [json.loads(line) for line in (target / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return alarms_of(settings, rows), error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--size", default="8x16", help="prompts x samples of each, 8x16 by default")
    parser.add_argument("--seeds", type=int, default=5, help="healthy ones")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--out", type=Path, help="keep the run folders here")
    args = parser.parse_args()
    prompts, samples = (int(part) for part in args.size.split("x"))
    failed = 0
    with TemporaryDirectory() as scratch:
        lines = []
        for case in cases(args.seeds):
            if args.only and args.only not in case.name:
                continue
            alarms, error = run(case, args.iterations, (prompts, samples), args.out or Path(scratch))
            names = [alarm.name for alarm in alarms]
            good = case.expected in names if case.expected else not names
            failed += not good
            told = ", ".join(f"{alarm.name} at {alarm.iteration}" for alarm in alarms) or "none"
            lines.append(f"| {case.name} | {case.expected or 'none'} | {told} | {'yes' if good else 'NO'} |")
            for alarm in alarms:
                print(f"{case.name}: {alarm.sentence}", file=sys.stderr)
            if error:
                print(f"{case.name} ended early: {error}", file=sys.stderr)
        print("| run | expected | raised | as expected |\n| --- | --- | --- | --- |", *lines, sep="\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
